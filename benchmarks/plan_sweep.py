"""Which plans of the grouping kernels are worth being candidates: many of them, timed on a GPU.

    PYTHONPATH=packages/rotary-spatial-embeddings/src:packages/spatial-grouping-attention/src \
        python benchmarks/plan_sweep.py [--json FILE]

Several processes compile; then one process times every plan of every pass, holds what each computes to what the first
one does, and measures the operators with the fastest plans. Candidates are written in ``backends/triton/plan.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gpu_report_cases as cases
import torch
from gpu_report import environment
from gpu_report_timing import MOST_WORKERS, backward_of, forward_of, in_workers, measure, said, synchronize
from spatial_grouping_attention.backends.triton import launch, passes
from spatial_grouping_attention.backends.triton.layout import Triple
from spatial_grouping_attention.backends.triton.plan import STAGES, Plan
from torch import Tensor

TITLES = ("512x512 -> 256x256, heads of 32", "64x64x64 -> 32x32x32, heads of 32")

# Tiles, rows of the other side per step, and warps; all that go together are tried.
TOKEN_GRIDS: dict[int, tuple[tuple[Triple, tuple[int, ...], tuple[int, ...]], ...]] = {
    2: (
        ((1, 4, 4), (16,), (1, 2)),
        ((1, 4, 8), (16, 32), (1, 2, 4)),
        ((1, 8, 8), (16, 32, 64), (2, 4)),
        ((1, 8, 16), (16, 64), (4, 8)),
    ),
    3: (
        ((2, 2, 4), (16,), (1, 2)),
        ((2, 4, 4), (16, 64), (1, 2, 4)),
        ((4, 4, 4), (16, 64), (2, 4)),
    ),
}
GROUP_GRIDS: dict[int, tuple[tuple[Triple, tuple[int, ...], tuple[int, ...]], ...]] = {
    2: (((1, 4, 4), (16, 32, 64), (1, 2, 4)), ((1, 4, 8), (16, 32, 64), (1, 2, 4)), ((1, 8, 8), (64,), (4,))),
    3: (((2, 2, 4), (16, 32, 64), (1, 2, 4)), ((2, 4, 4), (32, 64), (2, 4))),
}
# What each pass writes.
RESULTS = {
    "token_forward": ("lse", "out"),
    "group_forward": ("log_mass", "out"),
    "pool_backward_tokens": ("dk", "dv", "dlse"),
    "pool_backward_groups": ("dq",),
    "assign_backward_tokens": ("dk", "delta"),
    "assign_backward_groups": ("dq", "du"),
}


def tried(kernel: str, ndim: int) -> list[Plan]:
    """All plans of a pass."""
    side = "token" if kernel.endswith("tokens") or kernel.startswith("token") else "group"
    grids = {"token": TOKEN_GRIDS, "group": GROUP_GRIDS}[side][ndim]
    return [
        Plan(tile, block, warps, STAGES)
        for tile, blocks, all_warps in grids
        for block, warps in itertools.product(blocks, all_warps)
    ]


def compile_share(share: int) -> str:
    """Compile and launch this process' share of the plans."""

    def every(key: Any, candidates: Callable[[], list[Plan]], run: Callable[[Plan], Any]) -> Any:
        for plan in tried(key[0], key[1])[share::MOST_WORKERS]:
            with contextlib.suppress(Exception):
                run(plan)
        return run(candidates()[0])

    patch.object(launch, "choose", every).start()
    for title in TITLES:
        case = cases.Grouping(title)
        for name, leaves in case.leaves.items():
            backward_of(case.kernels(name)["kernels"](), leaves)()
    synchronize()
    return ""


class Sweep:
    """Times every plan of every class of calls, once, and goes on with the fastest."""

    def __init__(self) -> None:
        self.found: dict[str, list[dict[str, Any]]] = {}
        self.fastest: dict[Hashable, Plan] = {}
        self.tensors: launch.Tensors = {}

    def watch(self, launched: Callable[..., Any]) -> Callable[..., Any]:
        """A kind of pass that tells what it reads and writes."""

        def told(kernel: Any, x: Any, tensors: launch.Tensors, **constants: bool) -> Any:
            self.tensors = tensors
            return launched(kernel, x, tensors, **constants)

        return told

    def results(self, kernel: str) -> list[Tensor]:
        """The tensors that the pass writes, without their histories: they are written again and again."""
        written = (self.tensors[name] for name in RESULTS[kernel])
        return [x.data for x in written if x is not None]

    def __call__(self, key: Any, candidates: Callable[[], list[Plan]], run: Callable[[Plan], Any]) -> Any:
        if key not in self.fastest:
            self.fastest[key] = self.time_all(key, candidates(), run)
        return run(self.fastest[key])

    def time_all(self, key: Any, written: list[Plan], run: Callable[[Plan], Any]) -> Plan:
        from triton.testing import do_bench

        run(written[0])
        results = self.results(key[0])
        wanted = [x.to(torch.float32, copy=True) for x in results]
        rows = []
        for plan in dict.fromkeys((*written, *tried(key[0], key[1]))):
            row: dict[str, Any] = {"plan": repr(plan), "written": plan in written}
            try:
                for x in results:
                    x.fill_(float("nan"))
                run(plan)
                row["error"] = max(map(_difference, results, wanted))
                row["ms"] = do_bench(functools.partial(run, plan), warmup=2, rep=10, return_mode="median")
                rows.append((row["ms"], plan))
            except Exception as error:
                row["failed"] = said(error)
            self.found.setdefault(f"{key}", []).append(row)
        rows.sort(key=lambda row: row[0])
        first = min(time for time, plan in rows if plan in written)
        print(f"{key[0]} {key[1]}-D {key[10:]}: written {first:.3f}; "
              + ", ".join(f"{p.tile[-2:]}b{p.block}w{p.num_warps}s{p.num_stages} {t:.3f}" for t, p in rows[:5]),
              flush=True)  # fmt: skip
        return rows[0][1]


def _difference(found: Tensor, wanted: Tensor) -> float:
    """The largest one; NaN counts as far off."""
    return float((found.float() - wanted).abs().nan_to_num(1e9).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    found = environment()
    failures = [reason for reason in in_workers(compile_share, list(range(MOST_WORKERS)), said) if reason]
    print("compiled", *failures, flush=True)
    sweep = Sweep()
    patch.object(launch, "choose", sweep).start()
    for name in ("token_pass", "group_pass"):
        patch.object(passes, name, sweep.watch(getattr(launch, name))).start()
    totals = {}
    for title in TITLES:
        case = cases.Grouping(title)
        for name, leaves in case.leaves.items():
            for way, make in (("forward", forward_of), ("backward", backward_of)):
                row = totals[f"{name}, {title}, {way}"] = measure(
                    functools.partial(make, case.kernels(name)["kernels"](), leaves)
                )
                print(f"{name}, {title}, {way}: {1e3 * row['median']:.3f} ms, graph {row['graph']}", flush=True)
                if arguments.json:
                    kept = {"environment": found, "plans": sweep.found, "totals": totals}
                    arguments.json.write_text(json.dumps(kept, indent=1) + "\n")
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
