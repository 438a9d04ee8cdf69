"""Which axes to coarsen when, from the spacing of the voxels alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from RoSE.validation import require_int, require_numbers, require_shape


class StemPlan(NamedTuple):
    """Strides and kernels of a network; ``GroupingViT(..., **plan(...).with_stem()._asdict())``."""

    stem_stride: tuple[int, ...]
    """Pixels per token of the first stage, per axis."""
    strides: tuple[tuple[int, ...], ...]
    """Of every grouping, per axis."""
    kernels: tuple[tuple[int, ...], ...]
    """Of every grouping's convolution, per axis."""


class Plan(NamedTuple):
    """Strides and kernels of every level, per axis."""

    strides: tuple[tuple[int, ...], ...]
    """2 where an axis is coarsened, else 1."""
    kernels: tuple[tuple[int, ...], ...]
    """3 where an axis is coarsened, else 1."""

    def with_stem(self, levels: int = 2) -> StemPlan:
        """Let the stem take the first ``levels`` in one step, as patches.

        Raises:
            TypeError: ``levels`` is no int.
            ValueError: ``levels`` is below 0, or no level is left for a grouping.
        """
        if require_int("levels", levels, minimum=0) >= len(self.strides):
            raise ValueError(f"levels must be below the {len(self.strides)} levels of the plan; got {levels}")
        axes = range(len(self.strides[0]))
        stem = tuple(math.prod(stride[axis] for stride in self.strides[:levels]) for axis in axes)
        return StemPlan(stem, self.strides[levels:], self.kernels[levels:])


def plan(spacing: float | Sequence[float], size: int | Sequence[int], levels: int) -> Plan:
    """Coarsen axes so that voxels become as isotropic as factors of two can make them.

    On every level an axis is coarsened, by 2 with a kernel of 3, while its spacing is below twice the finest;
    a coarser one waits until the others have caught up (what nnU-Net does by rules of its own,
    doi:10.1038/s41592-020-01008-z). An axis with a single voxel has no spacing and is left alone.

    Args:
        spacing: physical distance between voxels; a number, or one per axis.
        size: voxels along each axis of a typical image or crop.
        levels: how many times to coarsen.

    Returns:
        Strides and kernels, one tuple per level.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a spacing is not positive, a size or ``levels`` below 1, or there is not one spacing per axis.
    """
    sizes = list(require_shape("size", size))
    steps = list(require_numbers("spacing", spacing, len(sizes), positive=True))
    strides = []
    for _ in range(require_int("levels", levels, minimum=1)):
        finest = min((d for d, n in zip(steps, sizes, strict=True) if n > 1), default=math.inf)
        stride = tuple(2 if n > 1 and d < 2 * finest else 1 for d, n in zip(steps, sizes, strict=True))
        steps = [d * s for d, s in zip(steps, stride, strict=True)]
        sizes = [-(-n // s) for n, s in zip(sizes, stride, strict=True)]
        strides.append(stride)
    return Plan(tuple(strides), tuple(tuple(3 if s == 2 else 1 for s in stride) for stride in strides))
