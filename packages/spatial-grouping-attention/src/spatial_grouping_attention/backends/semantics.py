"""What all engines mean by a call: logits, normalisers, and the form of results.

The formulas here are written once with the whole matrix; small grids may use them as they are, engines work through
them piece by piece.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .autograd import products
from .operands import Operands
from .transforms import under_transform

# Stands for "nothing seen yet" in running maxima and for -inf in biases: finite, so that differences with it are
# never NaN.
LOWEST = -1e30


def widened(dtype: torch.dtype) -> torch.dtype:
    """The type in which logits and sums are kept: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def logits(x: Operands) -> Tensor:
    """``s_ij = scale * <k_i, q_j> + biases - compactness * |p_i - p_j|^2``, -inf where token i does not see group j.

    Returns:
        (B, H, N_in, N_out).
    """
    dtype = widened(x.q.dtype)
    scores = x.scale * products(x.k.to(dtype), x.q.to(dtype))
    if x.bias is not None and x.neighbourhood is not None:
        scores = scores + x.bias.to(dtype).flatten(1)[:, x.neighbourhood.window_index(x.bias.device)]
    if x.pair_bias is not None:
        scores = scores + x.pair_bias.to(dtype)
    if x.compactness is not None and x.neighbourhood is not None:
        squares = x.neighbourhood.squared_distances(x.q.device, dtype)
        scores = scores - x.compactness.to(dtype)[:, None, None] * squares
    if x.neighbourhood is not None:
        scores = scores.masked_fill(~x.neighbourhood.mask(x.q.device), -torch.inf)
    if x.valid is not None:
        scores = scores.masked_fill(~x.valid[:, None, :, None], -torch.inf)
    if x.valid_groups is not None:
        scores = scores.masked_fill(~x.valid_groups[:, None, None, :], -torch.inf)
    return scores


def safe_logsumexp(scores: Tensor, dim: int) -> Tensor:
    """Logsumexp that is -inf, with zero gradient, where every entry is -inf."""
    nothing = (scores == -torch.inf).all(dim, keepdim=True)
    summed = scores.masked_fill(nothing, 0.0).logsumexp(dim)
    return summed.masked_fill(nothing.squeeze(dim), -torch.inf)


def normaliser(scores: Tensor) -> Tensor:
    """Logsumexp over the groups; +inf for tokens that belong to nobody, so that ``exp(s - lse)`` is 0."""
    lse = safe_logsumexp(scores, dim=-1)
    return lse.masked_fill(lse == -torch.inf, torch.inf)


def memberships(scores: Tensor) -> Tensor:
    """Softmax over the groups; 0 for tokens that belong to nobody."""
    return (scores - normaliser(scores)[..., None]).exp()


def most_likely(shares: Tensor) -> Tensor:
    """Index of the largest share along the last axis, the first of equals; -1 where all are 0."""
    if shares.shape[-1] == 0:
        return torch.full(shares.shape[:-1], -1, device=shares.device)
    largest, index = shares.max(-1)
    return index.masked_fill(largest == 0, -1)


def blanked(x: Operands, rows_of_values: str) -> Operands:
    """Zero what excluded tokens and groups hold: padding may be NaN, and 0 times NaN is NaN.

    Args:
        x: operands.
        rows_of_values: ``"tokens"`` or ``"groups"``, whichever ``values`` belong to.
    """
    valid, valid_groups = x.valid, x.valid_groups
    if valid is not None:
        x = x._replace(k=_zeroed(x.k, valid))
        if rows_of_values == "tokens":
            x = x._replace(values=_zeroed(x.values, valid))
    if valid_groups is not None:
        x = x._replace(q=_zeroed(x.q, valid_groups))
        if rows_of_values == "groups":
            x = x._replace(values=_zeroed(x.values, valid_groups))
    return x


def _zeroed(rows: Tensor, valid: Tensor) -> Tensor:
    nobody = ~valid[:, None, :, None]
    if under_transform():  # which may map the mask and not the rows
        return rows.masked_fill(nobody, 0.0)
    # A clone keeps the order in memory, which masked_fill on its own does not.
    return rows.clone().masked_fill_(nobody, 0.0)


def rows_like(like: Tensor, rows: int, channels: int) -> Tensor:
    """Uninitialised (B, H, rows, channels), float32 at least, heads and rows in the order they have in ``like``."""
    batch, heads = like.shape[:2]
    dtype = widened(like.dtype)
    if like.stride(1) < like.stride(2):
        return like.new_empty(batch, rows, heads, channels, dtype=dtype).transpose(1, 2)
    return like.new_empty(batch, heads, rows, channels, dtype=dtype)


def scalars_like(like: Tensor) -> Tensor:
    """Uninitialised (B, H, N), float32 at least: one number for every row of ``like``."""
    return like.new_empty(like.shape[:3], dtype=widened(like.dtype))
