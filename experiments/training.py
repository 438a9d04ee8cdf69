"""One recipe for everything that is compared: the same crops, steps, optimiser and learning rate."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from RoSE import frequency_groups
from segmentation.losses import class_losses
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.01
CLIP = 1.0


class Batch(NamedTuple):
    """Crops of one spacing: images (B, C, *size), classes (B, *size), and the distance of pixels per axis."""

    images: Tensor
    labels: Tensor
    spacing: tuple[float, ...]


def train(
    network: nn.Module, draw: Callable[[Generator], Batch], steps: int, seed: int, *, groups: bool = True
) -> float:
    """Train; returns the median of the steps' processor time, in seconds.

    Args:
        network: images and spacing to logits.
        draw: crops from random numbers.
        steps: how many batches.
        seed: of the crops: methods with the same seed see the same ones.
        groups: whether wave vectors have rates of their own; else they are weights like all others.
    """
    rng = np.random.default_rng(seed)
    waves = frequency_groups(network, LEARNING_RATE) if groups else []
    grouped = {id(p) for group in waves for p in group["params"]}
    weights = [p for p in network.parameters() if id(p) not in grouped]
    optimiser = torch.optim.AdamW([{"params": weights}, *waves], LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    rates = [group["lr"] for group in optimiser.param_groups]
    schedule = OneCycleLR(optimiser, rates, total_steps=steps, pct_start=0.1)
    network.train()
    seconds = []
    for _ in range(steps):
        batch = draw(rng)
        start = time.process_time()
        loss = _loss(network(batch.images, batch.spacing), batch.labels)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, CLIP)
        optimiser.step()
        schedule.step()
        seconds.append(time.process_time() - start)
    network.eval()
    return float(np.median(seconds))


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy and Dice; with the first alone no method learns much of borders, which are few pixels."""
    return class_losses(logits, labels, torch.ones_like(labels, dtype=torch.bool), lambda total: total)["total"]


def vary(image: Tensor, labels: Tensor, spacing: tuple[float, ...], rng: Generator) -> tuple[Tensor, Tensor]:
    """Mirror at random, turn by right angles where axes are alike, and re-light: (C, *size) and (*size)."""
    axes = labels.ndim
    for axis in range(axes):
        if rng.random() < 0.5:
            image, labels = image.flip(axis + 1), labels.flip(axis)
    if spacing[-1] == spacing[-2] and labels.shape[-1] == labels.shape[-2]:
        turns = int(rng.integers(4))
        image, labels = torch.rot90(image, turns, (-2, -1)), torch.rot90(labels, turns, (-2, -1))
    return image * float(rng.uniform(0.7, 1.3)) + float(rng.uniform(-0.3, 0.3)), labels
