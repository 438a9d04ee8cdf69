"""What passes from one part of a network to the next."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from RoSE import Grid
from torch import Tensor, nn

CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Tokens(NamedTuple):
    """Tokens, where they lie, and which of them are real."""

    x: Tensor
    """(B, N, C), row-major over the grid."""
    grid: Grid
    """Their grid in the frame of the image, whose first pixel lies at 0."""
    valid: Tensor | None
    """(B, N) boolean, false for padding; None for all."""


def blanked(x: Tensor, valid: Tensor | None) -> Tensor:
    """Rows (B, N, C) with 0 where they are not valid (B, N)."""
    return x if valid is None else x.masked_fill(~valid.unsqueeze(-1), 0.0)


def as_image(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Rows (B, N, C) of a grid -> (B, C, *grid), as convolutions take them."""
    return torch.unflatten(x.transpose(1, 2), 2, shape)


def as_rows(image: Tensor) -> Tensor:
    """(B, C, *grid) -> rows (B, N, C)."""
    return image.flatten(2).transpose(1, 2)
