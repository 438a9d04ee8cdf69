"""C: which wave vectors? Directions, learned or fixed, how many channels, which band; how far learned ones drift."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import spacing as of_spacing
import torch
from images import crops
from networks import ours
from positions import FREQUENCIES, drift, wave_vectors
from runs import Run
from scores import mean_iou
from shapes import picture
from torch import nn
from training import Batch, train

STEPS = 500
SETS = ("radii, mixed", "axons and myelin")


def runs(steps: int = STEPS) -> list[Run]:
    """Three seeds."""
    return [Run("frequencies", d, m, s, steps) for s in range(3) for d in SETS for m in FREQUENCIES]


def do(run: Run, data: Path | None) -> dict[str, Any]:
    """Train and score."""
    seen, tested, side, number = of_spacing.SETS_OF[run.data.split(",")[0]](run.data, data)
    spacing = seen[0][0].spacing if seen else (1.0, 1.0)
    torch.manual_seed(run.seed)
    network: nn.Module = ours(len(side), spacing, **FREQUENCIES[run.method])
    before = wave_vectors(network)

    def draw(rng: np.random.Generator) -> Batch:
        if seen:
            return crops(seen[0], side[0], number, rng)
        at = float(rng.choice(of_spacing.SPACINGS))
        drawn = [picture("radii", rng, at) for _ in range(number)]
        return Batch(torch.stack([p.image for p in drawn]), torch.stack([p.labels for p in drawn]), drawn[0].spacing)

    seconds = train(network, draw, run.steps, run.seed)
    scores = {name: mean_iou(network, pictures) for name, pictures in tested.items()}
    return {"scores": scores, "drift": drift(network, before), "seconds per step": seconds}
