"""A: do memberships carry better masks? Grouping beside its uniform twin, a pyramid and a U-Net of equal size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from images import HELD_OUT, Picture, axons, crops, nuclei
from networks import NETWORKS, OTSU, Otsu, size_of
from runs import Run
from scores import of_classes, of_objects, of_picture, of_segments
from shapes import EXTENT, FAMILIES, batch, picture
from training import Batch, train

MADE = ("colours", "forms", "bars", "rings", "touching cells")
REAL = ("nuclei", "axons and myelin")
STEPS = 500  # for real images twice as many
TESTED = 24  # made images
SIDE, NUMBER = 96, 4  # of crops
TILE = (SIDE, SIDE)  # what is predicted at once


def runs(steps: int = STEPS) -> list[Run]:
    """Five seeds of what is made, three of what is real."""
    threshold = [Run("masks", "nuclei", OTSU, 0, 0)]
    made = [Run("masks", d, m, s, steps) for s in range(5) for d in MADE for m in NETWORKS]
    return [Run("masks", d, m, s, 2 * steps) for s in range(3) for d in REAL for m in NETWORKS] + threshold + made


def do(run: Run, data: Path | None) -> dict[str, Any]:
    """Train and score."""
    seen, unseen = (None, of_family(run.data)) if run.data in FAMILIES else _real(run.data, data)
    spacing = unseen[0].spacing
    if run.method == OTSU:
        whole = unseen[0].labels.shape
        return {"scores": of_classes(Otsu(), unseen, whole) | of_objects(Otsu(), unseen, whole)}
    torch.manual_seed(run.seed)
    network = NETWORKS[run.method](2, spacing)
    size = size_of(network, (1, SIDE, SIDE), spacing)

    def draw(rng: np.random.Generator) -> Batch:
        return batch(run.data, rng, NUMBER) if seen is None else crops(seen, (SIDE, SIDE), NUMBER, rng)

    seconds = train(network, draw, run.steps, run.seed)
    scores = of_classes(network, unseen, TILE)
    if unseen[0].objects is not None:
        scores |= of_objects(network, unseen, TILE)
    if run.method.startswith("grouping"):
        scores |= of_segments(network, unseen[:8])
    shown = of_picture(network, unseen[0], TILE) if seen is None and run.seed == 0 else None
    return {"scores": scores, "seconds per step": seconds, "shown": shown, **size}


def of_family(family: str) -> list[Picture]:
    """The made images of a family that are tested."""
    assert round(EXTENT) == SIDE
    rng = np.random.default_rng(10**6)  # far from the seeds of training
    return [picture(family, rng) for _ in range(TESTED)]


def _real(name: str, data: Path | None) -> tuple[list[Picture], list[Picture]]:
    """Every third image of nuclei is tested; of axons an animal of the same pixel size as the others."""
    if data is None:
        raise ValueError("--data must be a folder for real images; got none")
    if name == "nuclei":
        pictures = nuclei(data)
        return [p for i, p in enumerate(pictures) if i % 3], pictures[::3]
    at_tenth = {n: p for n, p in axons(data).items() if p.spacing[0] == 0.1}
    tested = [n for n, p in at_tenth.items() if p.name == HELD_OUT]
    return [p for n, p in at_tenth.items() if n not in tested], [at_tenth[n] for n in tested]
