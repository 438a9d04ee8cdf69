"""Experiments: what grouping, spacing and frequencies are good for.

    python experiments/main.py --data DIR
    python experiments/main.py --only masks --steps 2 --results trial     # does it run?

Results are added to experiments/results as they come; what is there is not done again. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "examples"))

import frequencies
import masks
import spacing
from runs import RESULTS, Run, complete
from shapes import FAMILIES

EXPERIMENTS = {"masks": masks, "spacing": spacing, "frequencies": frequencies}


def main(
    arguments: Sequence[str] | None = None, experiments: Mapping[str, Any] = EXPERIMENTS
) -> dict[Run, dict[str, Any]]:
    """Do what is missing; returns all results that were asked for."""
    parser = argparse.ArgumentParser(description="Run what has not been run yet.")
    add = parser.add_argument
    add("--data", type=Path, help="folder of real images; without it, only images that are made")
    add("--only", nargs="+", choices=sorted(experiments), default=list(experiments), help="(default: all)")
    add("--seeds", type=int, default=5, help="at the most (default: %(default)s)")
    add("--steps", type=int, help="of training, in place of each experiment's own")
    add("--processes", type=int, default=2, help="of one thread each (default: %(default)s)")
    add("--results", type=Path, default=RESULTS, help="folder (default: beside this program)")
    options = parser.parse_args(arguments)
    results = {}
    for name in options.only:
        module = experiments[name]
        runs = [run for run in module.runs(options.steps or module.STEPS) if run.seed < options.seeds]
        if options.data is None:
            runs = [run for run in runs if run.data.split(",")[0] in FAMILIES]
        results |= complete(runs, module.do, options.data, options.results, options.processes)
    return results


if __name__ == "__main__":
    main()
