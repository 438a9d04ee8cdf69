"""C: which wave vectors? Directions, learned or fixed, how many channels, which band; how far learned ones drift."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from networks import ours
from positions import FREQUENCIES, drift, wave_vectors
from runs import Run
from scores import mean_iou
from spacing import SETS_OF
from torch import nn
from training import train

STEPS = 400
SETS = ("radii, mixed", "axons and myelin")


def runs(steps: int = STEPS) -> list[Run]:
    """Three seeds."""
    return [Run("frequencies", d, m, s, steps) for s in range(3) for d in SETS for m in FREQUENCIES]


def do(run: Run, data: Path | None) -> dict[str, Any]:
    """Train and score."""
    material = SETS_OF[run.data.split(",")[0]](run.data, data)
    torch.manual_seed(run.seed)
    network: nn.Module = ours(len(material.side), material.spacing, **FREQUENCIES[run.method])
    before = wave_vectors(network)
    seconds = train(network, material.draw, run.steps, run.seed)
    scores = {name: mean_iou(network, pictures) for name, pictures in material.tested.items()}
    return {"scores": scores, "drift": drift(network, before), "seconds per step": seconds}
