"""Where tokens and groups lie, in whole numbers, and patches of their grids that lie near to each other."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ...geometry import Neighbourhood, remembered

# Largest whole number up to which bfloat16 has every one.
WHOLE = 256


# Views of so many points are remembered: for small grids, making them takes longer than attention.
SMALL = 4096


class Patch(NamedTuple):
    """A part of a grid."""

    shape: tuple[int, ...]
    """Of the whole grid."""
    where: tuple[tuple[int, int], ...]
    """First index of every axis, and the one behind the last."""

    @property
    def points(self) -> int:
        """How many."""
        return math.prod(end - begin for begin, end in self.where)

    def rows(self, x: Tensor) -> Tensor:
        """The patch's rows of (B, H, N[, C]): (B, H, L[, C])."""
        return self.of(x).flatten(2, 1 + len(self.shape))

    def of(self, x: Tensor) -> Tensor:
        """The same as a view, (B, H, *patch[, C])."""
        return torch.unflatten(x, 2, self.shape)[(slice(None), slice(None), *(slice(*ends) for ends in self.where))]


class Side(NamedTuple):
    """Tokens or groups: a grid whose points lie on whole numbers, in units of half a token's spacing."""

    shape: tuple[int, ...]
    starts: tuple[int, ...]
    """Place of the first point, axis by axis."""
    steps: tuple[int, ...]
    """From one point to the next."""
    patches: tuple[Patch, ...]
    """The grid, cut so that no patch is too large."""

    def places(
        self, patch: Patch, origin: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, ...]:
        """Places of a patch's points as seen from an origin, axis by axis: (points,) each."""
        columns = [
            torch.arange(*ends, dtype=dtype, device=device) * step + (start - seen_from)
            for ends, step, start, seen_from in zip(patch.where, self.steps, self.starts, origin, strict=True)
        ]
        return tuple(column.flatten() for column in torch.meshgrid(*columns, indexing="ij"))

    def middle(self, patch: Patch) -> tuple[int, ...]:
        """Place of the point in the middle of a patch."""
        axes = zip(patch.where, self.steps, self.starts, strict=True)
        return tuple(sum(ends) // 2 * step + start for ends, step, start in axes)

    def near(self, patch: Patch, other: Side, distances: tuple[float, ...]) -> Patch:
        """The patch of the other side whose points may be within a distance, given per axis, of the patch's."""
        near = []
        for axis, ((begin, end), farthest) in enumerate(zip(patch.where, distances, strict=True)):
            n, start, step = other.shape[axis], other.starts[axis], other.steps[axis]
            first, last = (self.starts[axis] + i * self.steps[axis] for i in (begin, end - 1))
            low = max(0, math.ceil(max(first - farthest - start, 0) / step))
            high = min(n, math.floor(min(last + farthest - start, n * step) / step) + 1)
            low = min(low, n - 1)
            near.append((low, max(high, low + 1)))
        return Patch(other.shape, tuple(near))


class Sides(NamedTuple):
    """Both sides of a geometry."""

    tokens: Side
    groups: Side
    widths: tuple[int, ...]
    """Group spacings in the units of places, axis by axis."""
    isolation: float
    """Largest squared distance, in units of the group spacing, of a token or a group from the nearest of the other."""


@remembered(256)
def sides_of(neighbourhood: Neighbourhood, reach: float) -> Sides:
    """The tokens and the groups of a geometry, cut into patches.

    Args:
        neighbourhood: the geometry.
        reach: largest squared distance of a patch's points from its middle, in units of the group spacing.
    """
    axes = neighbourhood.axes
    widths = tuple(2 * axis.stride for axis in axes)
    twos, starts = (2,) * len(axes), tuple(-round(2 * axis.centre) for axis in axes)
    tokens = Side(neighbourhood.input_shape, starts, twos, _cut(neighbourhood.input_shape, twos, widths, reach))
    groups = Side(
        neighbourhood.output_shape, (0,) * len(axes), widths, _cut(neighbourhood.output_shape, widths, widths, reach)
    )
    isolation = sum((_isolation(tokens, groups, axis) / width) ** 2 for axis, width in enumerate(widths))
    return Sides(tokens, groups, widths, isolation)


class View(NamedTuple):
    """Two patches as seen from the middle of the first; lengths are in units of the group spacing."""

    x: Tensor
    """Places of the first's points (L, ndim): small whole numbers."""
    y: Tensor
    """Places of the other's (M, ndim), so scaled that <x, y> is in squared group spacings."""
    own: Tensor
    """Squared lengths of the first's, (L,)."""
    others: Tensor
    """Squared lengths of the other's, (M,)."""


def view(
    side: Side,
    other: Side,
    widths: tuple[int, ...],
    patch: Patch,
    near: Patch,
    dtype: torch.dtype,
    device: torch.device,
) -> View:
    """See the patches from the middle of the first."""
    origin = side.middle(patch)
    x, y = side.places(patch, origin, dtype, device), other.places(near, origin, dtype, device)
    own, others = (
        sum(column.square() / width**2 for column, width in zip(places, widths, strict=True)) for places in (x, y)
    )
    scaled = [column / width**2 for column, width in zip(y, widths, strict=True)]
    return View(torch.stack(x, -1), torch.stack(scaled, -1), cast(Tensor, own), cast(Tensor, others))


remembered_view = remembered(64)(view)


def _cut(shape: tuple[int, ...], steps: tuple[int, ...], widths: tuple[int, ...], reach: float) -> tuple[Patch, ...]:
    """As few patches of a grid as ``reach`` allows, whose points have these steps in units of the places."""
    extents = [n * step / width for n, step, width in zip(shape, steps, widths, strict=True)]
    # Places are whole numbers that half types hold.
    counts = [min(n, max(1, math.ceil(n * step / (2 * WHOLE)))) for n, step in zip(shape, steps, strict=True)]
    while sum((extent / count / 2) ** 2 for extent, count in zip(extents, counts, strict=True)) > reach:
        # A patch has a point, however wide a step is.
        divisible = [axis for axis, count in enumerate(counts) if count < shape[axis]]
        if not divisible:
            break
        counts[max(divisible, key=lambda axis: extents[axis] / counts[axis])] += 1
    cuts = [
        list(itertools.pairwise([n * i // count for i in range(count + 1)]))
        for n, count in zip(shape, counts, strict=True)
    ]
    return tuple(Patch(shape, where) for where in itertools.product(*cuts))


def _isolation(a: Side, b: Side, axis: int) -> int:
    """Largest distance of a point from the nearest of the other side, along one axis."""

    def farthest(points: Side, others: Side) -> int:
        n, start, step = others.shape[axis], others.starts[axis], others.steps[axis]
        places = (points.starts[axis] + i * points.steps[axis] for i in range(points.shape[axis]))
        return max(abs(place - start - step * min(max(round((place - start) / step), 0), n - 1)) for place in places)

    return max(farthest(a, b), farthest(b, a))
