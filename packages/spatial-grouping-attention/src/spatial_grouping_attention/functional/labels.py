"""The most likely group of every fine token, without a matrix of all pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..geometry import Neighbourhood
from .chunked import Problem
from .reference import logits

# Elements of the block of logits that is held at a time where every token sees every group.
BLOCK_ELEMENTS = 2**24


@torch.no_grad()
def most_likely_groups(q: Tensor, k: Tensor, neighbourhood: Neighbourhood, scale: float, bias: Tensor | None) -> Tensor:
    """argmax_j of the memberships averaged over heads.

    Args:
        q: (B, H, N_out, D).
        k: (B, H, N_in, D).
        neighbourhood: which groups a token sees.
        scale: factor of the logits.
        bias: table (H, *window) or None.

    Returns:
        (B, N_in) int64; ties go to the group that comes first.
    """
    if neighbourhood.covers_all and bias is None:
        return _dense(q, k, scale)
    problem = Problem(q, k, bias, None, neighbourhood.integers(), scale)
    labels = torch.empty(k.shape[0], 1, k.shape[2], dtype=torch.long, device=q.device)
    for chunk in problem.chunks(split_heads=False):
        scores = problem.logits(chunk, problem.scaled_queries(chunk), problem.tokens(chunk, k))
        slot = scores.softmax(-1).nan_to_num_().mean(1, keepdim=True).argmax(-1, keepdim=True)
        groups = chunk.tables.groups.view(-1, 1, chunk.tables.groups_per_tile)
        tile_labels = groups.expand(*slot.shape[:-1], -1).gather(-1, slot).squeeze(-1)
        chunk.store_tokens(labels, tile_labels)
    return labels.squeeze(1)


def _dense(q: Tensor, k: Tensor, scale: float) -> Tensor:
    rows = max(1, BLOCK_ELEMENTS // (q.shape[0] * q.shape[1] * q.shape[2]))
    blocks = [
        logits(q, block, None, scale, None, None).softmax(-1).mean(1).argmax(-1)
        for block in torch.split(k, rows, dim=2)
    ]
    return torch.cat(blocks, dim=1)
