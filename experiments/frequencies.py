"""C: which wave vectors? Directions, learned or fixed, how many channels, which band; how far learned ones drift."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from networks import ours
from positions import FREQUENCIES, Spacing, Told, drift, wave_vectors
from RoSE import augment_coordinates
from runs import Run
from scores import mean_iou
from spacing import SETS_OF
from training import train

STEPS = 400
SETS = ("radii, mixed", "axons and myelin")
NM = "axons and myelin, in nm"
UNITS = ("axons and myelin", NM)
ONE_RATE = "mixed, one rate for all weights"
RESCALED = "mixed, coordinates rescaled (DINOv3)"
MOST_RESCALED = 2.0
"""The largest factor; DINOv3's."""


class Rescaling:
    """One log-uniform factor for all axes at every call: ``RoSE.augment_coordinates(rescale=2)`` of a whole batch."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self) -> float:
        """The next factor."""
        points = augment_coordinates(torch.ones(1, 1), rescale=MOST_RESCALED, generator=self.generator)
        return float(points)


def runs(steps: int = STEPS) -> list[Run]:
    """Three seeds."""
    named = [(d, m) for d in SETS for m in (*FREQUENCIES, RESCALED)]
    named += [(d, ONE_RATE) for d in UNITS] + [(NM, "mixed, learned")]
    return [Run("frequencies", d, m, s, steps) for s in range(3) for d, m in named]


def do(run: Run, data: Path | None) -> dict[str, Any]:
    """Train and score."""
    material = SETS_OF[run.data.split(",")[0]](run.data, data)
    torch.manual_seed(run.seed)
    unit = 1000 if run.data == NM else 1
    options = FREQUENCIES.get(run.method, {})
    network = ours(len(material.side), tuple(unit * s for s in material.spacing), **options)
    before = wave_vectors(network)
    rescaling = Rescaling(run.seed) if run.method == RESCALED else None

    def tell(_: tuple[int, ...], spacing: Spacing) -> Spacing:
        factor = rescaling() if rescaling is not None and network.training else 1.0
        return tuple(factor * unit * s for s in spacing)

    told = Told(network, tell)
    seconds = train(told, material.draw, run.steps, run.seed, groups=run.method != ONE_RATE)
    scores = {name: mean_iou(told, pictures, material.side) for name, pictures in material.tested.items()}
    return {"scores": scores, "drift": drift(network, before), "seconds per step": seconds}
