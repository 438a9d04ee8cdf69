"""Linear interpolation on a grid of any number of dimensions that may have holes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor

from ...geometry.lattice import Index, Lattice

# A position that touches valid points with less than this weight sees nothing.
LEAST_WEIGHT = 1e-6


def interpolate(values: Tensor, positions: Tensor, points: Lattice) -> Tensor:
    """Read values of a grid at fractional positions.

    Args:
        values: (B, H, M, C), row-major over the grid; finite also where points are not valid.
        positions: (B, H, K, ndim) in grid steps; held in the box of the valid points. Differentiable.
        points: the grid.

    Returns:
        (B, H, K, C): the mean of the 2^ndim surrounding points, weighted by closeness.
    """
    total: Tensor | None = None
    for index, weight in corners(positions, points):
        rows = index.unsqueeze(-1).expand(*index.shape, values.shape[-1])
        part = weight.to(values.dtype).unsqueeze(-1) * values.gather(2, rows)
        total = part if total is None else total + part
    return cast(Tensor, total)


def touches(places: Tensor, points: Lattice) -> Tensor:
    """Whether there is anything to be seen at places (B, H, N, P, ndim): (B, H, N, P) boolean."""
    # Unless it is known that there is nothing: a position may be NaN.
    around = corners(places.detach().flatten(2, 3), points)
    return torch.stack([~(weight <= 0) for _, weight in around]).any(0).view(places.shape[:-1])


def corners(positions: Tensor, points: Lattice) -> Iterable[tuple[Tensor, Tensor]]:
    """The 2^ndim points around every position, and how near each is.

    Weights sum to 1. Those of points that are not valid are 0 and the others are scaled up; where no valid point is
    touched, all are 0. Gradients of weights that are scaled up are not: they have their direction, and the length that
    they would have were nothing missing, or where a position touches little they would grow without bound.

    Returns:
        Flat index and weight, both (B, H, K), of each corner. Indices are on the grid whatever the positions; where
        those are NaN, so are the weights.
    """
    around = _around(positions, points)
    if points.valid is None:
        return around
    held = points.valid.unsqueeze(1).expand(-1, positions.shape[1], -1)
    kept = [(index, weight * held.gather(2, index)) for index, weight in around]
    total = torch.stack([weight for _, weight in kept]).sum(0)
    nothing = total < LEAST_WEIGHT
    scaled = [(index, _scaled_up(weight, total.masked_fill(nothing, 1.0))) for index, weight in kept]
    return [(index, weight.masked_fill(nothing, 0.0)) for index, weight in scaled]


def _scaled_up(weight: Tensor, total: Tensor) -> Tensor:
    """``weight / total``, and ``total`` times its gradient."""
    share = (weight / total).detach()
    return with_gradient_of(share, weight - share * total)


def with_gradient_of(value: Tensor, other: Tensor) -> Tensor:
    """A value as it is, whose gradient is its own and that of another."""
    return value + (other - other.detach())


def held(x: Tensor, low: Index, high: Index) -> Tensor:
    """``x`` between two bounds, with its whole gradient on them too; NaN stays.

    Of ``clamp`` that is so up to torch 2.13: points that start on the border of the grid would not move from there.
    """
    nearest = x.detach().clamp(low, high)  # type: ignore[arg-type]
    return torch.where(x == nearest, x, nearest)


def _around(positions: Tensor, points: Lattice) -> Iterator[tuple[Tensor, Tensor]]:
    lower, fraction = [], []
    for axis, (first, last) in enumerate(points.box):
        position = held(positions[..., axis], first, last)
        # The last point has no upper neighbour: it is reached as fraction 1 of the last but one.
        last_but_one = max(last - 1, first) if isinstance(last, int) else (last - 1).clamp(min=first)
        floor = position.detach().floor().clamp(first, last_but_one)  # type: ignore[arg-type]
        lower.append(floor.nan_to_num(0.0).long())
        fraction.append(position - floor)
    for corner in itertools.product((0, 1), repeat=len(points.shape)):
        index: Index = 0
        weight: Tensor | float = 1.0
        for axis, (upper, size) in enumerate(zip(corner, points.shape, strict=True)):
            along = (lower[axis] + upper).clamp(max=points.box[axis][1])
            index = index * size + along
            weight = weight * (fraction[axis] if upper else 1 - fraction[axis])
        yield cast(Tensor, index), cast(Tensor, weight)
