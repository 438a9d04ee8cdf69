"""The most likely group of every fine token, without a matrix of all pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from .engines import Backend, engine
from .operands import Operands
from .semantics import blanked, logits, memberships, most_likely

# Elements of the block of logits that is held at a time where every token sees every group.
BLOCK_ELEMENTS = 2**24


@torch.no_grad()
def labels(x: Operands) -> Tensor:
    """argmax_j of the memberships averaged over heads; ``values`` are not looked at.

    Returns:
        (B, N_in) int64; ties go to the group that comes first; -1 for tokens that belong to no group.
    """
    # The values' channels would only make for smaller chunks.
    x = blanked(x._replace(values=x.q), "groups")
    if x.neighbourhood is None or (x.neighbourhood.covers_all and x.bias is None):
        return _dense(x)
    found: Tensor = engine(Backend.TILED.value).labels(x)
    return found


def _dense(x: Operands) -> Tensor:
    rows = max(1, BLOCK_ELEMENTS // max(1, x.q.shape[0] * x.q.shape[1] * x.q.shape[2]))
    blocks = []
    for first in range(0, x.k.shape[2], rows):
        block = slice(first, first + rows)
        valid = None if x.valid is None else x.valid[:, block]
        part = x._replace(k=x.k[:, :, block], valid=valid, neighbourhood=None)
        blocks.append(most_likely(memberships(logits(part)).mean(1)))
    return torch.cat(blocks, dim=1)
