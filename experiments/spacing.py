"""B: what is knowing the spacing good for? Trained at some spacings, tested at others, beside resampling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import images
import numpy as np
import torch
from images import HELD_OUT, Picture, averaged, axons, crops, resized
from positions import PHYSICAL, POSITIONS, RESAMPLED
from runs import Run
from scores import mean_iou
from shapes import batch, picture
from torch import nn
from training import Batch, train

STEPS = 400
SPACINGS = (0.5, 0.75, 1.0, 1.5, 2.0)  # of made images; trained at 1
SLICES = (1, 2, 3, 4)  # that are averaged into one
ZOOMS = (0.6, 2.0)  # of crops, where training sees more than one
TESTED = 24  # made images of a spacing
LONGER = "hippocampus, mixed, three times the steps"
METHODS = {
    "radii": POSITIONS,
    "radii, mixed": POSITIONS | RESAMPLED,
    "axons and myelin": POSITIONS,
    "axons and myelin, zoomed": POSITIONS | RESAMPLED,
    "hippocampus": POSITIONS,
    "hippocampus, mixed": POSITIONS | RESAMPLED,
    # Why resampling wins: with less and less of what differs between thick and thin slices.
    LONGER: {"RoSE": POSITIONS["RoSE"]} | PHYSICAL | {m: b for m, b in RESAMPLED.items() if m.startswith("RoSE")},
}


def runs(steps: int = STEPS) -> list[Run]:
    """Three seeds."""
    at = {LONGER: 3 * steps}
    named = [(d, m) for d, methods in METHODS.items() for m in methods]
    return [Run("spacing", d, m, s, at.get(d, steps)) for s in range(3) for d, m in named]


def do(run: Run, data: Path | None) -> dict[str, Any]:
    """Train at the spacings of training; score at every other, as it is and resampled."""
    material = SETS_OF[run.data.split(",")[0]](run.data, data)
    torch.manual_seed(run.seed)
    return measured(METHODS[run.data][run.method](len(material.side), material.spacing), material, run)


def measured(network: nn.Module, material: Material, run: Run) -> dict[str, Any]:
    """What a network has learned of a material after the steps of a run."""
    seconds = train(network, material.draw, run.steps, run.seed)
    scores = {}
    for name, pictures in material.tested.items():
        scores[name] = mean_iou(network, pictures, material.side)
        scores[f"{name}, resampled"] = mean_iou(network, pictures, material.side, material.spacing)
    return {"scores": scores, "seconds per step": seconds}


class Material(NamedTuple):
    """What is trained on and tested."""

    draw: Callable[[np.random.Generator], Batch]
    """Crops of one of the spacings of training."""
    tested: dict[str, list[Picture]]
    side: tuple[int, ...]
    """Of the crops."""
    spacing: tuple[float, ...]
    """What positions are scaled on, and tested images are resampled to."""


def _of_crops(
    seen: list[list[Picture]], tested: dict[str, list[Picture]], side: tuple[int, ...], number: int
) -> Material:
    """Pictures of every spacing of training in turn, by chance."""
    reference = seen[0][0].spacing

    def draw(rng: np.random.Generator) -> Batch:
        pictures = seen[int(rng.integers(len(seen)))]
        # As large in physical units: thick slices are fewer.
        size = [round(n * r / s) for n, r, s in zip(side, reference, pictures[0].spacing, strict=True)]
        return crops(pictures, size, number, rng)

    return Material(draw, tested, side, reference)


def _radii(name: str, data: Path | None) -> Material:
    tested = {}
    for at in SPACINGS:
        rng = np.random.default_rng(10**6)  # the same scenes at every spacing
        tested[f"spacing {at:g}"] = [picture("radii", rng, at) for _ in range(TESTED)]
    at_training = SPACINGS if name.endswith("mixed") else (1.0,)
    return Material(lambda rng: batch("radii", rng, 4, float(rng.choice(at_training))), tested, (96, 96), (1.0, 1.0))


def _axons(name: str, data: Path | None) -> Material:
    """Trained on animals of 0.1 um, "zoomed" on crops that are resampled too; tested on all others, each for itself."""
    assert data is not None, "--data must be a folder for real images"
    seen: list[Picture] = []
    tested: dict[str, list[Picture]] = {}
    for p in axons(data).values():
        if p.spacing[0] == 0.1 and p.name != HELD_OUT:
            seen.append(p)
        else:
            tested.setdefault(f"{p.name}, {p.spacing[0]:g} um", []).append(_middle(p, 768))
    material = _of_crops([seen], tested, (96, 96), 4)
    if not name.endswith("zoomed"):
        return material

    def draw(rng: np.random.Generator) -> Batch:
        side = round(96 * np.exp(rng.uniform(*np.log(ZOOMS))))
        return resized(crops(seen, (side, side), 4, rng), 96)

    return material._replace(draw=draw)


def hippocampus(name: str, data: Path | None) -> Material:
    """Every fourth is tested, with slices averaged along the first axis; "mixed" is trained on all of them."""
    assert data is not None, "--data must be a folder for real images"
    pictures = images.hippocampus(data)
    seen = [p for i, p in enumerate(pictures) if i % 4]
    unseen = pictures[::4]
    kinds = SLICES if "mixed" in name else (1,)
    tested = {f"{n} mm": [averaged(p, n, 0) for p in unseen] for n in SLICES}
    return _of_crops([[averaged(p, n, 0) for p in seen] for n in kinds], tested, (32, 32, 32), 2)


def _middle(picture: Picture, most: int) -> Picture:
    place = tuple(slice((n - min(n, most)) // 2, (n + min(n, most)) // 2) for n in picture.labels.shape)
    return picture._replace(image=picture.image[(slice(None), *place)], labels=picture.labels[place])


SETS_OF = {"radii": _radii, "axons and myelin": _axons, "hippocampus": hippocampus}
