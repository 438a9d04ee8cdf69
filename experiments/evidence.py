"""Write the tables and pictures of docs/evidence from the committed results alone.

``python experiments/evidence.py``: what stands between ``<!-- NAME -->`` and ``<!-- end -->`` is replaced.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "tools"))
sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "examples"))

import evidence_pictures as pictures
import evidence_tables as tables
from evidence_tables import Results
from frequencies import NM
from main import EXPERIMENTS
from masks import MADE
from reporting import fill
from runs import RESULTS, known
from spacing import METHODS, SLICES, SPACINGS

PAGES = Path(__file__).parents[1] / "docs" / "evidence"

CLASSES = ("mIoU", "Dice", "boundary F")
OBJECTS = ("AP@0.5", "AP@0.75", "foreground IoU")
STAGES = ("stage 1", "SLIC, as stage 1", "stage 2", "SLIC, as stage 2")

# By page and name, what a block says.
BLOCKS: dict[str, dict[str, Callable[[Results], str]]] = {
    "masks": {
        "sizes": lambda r: tables.sizes(r, "masks"),
        "nuclei": lambda r: tables.scores(r, "masks", "nuclei", (*OBJECTS, *CLASSES)),
        "axons": lambda r: tables.scores(r, "masks", "axons and myelin", CLASSES),
        "made classes": lambda r: tables.across(r, "masks", MADE, "mIoU"),
        "made boundaries": lambda r: tables.across(r, "masks", MADE, "boundary F"),
        "touching cells": lambda r: tables.scores(r, "masks", "touching cells", OBJECTS),
        "differences": tables.differences,
        "segments": lambda r: tables.segments(r, STAGES),
    },
    "spacing": {name.replace(",", ""): partial(tables.at_spacings, experiment="spacing", data=name) for name in METHODS}
    | {
        "primus": lambda r: tables.at_spacings(r, "primus", "hippocampus"),
        "primus mixed": lambda r: tables.at_spacings(r, "primus", "hippocampus, mixed"),
    },
    "frequencies": {
        "made": lambda r: tables.frequencies(r, "radii, mixed"),
        "axons": lambda r: tables.frequencies(r, "axons and myelin"),
        "nanometres": lambda r: tables.frequencies(r, NM),
    },
}


def recorded(folder: Path = RESULTS) -> Results:
    """Results of the runs that the experiments are made of; others, of fewer steps say, are trials."""
    wanted = {run for module in EXPERIMENTS.values() for run in module.runs(module.STEPS)}
    found = known(folder)
    return tables.by_method({run: found[run] for run in found if run in wanted or run.experiment == "primus"})


def render(name: str, results: Results) -> str:
    """A page with every marked block as the results have it."""
    return fill((PAGES / f"{name}.md").read_text(), lambda block: BLOCKS[name][block](results) or tables.NOT_YET)


def draw(results: Results, folder: Path) -> None:
    """Pictures of what was recorded."""
    pictures.predictions(RESULTS, folder / "predictions.png")
    pictures.segments(RESULTS, folder / "segments.png")
    x = {name: [f"spacing {s:g}" for s in SPACINGS] for name in ("radii", "radii, mixed")}
    x |= {name: [f"{n} mm" for n in SLICES] for name in ("hippocampus", "hippocampus, mixed")}
    pictures.over_spacing(results, x, folder / "spacing.png")


def main() -> None:
    """Fill the pages and draw the pictures."""
    results = recorded()
    for name in BLOCKS:
        (PAGES / f"{name}.md").write_text(render(name, results))
    draw(results, PAGES)


if __name__ == "__main__":
    main()
