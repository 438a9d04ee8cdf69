"""Fuzz every public constructor and forward pass of both packages: ``nox -s fuzz -- [--minutes M] [--cases N]``.

Rounds of cases run in processes of their own, which may use little memory and must answer every case in time: a crash,
a hang and a request of memory without bound end a round, not the program, and are faults like any other. What is
printed of a fault repeats it: ``--seed S --only TARGET`` draws the same cases again.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from rounds import TARGETS, play

ROUND = 40  # cases of a target in one process
PATIENCE = 1200.0  # seconds for a round, beside the limit of every case


def main() -> int:
    """Play rounds until there are enough cases, or no time is left; 1 where the law was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0, help="stop after the round in which they are over")
    parser.add_argument("--cases", type=int, default=10_000, help="stop after the round in which they are reached")
    parser.add_argument("--seed", type=int, default=None, help="of the first round; one that was printed repeats it")
    parser.add_argument("--only", action="append", choices=sorted(TARGETS), help="a target; may be given several times")
    parser.add_argument("--play", type=Path, help=argparse.SUPPRESS)  # what the process of a round is told
    options = parser.parse_args()
    targets = options.only or list(TARGETS)
    if options.play:
        play(targets, options.seed, ROUND, options.play)
        return 0
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    end = time.monotonic() + 60 * options.minutes
    served: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    faults: dict[str, str] = {}
    while targets and time.monotonic() < end and (served.total() + refused.total()) < options.cases:
        for line in _round(targets, seed):
            served[line["target"]] += line["served"]
            refused[line["target"]] += line["refused"]
            if line["fault"]:
                faults[line["target"]] = f"--seed {seed} --only '{line['target']}'\n{line['fault']}"
                print(f"FAULT in {line['target']}: {faults[line['target']]}", flush=True)
        targets = [name for name in targets if name not in faults]  # it would only be found again
        print(f"seed {seed}: {served.total() + refused.total()} cases so far, {len(faults)} faults", flush=True)
        seed += 1
    for name in served | refused:
        print(f"{served[name] + refused[name]:7} cases, {served[name]:6} served  {name}")
    print(f"{served.total() + refused.total():7} cases, {served.total():6} served, {len(faults)} faults")
    return bool(faults)


def _round(targets: list[str], seed: int) -> list[dict]:
    """Cases of every target, in a process for as long as it lives, and in further ones after that."""
    lines: list[dict] = []
    left = list(targets)
    while left:
        with tempfile.TemporaryDirectory() as folder:
            found, last, ended = _process(left, seed, Path(folder))
        lines += found
        left = left[len(found) :]
        if left:
            fault = f"the process ended ({ended}) at: {last}"
            lines.append({"target": left.pop(0), "served": 0, "refused": 0, "fault": fault})
    return lines


def _process(targets: list[str], seed: int, folder: Path) -> tuple[list[dict], str, str]:
    """One process; what it found of the targets it finished, its last case, and how it ended."""
    only = [word for name in targets for word in ("--only", name)]
    command = [sys.executable, __file__, "--play", str(folder), "--seed", str(seed), *only]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        ended = f"code {done.returncode}\n{done.stderr[-4000:]}"
    except subprocess.TimeoutExpired:
        ended = f"it took more than {PATIENCE:.0f} s"
    results, case = folder / "results.jsonl", folder / "case.txt"
    found = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    return found, case.read_text() if case.exists() else "no case", ended


if __name__ == "__main__":
    sys.exit(main())
