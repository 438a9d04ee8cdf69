"""What attention kernels are called with, and channels: what else is added to a logit, as products."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Terms(NamedTuple):
    """Products that are added to the logits of queries and keys: ``sum_n left_in right_jn``, in float32 at least."""

    left: Tensor
    """(N, n), of the queries: whole numbers of 256 at most, which half types hold."""
    right: Tensor
    """(H, M, n), of the keys."""


class Call(NamedTuple):
    """Operands of attention: ``softmax(scale q k^T + key_bias + terms) v``."""

    q: Tensor
    """(B, H, N, D)."""
    k: Tensor
    """(B, H, M, D)."""
    v: Tensor
    """(B, H, M, Dv)."""
    scale: float
    """Of the products, not of bias and terms."""
    key_bias: Tensor | None = None
    """(B, H, M) in float32 at least, added to the logits of every query; finite, because a row of nothing but -inf is
    NaN to the kernels."""
    terms: Terms | None = None
    """Further products that are added to the logits."""


class Sums(NamedTuple):
    """What the backward pass of logits with terms has to tell, of their gradient ds."""

    right: Tensor
    """Gradient to ``right``, sums of ``ds_ij left_in`` over queries (B, H, M, n)."""
    rows: Tensor
    """Sums of ``ds_ij`` over keys (B, H, N)."""


def append(x: Tensor, channels: Tensor | float) -> Tensor:
    """More channels (broadcast to x's rows), or one of the same number everywhere."""
    if not isinstance(channels, Tensor):
        channels = x.new_full((*x.shape[:-1], 1), channels)
    return torch.cat((x, channels.to(x.dtype).expand(*x.shape[:-1], -1)), dim=-1)


def pad(x: Tensor, size: int) -> Tensor:
    """``size`` channels, next to each other in memory: the kernels read other strides wrongly."""
    if x.shape[-1] != size:
        return F.pad(x, (0, size - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


def cut(x: Tensor, size: int) -> Tensor:
    """The first ``size`` channels; where that is all of them, not a view: those refuse to be changed in place."""
    return x if x.shape[-1] == size else x[..., :size]
