"""A grid of points of which some may be missing."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Index = Tensor | int


class Lattice(NamedTuple):
    """A grid of points, some of which may be missing; made by :func:`lattice`."""

    shape: tuple[int, ...]
    """Sizes of the grid, product M."""
    valid: Tensor | None
    """(B, M) boolean, false where there is nothing to be seen; None for the whole grid."""
    box: tuple[tuple[Index, Index], ...]
    """First and last index per axis of the smallest box that holds all valid points: ints, or (B, 1, 1)."""


def lattice(shape: tuple[int, ...], valid: Tensor | None = None) -> Lattice:
    """A grid of points, of which (B, M) booleans may say which there are."""
    if valid is None:
        return Lattice(shape, None, tuple((0, size - 1) for size in shape))
    held = torch.unflatten(valid, 1, shape)
    box = []
    for axis, size in enumerate(shape):
        others = [dim for dim in range(1, held.ndim) if dim != axis + 1]
        along = held.any(others) if others else held
        first, last = along.long().argmax(1), size - 1 - along.flip(1).long().argmax(1)
        box.append((first[:, None, None], last[:, None, None]))
    return Lattice(shape, valid, tuple(box))
