"""The oracle: the operators written out with the full assignment matrix.

Every other engine must agree with these results, forward and in every gradient. Nothing here is fast or lean; it is
meant to be read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .autograd import products
from .operands import Operands, Pooled, Problem
from .semantics import logits, normaliser, safe_logsumexp


def refusals(problem: Problem) -> list[str]:
    """It serves every call."""
    return []


def assign(x: Operands) -> tuple[Tensor, Tensor]:
    """Values of the groups for every fine token ``A u``, and the tokens' normalisers."""
    scores = logits(x)
    lse = normaliser(scores)
    out = products((scores - lse[..., None]).exp(), x.values.to(scores.dtype).mT)
    return out.to(x.values.dtype), lse


def pool(x: Operands, lse: Tensor | None) -> Pooled:
    """Averages of the members of every group; without ``lse`` with the logits' own normalisers."""
    scores = logits(x)
    lse = normaliser(scores) if lse is None else lse
    scores = scores - lse[..., None]
    log_mass = safe_logsumexp(scores, dim=-2)
    # An empty group has log mass -inf; dividing by exp(+inf) instead leaves it at 0.
    weights = (scores - log_mass.masked_fill(log_mass == -torch.inf, torch.inf)[..., None, :]).exp()
    out = products(weights.mT, x.values.to(scores.dtype).mT)
    return Pooled(out.to(x.values.dtype), log_mass, lse)
