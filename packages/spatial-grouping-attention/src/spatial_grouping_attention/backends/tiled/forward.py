"""Forward passes, with A = assignment, T_ij = s_ij - l_i and M = logarithm of the groups' masses.

l_i = logsumexp_j s_ij      out_j = sum_i exp(T_ij - M_j) v_i      M_j = logsumexp_i T_ij
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..operands import Operands, Pooled
from ..semantics import most_likely, rows_like
from .averages import RunningAverages, normaliser
from .chunks import Tiles


def assign(x: Operands) -> tuple[Tensor, Tensor]:
    """``A u`` and the tokens' normalisers."""
    tiles = Tiles(x)
    lse, out = tiles.per_token(), rows_like(x.values, x.k.shape[2], x.values.shape[-1])
    for chunk in tiles.chunks():
        scores = chunk.logits(chunk.scaled_queries(), chunk.tokens(x.k))
        chunk_lse = normaliser(scores)
        chunk.store(lse, chunk_lse)
        chunk.store(out, scores.sub_(chunk_lse[..., None]).exp_() @ chunk.groups(x.values))
    return out, lse


def pool(x: Operands, given_lse: Tensor | None) -> Pooled:
    """Averages over the members of every group; one pass over the tiles."""
    tiles = Tiles(x)
    averages = RunningAverages(tiles)
    lse = tiles.per_token() if given_lse is None else given_lse
    for chunk in tiles.chunks():
        scores = chunk.logits(chunk.scaled_queries(), chunk.tokens(x.k))
        if given_lse is None:
            chunk_lse = normaliser(scores)
            chunk.store(lse, chunk_lse)
        else:
            chunk_lse = chunk.tokens(given_lse)
        averages.add(chunk, scores.sub_(chunk_lse[..., None]), chunk.tokens(x.values))
    return Pooled(*averages.result(), lse)


def labels(x: Operands) -> Tensor:
    """argmax_j of the memberships averaged over heads, (B, N_in); -1 for tokens that belong to no group."""
    tiles = Tiles(x)
    found = torch.empty(x.k.shape[0], 1, x.k.shape[2], dtype=torch.long, device=x.k.device)
    for chunk in tiles.chunks(split_heads=False):
        scores = chunk.logits(chunk.scaled_queries(), chunk.tokens(x.k))
        slot = most_likely(scores.softmax(-1).nan_to_num_().mean(1, keepdim=True))
        groups = (chunk.tables.groups + chunk.run.groups.start).view(-1, 1, tiles.tiling.groups_per_tile)
        group = groups.expand(*slot.shape, -1).gather(-1, slot.clamp(min=0)[..., None]).squeeze(-1)
        chunk.store(found, group.masked_fill_(slot < 0, -1))
    return found.squeeze(1)
