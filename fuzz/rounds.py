"""All targets, and cases of them in one process."""

from __future__ import annotations

import faulthandler
import json
import resource
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import of_attention
import of_embedding
import of_layers
import of_models
import of_operators
import of_rose
import torch
from drawing import Draw, Verdict
from hypothesis import HealthCheck, Phase, strategies
from law import Call, judge

TARGETS: dict[str, Callable[[Draw], Call]] = {
    **of_rose.TARGETS,
    **of_embedding.TARGETS,
    **of_attention.TARGETS,
    **of_operators.TARGETS,
    **of_layers.TARGETS,
    **of_models.TARGETS,
}

CASE_SECONDS = 60  # a case that takes longer hangs; most take milliseconds
MORE_MEMORY = 3 * 2**30  # what cases may add to the address space of a process with everything imported


def play(targets: Sequence[str], seed: int, cases: int, folder: Path) -> None:
    """Draw cases of targets; writes a line of results for every target, and beside them the case at hand."""
    torch.set_num_threads(1)
    with (folder / "case.txt").open("w") as at_hand, (folder / "results.jsonl").open("a") as results:

        def report(words: str) -> None:
            faulthandler.dump_traceback_later(CASE_SECONDS, exit=True)
            at_hand.seek(0)
            at_hand.truncate()
            at_hand.write(words)
            at_hand.flush()

        for name in targets:  # everything imported, and kernels checked
            run(name, seed, 1, report)
        _limit_memory()
        for name in targets:
            counts, fault = run(name, seed, cases, report)
            faulthandler.cancel_dump_traceback_later()
            line = {"target": name, "served": counts[Verdict.SERVE], "refused": counts[Verdict.REFUSE], "fault": fault}
            results.write(json.dumps(line) + "\n")
            results.flush()


def run(name: str, seed: int, cases: int, report: Callable[[str], None]) -> tuple[Counter[Verdict], str]:
    """Cases of one target: how many were served and refused, and the smallest fault, or nothing."""
    counts: Counter[Verdict] = Counter()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        database=None,
        deadline=None,
        max_examples=cases,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
    )
    @hypothesis.given(strategies.data())
    def obey(data: Any) -> None:
        d = Draw(data)
        torch.manual_seed(0)
        counts[judge(TARGETS[name](d), d, report)] += 1

    try:
        obey()
    except Exception as problem:
        return counts, told(problem)
    return counts, ""


def told(problem: BaseException) -> str:
    """What went wrong, and where in the packages."""
    lines = [f"{type(problem).__name__}: {str(problem)[:1000]}"]
    cause = problem.__cause__
    if cause is not None:
        lines.append(f"  because of {type(cause).__name__}: {str(cause)[:400]}")
    frames = traceback.extract_tb((cause or problem).__traceback__)
    lines += [f"  {frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" for frame in frames[-4:]]
    return "\n".join(lines)


def _limit_memory() -> None:
    """Let the system refuse what is out of proportion, instead of handing out pages until it kills."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MORE_MEMORY, used + MORE_MEMORY))
