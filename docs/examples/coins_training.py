"""Train a network on crops, and let it look at an image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from coins_data import Crops
from coins_models import Coarse
from numpy.typing import NDArray
from torch import Tensor, nn

Upsample = Callable[[Coarse], Tensor]

LEARNING_RATE = 3e-3


def train(
    network: nn.Module,
    upsample: Upsample,
    crops: Crops,
    steps: int,
    batch: int,
    on_step: Callable[[float], None],
) -> None:
    """Cross-entropy at every pixel, AdamW, one cycle of the learning rate.

    Args:
        network: image -> :class:`coins_models.Coarse`.
        upsample: brings its answer to the pixels; the loss is taken behind it.
        crops: what it learns from.
        steps: of the optimiser.
        batch: crops per step.
        on_step: told the loss after every step.
    """
    optimiser = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=max(steps, 2), pct_start=0.1)
    for _ in range(steps):
        images, labels = crops.batch(batch)
        loss = F.cross_entropy(upsample(network(images)), labels)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        on_step(loss.item())


def predict(network: nn.Module, upsample: Upsample, image: NDArray[np.float32]) -> NDArray[np.int64]:
    """Class of every pixel of an image of any size, all of it seen at once."""
    with evaluating(network):
        logits = upsample(network(torch.from_numpy(np.ascontiguousarray(image))[None, None]))
    labels: NDArray[np.int64] = logits[0].argmax(0).numpy()
    return labels


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """No gradients, evaluation mode; then back to training."""
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        network.train()
