"""Values between the points of a grid."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Fine points of a coarse one up to which each is worked out by itself, which a processor does fastest. Of more of them
# a GPU would wait for the launches.
FEW = 8


def interpolate(
    values: Tensor, valid: Tensor | None, shape: Sequence[int], stride: Sequence[int], offset: Sequence[float]
) -> Tensor:
    """Interpolate linearly along every axis from a coarse grid to a fine one.

    Coarse point j lies at ``offset + stride * j``, in steps of the fine grid. Beyond the outermost points, and
    towards points that are not valid, the nearest ones go on: every result is a convex combination of valid values.

    Args:
        values: (B, *coarse, C), 0 where they are not valid.
        valid: (B, *coarse) boolean, or None for all.
        shape: points of the fine grid, per axis, at most ``stride`` times those of the coarse one.
        stride: fine points per coarse one, per axis.
        offset: where the first coarse point lies, per axis, in [0, stride).

    Returns:
        (B, *shape, C); 0 where no point nearby is valid.
    """
    if valid is not None:
        share = interpolate(valid.unsqueeze(-1).to(values.dtype), None, shape, stride, offset)
        total = interpolate(values, None, shape, stride, offset)
        return total / share.masked_fill(share == 0, 1.0)
    for dim, (n, s, o) in enumerate(zip(shape, stride, offset, strict=True), 1):
        if s > 1 or o > 0 or n != values.shape[dim]:
            values = _along(values, dim, n, s, o)
    return values


def _along(values: Tensor, dim: int, n: int, stride: int, offset: float) -> Tensor:
    """Interpolate along one axis.

    Fine point ``stride * j + p`` lies between coarse point j and the one before, if p is below the offset, or the one
    after. So nothing is looked up by an index: a GPU adds what comes back to one entry by entry.
    """
    m = values.shape[dim]
    padded = torch.cat((values.narrow(dim, 0, 1), values, values.narrow(dim, m - 1, 1)), dim)
    before, here, after = (padded.narrow(dim, first, m).unsqueeze(dim + 1) for first in range(3))
    if stride <= FEW:
        shares = [(p - offset) / stride for p in range(stride)]
        parts = [torch.lerp(here, before if share < 0 else after, abs(share)) for share in shares]
    else:
        exact, split = torch.promote_types(values.dtype, torch.float32), math.ceil(offset)
        away = (torch.arange(stride, device=values.device, dtype=exact) - offset).abs() / stride
        away = away.to(values.dtype).reshape(stride, *(1,) * (values.ndim - dim - 1))
        sides = (before, away[:split]), (after, away[split:])
        parts = [torch.lerp(here, side, share) for side, share in sides if len(share)]
    fine = torch.cat(parts, dim + 1).flatten(dim, dim + 1)
    # A view would tell a compiler whether its end is the whole's, and bind what it compiles to sizes of that kind.
    cut = torch.narrow_copy if torch.compiler.is_compiling() else torch.narrow
    return cut(fine, dim, 0, n)
