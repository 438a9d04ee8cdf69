"""Time and memory over the number of tokens: where dense and sparse meet, and where dense ends.

``pytest benchmarks/bench_curves.py``: stride 2, window 3. An entry goes no further where its next size would take more
than 5 s or 4 GB beyond the operands, or on a GPU 1 s or 40 GB, judged by how it grew from the last size but one to the
last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from bench_grouping import by, cube, leaves_of, square
from bench_layers import entry as layer_entry
from entries import BACKWARD, DEVICE, FORWARD, Bound, Case, Entry, of_leaves
from harness import Recorder, gates, measure
from spatial_grouping_attention.functional import grouping_attention
from torch import Tensor, float32, float64

MOST_SECONDS, MOST_BYTES = (5.0, 4e9) if DEVICE == "cpu" else (1.0, 4e10)
SIDES = {2: (16, 32, 64, 128, 256, 512, 1024), 3: (8, 16, 32, 64, 128)}
LAYER_SIDES = {2: SIDES[2][:4], 3: SIDES[3][:3]} if DEVICE == "cpu" else SIDES
KERNELS = "native" if DEVICE == "cpu" else "triton"


def operator_entries(side: int, ndim: int) -> list[Entry]:
    """Single calls, dense and windowed, 2-D with 4 heads of 32 and 3-D with 4 heads of 16."""
    make_relation, smallest, size = (square, 16, 32) if ndim == 2 else (cube, 8, 16)

    def of(small: bool) -> Any:
        return make_relation(smallest if small else side)

    def dense(backend: str) -> Callable[[Any], Callable[..., Tensor]]:
        return lambda relation: lambda q, k, v: grouping_attention(q, k, v, backend=backend)[0]

    def made(name: str, make: Callable[[Any], Callable[..., Tensor]], exact: Callable[[Any], Any]) -> Entry:
        def bind(small: bool) -> Bound:
            return of_leaves(make(of(small)), leaves_of(of(small), 4, size, float32))

        def oracle(small: bool) -> Bound:
            return of_leaves(exact(of(small)), leaves_of(of(small), 4, size, float64))

        return Entry(name, bind, oracle, counted=False)

    return [
        made(f"sparse, {KERNELS}", by(KERNELS), by("reference")),
        made("sparse, tiled", by("tiled"), by("reference")),
        made("sparse, masked matrix", by("reference"), by("reference")),
        made("dense, fused", dense("fused"), dense("reference")),
        made("dense, matrix", dense("reference"), dense("reference")),
    ]


def layer_entries(side: int, ndim: int) -> list[Entry]:
    """Whole layers of 64 channels, 4 heads, 3 rounds."""
    return [layer_entry(kind, kind, (side,) * ndim, 4, 64) for kind in ("sparse", "dense", "deformable")]


class Limits:
    """What has been seen of an entry, and whether its next size may be tried."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, str], list[tuple[float, float]]] = {}
        self.ended: set[tuple[str, str]] = set()

    def reason(self, way: str, name: str) -> str:
        """Why an entry ends here; empty if it goes on."""
        seen = self.seen.get((way, name), [])
        if len(seen) < 2:
            return ""
        seconds, held = (last * max(last / before, 1.0) for before, last in zip(*seen[-2:], strict=True))
        if seconds > MOST_SECONDS:
            return f"would take about {seconds:.0f} s"
        return f"would hold about {held / 1e9:.0f} GB" if held > MOST_BYTES else ""


class Watching(Recorder):
    """Keeps what a curve needs to know of its entries."""

    limits: Limits

    def keep(self, group: str, name: str, samples: list[float], repeats: int, info: dict[str, Any]) -> None:
        seconds = sorted(samples)[len(samples) // 2] / repeats
        self.limits.seen.setdefault((info["way"], name), []).append((seconds, float(info["peak_bytes"])))
        super().keep(group, name, samples, repeats, info)


CURVES = {
    f"curve, {what}, {ndim}-D": (make, ndim, sides)
    for what, make, all_sides in (("calls", operator_entries, SIDES), ("layers", layer_entries, LAYER_SIDES))
    for ndim, sides in all_sides.items()
}


@pytest.mark.parametrize("title", CURVES)
def test_curve(title: str, recorder: Recorder) -> None:
    make, ndim, sides = CURVES[title]
    first = case_of(title, make(sides[0], ndim), sides[0])
    agreeing, wrong = gates(first, recorder)
    if not recorder.quick:
        watching = Watching(recorder.benchmark, False, recorder.absent)
        watching.limits = Limits()
        for way in (FORWARD, BACKWARD):
            for side in sides:
                climb(case_of(title, make(side, ndim), side), way, agreeing, watching)
    assert not wrong, f"not timed, because they disagree with the oracle: {wrong}"


def case_of(title: str, entries: list[Entry], side: int) -> Case:
    return Case(f"{title}, side {side}", entries, entries[0].name, same_task=False, gate_full_size=False)


def climb(case: Case, way: str, agreeing: dict[str, float | None], recorder: Watching) -> None:
    """One size of a curve, for those that have not ended."""
    going = {}
    for name, error in agreeing.items():
        if (way, name) in recorder.limits.ended:
            continue
        if reason := recorder.limits.reason(way, name):
            recorder.limits.ended.add((way, name))
            recorder.leave_out(f"{case.title}, {way}", name, reason)
        else:
            going[name] = error
    if going:
        measure(case, way, going, recorder)
