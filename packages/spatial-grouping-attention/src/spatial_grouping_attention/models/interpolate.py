"""Values between the points of a grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def interpolate(
    values: Tensor, valid: Tensor | None, shape: Sequence[int], stride: Sequence[int], offset: Sequence[float]
) -> Tensor:
    """Interpolate linearly along every axis from a coarse grid to a fine one.

    Coarse point j lies at ``offset + stride * j``, in steps of the fine grid. Beyond the outermost points, and
    towards points that are not valid, the nearest ones go on: every result is a convex combination of valid values.

    Args:
        values: (B, *coarse, C), 0 where they are not valid.
        valid: (B, *coarse) boolean, or None for all.
        shape: points of the fine grid, per axis.
        stride: fine points per coarse one, per axis.
        offset: where the first coarse point lies, per axis.

    Returns:
        (B, *shape, C); 0 where no point nearby is valid.
    """
    if valid is not None:
        share = interpolate(valid.unsqueeze(-1).to(values.dtype), None, shape, stride, offset)
        total = interpolate(values, None, shape, stride, offset)
        return total / share.masked_fill(share == 0, 1.0)
    for dim, (n, s, o) in enumerate(zip(shape, stride, offset, strict=True), 1):
        if s > 1 or n != values.shape[dim]:
            values = _along(values, dim, n, s, o)
    return values


def _along(values: Tensor, dim: int, n: int, stride: int, offset: float) -> Tensor:
    last = values.shape[dim] - 1
    exact = torch.promote_types(values.dtype, torch.float32)
    at = ((torch.arange(n, device=values.device, dtype=exact) - offset) / stride).clamp(0, last)
    before = at.floor()
    share = (at - before).to(values.dtype).reshape(n, *(1,) * (values.ndim - dim - 1))
    first = before.long()
    one, other = (values.index_select(dim, index) for index in (first, (first + 1).clamp(max=last)))
    return torch.lerp(one, other, share)
