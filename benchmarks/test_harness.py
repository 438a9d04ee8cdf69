"""That entries which disagree are not timed, that entries take turns, and what is counted."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

import harness
import other_process
import probes
from entries import BACKWARD, FORWARD, Absent, Bound, Case, Entry, of_leaves, random_leaves, yardstick
from harness import Recorder


class Kept(Recorder):
    """Keeps in a list what the recorder would hand to pytest-benchmark."""

    def __init__(self, quick: bool = False) -> None:
        super().__init__(None, quick, [])
        self.rows: dict[tuple[str, str], dict[str, Any]] = {}

    def keep(self, group: str, name: str, samples: list[float], repeats: int, info: dict[str, Any]) -> None:
        self.rows[group, name] = {"samples": samples, "repeats": repeats, **info}


@pytest.fixture(autouse=True)
def short_samples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(probes, "SAMPLE_SECONDS", 1e-4)
    monkeypatch.setattr(probes, "COPIED_BYTES", 2**12)
    monkeypatch.setattr(probes, "PRODUCT_WIDTH", 8)
    return iter([None])


def product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def wrong_gradient(a: Tensor, b: Tensor) -> Tensor:
    return a @ b + (b - b.detach()).sum()


def entry(name: str, function: Callable[..., Tensor], **options: Any) -> Entry:
    def of(function: Callable[..., Tensor], dtype: torch.dtype) -> Bound:
        return of_leaves(function, random_leaves(dtype, a=(6, 5), b=(5, 4)))

    return Entry(name, lambda small: of(function, torch.float32), lambda small: of(product, torch.float64), **options)


def case(*entries: Entry, **options: Any) -> Case:
    return Case("products", list(entries), entries[0].name, **options)


@pytest.mark.parametrize(
    "wrong", [lambda a, b: product(a, b) * 1.001, wrong_gradient, lambda a, b: product(a, b) * torch.nan]
)
def test_what_disagrees_is_not_timed_and_fails(wrong: Callable[..., Tensor]) -> None:
    kept = Kept()
    with pytest.raises(pytest.fail.Exception, match=r"products: not timed, .*'wrong': "):
        harness.run(case(entry("right", product), entry("wrong", wrong)), kept)
    assert set(kept.rows) == {(f"products, {way}", "right") for way in (FORWARD, BACKWARD)}


def test_a_wrong_gradient_is_none_of_a_forward_case() -> None:
    kept = Kept()
    harness.run(case(entry("forward alone", wrong_gradient), ways=(FORWARD,)), kept)
    assert list(kept.rows) == [(f"products, {FORWARD}", "forward alone")]


def test_gradients_that_are_rounding_are_judged_beside_the_largest() -> None:
    expected = {"result": torch.ones(2), "weight": torch.full((2,), 1e3), "bias": torch.full((2,), 1e-13)}
    found = {**expected, "bias": torch.full((2,), 1e-4)}
    assert 0.0 < harness.largest_error(found, expected) < 1e-3
    assert harness.largest_error({**expected, "bias": torch.full((2,), 1e2)}, expected) > 1.0
    assert harness.largest_error({**expected, "weight": None}, expected) == pytest.approx(1.0)


def test_quick_holds_to_the_oracle_and_times_nothing() -> None:
    kept = Kept(quick=True)
    harness.run(case(entry("right", product)), kept)
    assert kept.rows == {}
    with pytest.raises(pytest.fail.Exception):
        harness.run(case(entry("wrong", wrong_gradient)), kept)


def test_what_cannot_take_part_is_named_with_its_reason() -> None:
    def missing(small: bool) -> Bound:
        raise Absent("no such library")

    kept = Kept()
    halves = entry("halves", product, only_forward="no gradients here")
    harness.run(case(entry("right", product), Entry("peer", missing, missing), halves), kept)
    assert {"group": "products", "name": "peer", "reason": "no such library"} in kept.absent
    assert {"group": f"products, {BACKWARD}", "name": "halves", "reason": "no gradients here"} in kept.absent
    assert (f"products, {FORWARD}", "halves") in kept.rows
    assert (f"products, {BACKWARD}", "halves") not in kept.rows


def test_other_errors_are_not_reasons() -> None:
    def broken(small: bool) -> Bound:
        raise RuntimeError("ours to repair")

    with pytest.raises(RuntimeError, match="ours to repair"):
        harness.run(case(Entry("broken", broken, broken)), Kept())


def test_entries_take_turns() -> None:
    order: list[str] = []

    class Named:
        slow = False

        def __init__(self, name: str) -> None:
            self.name = name

        def sample(self, repeats: int) -> float:
            order.append(self.name)
            return 1.0

    samples, repeats = harness.alternate({"one": Named("one"), "two": Named("two")})
    rounds = len(samples["one"])
    assert rounds >= harness.FEWEST_ROUNDS
    assert order[-2 * rounds :] == ["one", "two"] * rounds
    assert repeats == {"one": 1, "two": 1}


def test_what_is_counted() -> None:
    kept = Kept()
    harness.run(case(yardstick("other", entry("", product).bind), entry("right", product), needed="right"), kept)
    forward, backward = (kept.rows[f"products, {way}", "right"] for way in (FORWARD, BACKWARD))
    assert forward["flops"] == 2 * 6 * 5 * 4
    assert backward["flops"] == 3 * forward["flops"]
    assert forward["moved_bytes"] == 4 * (6 * 5 + 5 * 4 + 6 * 4)
    assert backward["moved_bytes"] == 2 * forward["moved_bytes"]
    assert forward["peak_bytes"] >= 4 * 6 * 4
    assert forward["fraction_of_bound"] > 0.0
    assert kept.rows[f"products, {FORWARD}", "other"]["fraction_of_bound"] is None


def test_the_slower_of_bytes_and_products_bounds() -> None:
    speeds = {"copied_bytes_per_second": 10.0, "product_flops_per_second": 100.0}
    assert harness.bound_seconds(100, 50, speeds) == 10.0
    assert harness.bound_seconds(1, 500, speeds) == 5.0


def test_the_packages_on_the_index_are_absent_with_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(other_process, "FOLDER", tmp_path / "nothing")
    with pytest.raises(Absent, match="--install"):
        other_process.IndexLayer(name="any", shape=(4, 4))
