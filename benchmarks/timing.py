"""Fair timing on a noisy machine: contenders take turns in one process, and ratios are what is reported."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# A sample shorter than this says more about the scheduler than about the code.
SAMPLE_SECONDS = 0.1


def alternate(
    contenders: dict[str, Callable[[], Any]], rounds: int = 7, clock: Callable[[], float] = time.perf_counter
) -> dict[str, dict[str, float]]:
    """Time callables in turn; seconds per call as median and quartiles over the rounds.

    ``time.process_time`` as the clock leaves out what a machine does for others, where one thread works.
    """
    repeats = {}
    for name, call in contenders.items():
        call()
        start = clock()
        call()
        repeats[name] = max(1, round(SAMPLE_SECONDS / max(clock() - start, 1e-6)))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            start = clock()
            for _ in range(repeats[name]):
                call()
            samples[name].append((clock() - start) / repeats[name])
    return {name: _summary(values) for name, values in samples.items()}


def _summary(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "q1": low, "q3": high}


def environment() -> dict[str, Any]:
    """Machine, versions and commit that a result belongs to."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "commit": commit.stdout.strip() or None,
    }


def print_table(title: str, base: str, results: dict[str, dict[str, float]]) -> None:
    """One line per contender: milliseconds and the ratio to ``base``."""
    print(f"\n{title}")
    for name, result in results.items():
        ratio = result["median"] / results[base]["median"]
        spread = (result["q3"] - result["q1"]) / result["median"]
        print(f"  {name:34s} {1e3 * result['median']:9.1f} ms   {ratio:7.2f} x {base}   (iqr {spread:.0%})")


def write_json(path: str | None, results: dict[str, Any]) -> None:
    """Write results with their environment, if a path is given."""
    if path is not None:
        Path(path).write_text(json.dumps({"environment": environment(), **results}, indent=1) + "\n")
