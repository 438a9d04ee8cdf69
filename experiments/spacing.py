"""B: what is knowing the spacing good for? Trained at some spacings, tested at others, beside resampling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from images import Picture, averaged, axons, crops, hippocampus
from positions import POSITIONS
from runs import Run
from scores import mean_iou
from shapes import picture
from training import Batch, train

STEPS = 500
SPACINGS = (0.5, 0.75, 1.0, 1.5, 2.0)  # of made images; trained at 1
SLICES = (1, 2, 3, 4)  # that are averaged into one
SETS = ("radii", "radii, mixed", "axons and myelin", "hippocampus", "hippocampus, mixed")


def runs(steps: int = STEPS) -> list[Run]:
    """Three seeds."""
    return [Run("spacing", d, m, s, steps) for s in range(3) for d in SETS for m in POSITIONS]


def do(run: Run, data: Path | None) -> dict[str, Any]:
    """Train at the spacings of training; score at every other, as it is and resampled."""
    seen, tested, side, number = SETS_OF[run.data.split(",")[0]](run.data, data)
    dims = len(side)
    spacing = seen[0][0].spacing if seen else (1.0, 1.0)
    torch.manual_seed(run.seed)
    network = POSITIONS[run.method](dims, spacing)

    def draw(rng: np.random.Generator) -> Batch:
        if not seen:
            at = float(rng.choice(SPACINGS)) if run.data.endswith("mixed") else 1.0
            drawn = [picture("radii", rng, at) for _ in range(number)]
            return Batch(
                torch.stack([p.image for p in drawn]), torch.stack([p.labels for p in drawn]), drawn[0].spacing
            )
        return crops(seen[int(rng.integers(len(seen)))], side[0], number, rng)

    seconds = train(network, draw, run.steps, run.seed)
    scores = {}
    for name, pictures in tested.items():
        scores[name] = mean_iou(network, pictures)
        scores[f"{name}, resampled"] = mean_iou(network, pictures, spacing)
    return {"scores": scores, "seconds per step": seconds}


Material = tuple[list[list[Picture]], dict[str, list[Picture]], tuple[int, ...], int]


def _radii(name: str, data: Path | None) -> Material:
    tested = {}
    for at in SPACINGS:
        rng = np.random.default_rng(10**6)  # the same scenes at every spacing
        tested[f"spacing {at:g}"] = [picture("radii", rng, at) for _ in range(12)]
    return [], tested, (96, 96), 4


def _axons(name: str, data: Path | None) -> Material:
    """Trained on animals of 0.1 um; tested on all others, each for itself."""
    assert data is not None, "--data must be a folder for real images"
    seen: dict[str, list[Picture]] = {}
    tested: dict[str, list[Picture]] = {}
    for title, p in axons(data).items():
        if p.spacing[0] == 0.1 and "data11" not in title:
            seen.setdefault("0.1", []).append(p)
        else:
            tested.setdefault(f"{p.name}, {p.spacing[0]:g} um", []).append(_middle(p, 768))
    return list(seen.values()), tested, (96, 96), 4


def _hippocampus(name: str, data: Path | None) -> Material:
    """Every fourth is tested, with slices averaged along the first axis; "mixed" is trained on all of them."""
    assert data is not None, "--data must be a folder for real images"
    pictures = hippocampus(data)
    seen = [p for i, p in enumerate(pictures) if i % 4]
    unseen = pictures[::4]
    kinds = SLICES if name.endswith("mixed") else (1,)
    tested = {f"{n} mm": [averaged(p, n, 0) for p in unseen] for n in SLICES}
    return [[averaged(p, n, 0) for p in seen] for n in kinds], tested, (32, 32, 32), 2


def _middle(picture: Picture, most: int) -> Picture:
    place = tuple(slice((n - min(n, most)) // 2, (n + min(n, most)) // 2) for n in picture.labels.shape)
    return picture._replace(image=picture.image[(slice(None), *place)], labels=picture.labels[place])


SETS_OF = {"radii": _radii, "axons and myelin": _axons, "hippocampus": _hippocampus}
