"""The most likely group of every fine token that looks at points."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from ...geometry.lattice import Lattice, lattice
from ..autograd import as_given, shown, without_autocast
from ..labelling import one_by_one
from ..semantics import most_likely
from .interpolation import corners

# Elements of the block of memberships that is held at a time.
BLOCK_ELEMENTS = 2**21


@torch.no_grad()
def labels(log_shares: Tensor, places: Tensor, groups: Lattice, *, per_head: bool = False) -> Tensor:
    """argmax_j of the memberships averaged over heads, or of every head's.

    Args:
        log_shares: logarithm of the share of every token that goes to each of its points (B, H, N_in, P).
        places: positions of the points in steps of the grid of groups (B, H, N_in, P, ndim).
        groups: the grid of groups.
        per_head: whether every head has labels of its own.

    Returns:
        (B, N_in) int64, or (B, H, N_in) per head; ties go to the group that comes first; -1 for tokens that belong to
        no group, or of which nobody can tell, because they are NaN.
    """
    if torch.onnx.is_in_onnx_export():  # which has standard operators only
        with as_given(log_shares):
            return most_likely(_memberships(log_shares, places, groups, per_head))
    find = shown(_labels, _find_labels, log_shares, places)
    found: Tensor = find(log_shares, places, groups.valid, list(groups.shape), per_head)
    return found


@without_autocast
def _find_labels(
    log_shares: Tensor, places: Tensor, valid_groups: Tensor | None, output_shape: list[int], per_head: bool
) -> Tensor:
    batch, heads, tokens, points = log_shares.shape
    groups = lattice(tuple(output_shape), valid_groups)
    found = log_shares.new_full((batch, heads, tokens) if per_head else (batch, tokens), -1, dtype=torch.long)
    size, touched = math.prod(output_shape), points * 2 ** len(output_shape) * (1 if per_head else heads)
    lists = batch * (heads if per_head else 1)
    rows = max(1, BLOCK_ELEMENTS // max(1, lists * min(size, touched)))
    if log_shares.numel() > 0:
        for first in range(0, tokens, rows):
            some = log_shares[:, :, first : first + rows], places[:, :, first : first + rows]
            if size <= touched:
                these = most_likely(_memberships(*some, groups, per_head))
            else:
                these = _most_likely_of_touched(*some, groups, per_head)
            found[..., first : first + rows] = these
    return found


_labels = torch.library.custom_op("spatial_grouping_attention::labels_of_points", _find_labels, mutates_args=())


@_labels.register_fake
def _(log_shares, places, valid_groups, output_shape, per_head):  # type: ignore[no-untyped-def]
    batch, heads, tokens = log_shares.shape[:3]
    return log_shares.new_empty((batch, heads, tokens) if per_head else (batch, tokens), dtype=torch.long)


_labels.register_vmap(one_by_one(_labels))


def _most_likely_of_touched(log_shares: Tensor, places: Tensor, groups: Lattice, per_head: bool) -> Tensor:
    """The same as of :func:`_memberships`, where a token's points touch few of the groups: (B, H, N) or (B, N)."""
    tokens = log_shares.shape[2]
    around = list(corners(places.flatten(2, 3), groups))
    index = rearrange(torch.stack([at for at, _ in around], -1), "b h (n p) c -> b h n (p c)", n=tokens)
    weight = rearrange(torch.stack([weight for _, weight in around], -1), "b h (n p) c -> b h n p c", n=tokens)
    share = (weight.to(log_shares.dtype) * log_shares.exp().unsqueeze(-1)).flatten(3)
    if not per_head:
        index, share = (rearrange(x, "b h n k -> b n (h k)") for x in (index, share))
    # What belongs to one group comes to stand side by side, and is added up where the first of it is.
    index, order = index.sort(dim=-1, stable=True)
    run = F.pad((index.diff(dim=-1) != 0).long(), (1, 0)).cumsum(-1)
    total = torch.zeros_like(share).scatter_add(-1, run, share.gather(-1, order))
    best = most_likely(total.masked_fill(total.isnan(), 0.0))
    group = torch.zeros_like(index).scatter(-1, run, index).gather(-1, best.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return group.masked_fill(best < 0, -1)


def _memberships(log_shares: Tensor, places: Tensor, groups: Lattice, per_head: bool) -> Tensor:
    """(B, H, N, M) per head, or their sum over heads (B, N, M); 0 where they are NaN."""
    batch, heads, tokens, points = log_shares.shape
    size = math.prod(groups.shape)
    shares = log_shares.exp().flatten(2)
    row = size * torch.arange(tokens, device=places.device).repeat_interleave(points)
    rows_of = (batch, heads, -1) if per_head else (batch, -1)
    total = shares.new_zeros(*rows_of[:-1], tokens * size)
    for index, weight in corners(places.flatten(2, 3), groups):
        given = weight.to(shares.dtype) * shares
        total = total.scatter_add(-1, (row + index).reshape(rows_of), given.reshape(rows_of))
    total = torch.unflatten(total, -1, (tokens, size))
    return total.masked_fill(total.isnan(), 0.0)
