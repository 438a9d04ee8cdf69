"""Linear interpolation on a grid of any number of dimensions, and its adjoint."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor


def interpolate(values: Tensor, positions: Tensor, shape: Sequence[int]) -> Tensor:
    """Read values of a grid at fractional positions.

    Args:
        values: (B, H, M, C), row-major over ``shape``.
        positions: (B, H, K, ndim) in grid steps; clamped into the grid. Differentiable.
        shape: sizes of the grid, product M.

    Returns:
        (B, H, K, C): the mean of the 2^ndim surrounding points, weighted by closeness.
    """
    total: Tensor | None = None
    for index, weight in corners(positions, shape):
        rows = index.unsqueeze(-1).expand(*index.shape, values.shape[-1])
        part = weight.to(values.dtype).unsqueeze(-1) * values.gather(2, rows)
        total = part if total is None else total + part
    return cast(Tensor, total)


def spread(values: Tensor, positions: Tensor, shape: Sequence[int]) -> Tensor:
    """Add values at fractional positions to a grid: the adjoint of :func:`interpolate`.

    Args:
        values: (B, H, K, C).
        positions: (B, H, K, ndim) in grid steps; clamped into the grid. Differentiable.
        shape: sizes of the grid, product M.

    Returns:
        (B, H, M, C).
    """
    batch, heads, _, channels = values.shape
    total = values.new_zeros(batch, heads, torch.Size(shape).numel(), channels)
    for index, weight in corners(positions, shape):
        rows = index.unsqueeze(-1).expand(*index.shape, channels)
        total = total.scatter_add(2, rows, weight.to(values.dtype).unsqueeze(-1) * values)
    return total


def corners(positions: Tensor, shape: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Flat index and weight, both (B, H, K), of each of the 2^ndim points of the grid around every position."""
    lower, fraction = [], []
    for axis, size in enumerate(shape):
        position = positions[..., axis].clamp(0, size - 1)
        # The last point has no upper neighbour: it is reached as fraction 1 of the last but one.
        floor = position.detach().floor().clamp(max=max(size - 2, 0))
        lower.append(floor.long())
        fraction.append(position - floor)
    for corner in itertools.product((0, 1), repeat=len(shape)):
        index: Tensor | int = 0
        weight: Tensor | float = 1.0
        for axis, (upper, size) in enumerate(zip(corner, shape, strict=True)):
            step = min(upper, size - 1)
            index = index * size + lower[axis] + step
            weight = weight * (fraction[axis] if upper else 1 - fraction[axis])
        yield cast(Tensor, index), cast(Tensor, weight)
