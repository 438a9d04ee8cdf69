"""The one way in which everything here is measured.

A case's entries are first held to their oracle; who disagrees is not timed, and the test fails at its end. The others
take turns, round after round, in one process, with a copy and a product in every round whose speeds set the bounds.
"""

from __future__ import annotations

import copy
import gc
import statistics
from collections.abc import Callable
from typing import Any

import probes
import pytest
import torch
from entries import BACKWARD, FORWARD, Absent, Bound, Case, Entry
from probes import Call, Rates, clock, repeats_for

NEGLIGIBLE = 1e-3

ROUNDS, FEWEST_ROUNDS = 5, 3
ROUNDS_SECONDS = 8.0
"""Rounds beyond the fewest are not begun after this."""


class Recorder:
    """Where results go: pytest-benchmark's own records, one for each entry, and reasons for what is absent."""

    def __init__(self, benchmark: Any, quick: bool, absent: list[dict[str, str]]) -> None:
        self.benchmark = benchmark
        self.quick = quick
        self.absent = absent

    def leave_out(self, group: str, name: str, reason: str) -> None:
        """Keep a reason."""
        self.absent.append({"group": group, "name": name, "reason": reason})

    def keep(self, group: str, name: str, samples: list[float], repeats: int, info: dict[str, Any]) -> None:
        """Keep the samples of an entry.

        pytest-benchmark has one fixture per test, which times one function to its end before the next test begins.
        Entries that take turns share a test instead, so each gets a copy of the fixture under its own name.
        """
        fixture = copy.copy(self.benchmark)
        fixture.name, fixture.group, fixture.extra_info = name, group, info
        fixture.fullname = f"{self.benchmark.fullname}::{group}::{name}"
        fixture.param = fixture.params = None
        record = fixture._make_stats(repeats)
        for sample in samples:
            record.update(sample)


def run(case: Case, recorder: Recorder) -> dict[str, dict[str, float]]:
    """Hold entries to their oracle, time those that agree, fail if there are others; seconds by way and name."""
    agreeing, wrong = gates(case, recorder)
    medians = {}
    if not recorder.quick:
        for way in case.ways:
            medians[way] = measure(case, way, agreeing, recorder)
    if wrong:
        pytest.fail(f"{case.title}: not timed, because they disagree with the oracle: {wrong}")
    return medians


def gates(case: Case, recorder: Recorder) -> tuple[dict[str, float | None], dict[str, str]]:
    """Errors of the entries that agree with their oracle, None for yardsticks; and what is wrong with the others."""
    agreeing: dict[str, float | None] = {}
    wrong: dict[str, str] = {}
    for entry in case.entries:
        try:
            sizes = (True, False) if case.gate_full_size and not recorder.quick else (True,)
            errors = [error_of(entry, small, BACKWARD in case.ways) for small in sizes]
        except Absent as reason:
            recorder.leave_out(case.title, entry.name, str(reason))
            continue
        found = None if entry.oracle is None else max(e for e in errors if e is not None)
        if found is None or found <= entry.tolerance:
            agreeing[entry.name] = found
        else:
            wrong[entry.name] = f"{found:.1e} > {entry.tolerance:.0e}"
    return agreeing, wrong


def error_of(entry: Entry, small: bool, gradients: bool) -> float | None:
    """The largest relative error of an entry's result and gradients; None for a yardstick, which only must run."""
    bound = entry.bind(small)
    if entry.oracle is None:
        forward_of(bound)()
        return None
    if not isinstance(bound, Bound):  # of another process, which holds itself to its own float64
        return float(bound.error())
    gradients = gradients and not entry.only_forward
    found, expected = (results_of(b, gradients) for b in (bound, entry.oracle(small)))
    return largest_error(found, expected)


def results_of(bound: Bound, gradients: bool) -> dict[str, torch.Tensor | None]:
    """The result, and the gradients of its product with fixed numbers."""
    with torch.set_grad_enabled(gradients):
        out = bound.call()
    results: dict[str, torch.Tensor | None] = {"result": out.detach()}
    if gradients:
        grads = torch.autograd.grad(out, list(bound.leaves.values()), upstream(out), allow_unused=True)
        results |= dict(zip(bound.leaves, grads, strict=True))
    return results


