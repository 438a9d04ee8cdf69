"""Train a network on crops, and let it look at an image through windows."""

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


def predict(network: nn.Module, upsample: Upsample, image: NDArray[np.float32], window: int) -> NDArray[np.int64]:
    """Class of every pixel: probabilities of overlapping windows, averaged, the middle of a window counting most.

    Windows should be as large as the crops were: how sharply a token chooses depends on how many groups there are to
    choose from, and the last stage chooses among all.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(image))
    size = tuple(min(window, n) for n in image.shape)
    rows, columns = (torch.hann_window(n + 2, periodic=False)[1:-1] for n in size)
    weight = rows[:, None] * columns
    total: Tensor | float = 0.0
    with evaluating(network):
        for place in windows(image.shape, size):
            share = upsample(network(pixels[place][None, None])).softmax(1)[0]
            if isinstance(total, float):
                total = torch.zeros(share.shape[0], *image.shape)
            total[(slice(None), *place)] += share * weight
    assert isinstance(total, Tensor)
    return total.argmax(0).numpy()


def windows(shape: tuple[int, ...], size: tuple[int, ...]) -> list[tuple[slice, slice]]:
    """Windows that cover a grid, evenly spread, neighbours overlapping by half or more."""
    starts = []
    for n, s in zip(shape, size, strict=True):
        hops = -(-(n - s) // max(1, s // 2))
        starts.append([round(i * (n - s) / max(1, hops)) for i in range(hops + 1)])
    return [(slice(y, y + size[0]), slice(x, x + size[1])) for y in starts[0] for x in starts[1]]


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """No gradients, evaluation mode; then back to training."""
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        network.train()
