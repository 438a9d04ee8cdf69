"""Runs that are done once: each has a name, each result a line in a file, and what is missing is done by processes."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Run:
    """One training and what is measured of it.

    Args:
        experiment: which question, the name of its module.
        data: what is learned.
        method: what learns.
        seed: of weights and crops.
        steps: of training.
    """

    experiment: str
    data: str
    method: str
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.experiment}: {self.data}, {self.method}, seed {self.seed}, {self.steps} steps"

    @property
    def file(self) -> str:
        """Of the arrays that pictures are drawn from, where there are any."""
        words = f"{self.experiment} {self.data} {self.method} {self.seed} {self.steps}"
        return re.sub("[^a-z0-9]+", "-", words.lower()) + ".npz"


Do = Callable[[Run, Path | None], dict[str, Any]]


def known(folder: Path) -> dict[Run, dict[str, Any]]:
    """Results that are there, by run."""
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            found[Run(**row.pop("run"))] = row
    return found


def complete(
    runs: Sequence[Run], do: Do, data: Path | None, folder: Path = RESULTS, processes: int = 1
) -> dict[Run, dict[str, Any]]:
    """Do the runs that have no result yet; a line is written after each, so nothing is lost when this is stopped.

    Args:
        runs: in the order in which they are begun.
        do: a run and the folder of data to its result, in a process of one thread.
        data: the folder, for those that need one.
        folder: of results.
        processes: that work at the same time.

    Returns:
        The results of all runs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = known(folder)
    missing = [run for run in dict.fromkeys(runs) if run not in results]
    for run, result in tqdm(_done(missing, do, data, processes), total=len(missing), unit="run", disable=None):
        results[run] = result
        write(folder, run, result)
        tqdm.write(f"{run.name}: {json.dumps(result['scores'])}")
    return {run: results[run] for run in runs}


def write(folder: Path, run: Run, result: dict[str, Any]) -> None:
    """Add a line, whoever else writes waits; what is to be shown goes into a file of its own."""
    if arrays := result.pop("shown", None):
        np.savez_compressed(folder / run.file, **arrays)
    with (folder / f"{run.experiment}.jsonl").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps({"run": asdict(run), **result}) + "\n")


def _done(runs: Sequence[Run], do: Do, data: Path | None, processes: int) -> Iterable[tuple[Run, dict[str, Any]]]:
    if processes == 1 or len(runs) < 2:
        for run in runs:
            yield _one((run, do, data))
        return
    with multiprocessing.get_context("spawn").Pool(min(processes, len(runs)), maxtasksperchild=20) as pool:
        yield from pool.imap_unordered(_one, [(run, do, data) for run in runs])


def _one(task: tuple[Run, Do, Path | None]) -> tuple[Run, dict[str, Any]]:
    run, do, data = task
    torch.set_num_threads(1)
    return run, {**do(run, data), "torch": torch.__version__}