def largest_error(found: dict[str, torch.Tensor | None], expected: dict[str, torch.Tensor | None]) -> float:
    """The largest relative error in the Euclidean norm, over all that the oracle knows.

    Some gradients are 0 but for rounding (of a bias before a norm): none counts as smaller than a share of the largest.
    """
    norms = {name: 0.0 if x is None else float(x.double().norm()) for name, x in expected.items()}
    gradients = [norm for name, norm in norms.items() if name != "result"]
    floor = NEGLIGIBLE * max(gradients, default=0.0)
    worst = 0.0
    for name, want in expected.items():
        got = found[name]
        want, got = (torch.zeros(()) if x is None else x.double().cpu() for x in (want, got))
        error = float((got - want).norm()) / max(norms[name], 0.0 if name == "result" else floor, 1e-30)
        worst = max(worst, error if error == error else float("inf"))
    return worst


def upstream(out: torch.Tensor) -> torch.Tensor:
    """Fixed numbers of the result's shape."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(out.shape, generator=generator).to(out.device, out.dtype)


def forward_of(bound: Bound) -> Callable[[], Any]:
    def call() -> Any:
        with torch.no_grad():
            return bound.call()

    return call


def backward_of(bound: Bound) -> Callable[[], Any]:
    leaves = list(bound.leaves.values())
    with torch.no_grad():
        gradient = upstream(bound.call())
    return lambda: torch.autograd.grad(bound.call(), leaves, gradient, allow_unused=True)


MAKE = {FORWARD: forward_of, BACKWARD: backward_of}


def measure(case: Case, way: str, agreeing: dict[str, float | None], recorder: Recorder) -> dict[str, float]:
    """Rounds of all entries in turn, recorded; median seconds by name."""
    group = f"{case.title}, {way}"
    calls: dict[str, Any] = {}
    facts: dict[str, dict[str, Any]] = {}
    for entry in case.entries:
        if entry.name not in agreeing:
            continue
        if way == BACKWARD and entry.only_forward:
            recorder.leave_out(group, entry.name, entry.only_forward)
            continue
        bound = entry.bind(False)
        calls[entry.name] = Call(MAKE[way](bound)) if isinstance(bound, Bound) else bound.timed(way)
        facts[entry.name] = facts_of(entry, bound, calls[entry.name], way)
        facts[entry.name] |= {"error": agreeing[entry.name], "tolerance": entry.tolerance, "note": entry.note}
    rates = Rates()
    samples, repeats = alternate(calls | rates.calls)
    medians = {name: statistics.median(values) / repeats[name] for name, values in samples.items()}
    speeds = rates.per_second(medians["copy"], medians["product"])
    reference = case.reference if case.reference in calls else next(iter(calls))
    task = case.needed if case.needed in calls else reference
    needed = facts[task]["flops"] if case.same_task else None
    for name in calls:
        flops = facts[name]["flops"] if needed is None else needed
        seconds = bound_seconds(facts[name]["moved_bytes"], flops or 0, speeds)
        share = None if facts[name]["yardstick"] else seconds / medians[name]
        info = {"way": way, "reference": reference, **facts[name], **speeds}
        info |= {"bound_seconds": seconds, "fraction_of_bound": share}
        recorder.keep(group, name, samples[name], repeats[name], info)
    gc.collect()
    return {name: medians[name] for name in calls}


def facts_of(entry: Entry, bound: Any, call: Any, way: str) -> dict[str, Any]:
    """What is counted rather than timed; the first call, which may compile, comes before."""
    if isinstance(bound, Bound):
        with torch.no_grad():
            start = clock()
            out = bound.call()
            call.slow = clock() - start > probes.SAMPLE_SECONDS
        moved = sum(x.numel() * x.element_size() for x in (*bound.leaves.values(), out))
        parameters = sum(x.numel() for x in bound.leaves.values() if isinstance(x, torch.nn.Parameter))
    else:
        moved, parameters = bound.operand_bytes + bound.result_bytes, bound.parameters
    if not call.slow:
        call.sample(1)
    return {
        "yardstick": entry.oracle is None,
        "moved_bytes": moved * (2 if way == BACKWARD else 1),
        "parameters": parameters,
        "peak_bytes": call.peak_bytes(),
        "flops": call.flops() if entry.counted else None,
    }


def bound_seconds(moved_bytes: int, flops: int, speeds: dict[str, float]) -> float:
    """The least time in which bytes move and products are formed, at measured speeds."""
    return max(moved_bytes / speeds["copied_bytes_per_second"], flops / speeds["product_flops_per_second"])


def alternate(calls: dict[str, Any]) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of samples, round by round, and how many calls a sample has."""
    repeats = {name: repeats_for(call) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for done in range(ROUNDS):
            if done >= FEWEST_ROUNDS and sum(map(sum, samples.values())) > ROUNDS_SECONDS:
                break
            for name, call in calls.items():
                samples[name].append(call.sample(repeats[name]))
    finally:
        if enabled:
            gc.enable()
    return samples, repeats
