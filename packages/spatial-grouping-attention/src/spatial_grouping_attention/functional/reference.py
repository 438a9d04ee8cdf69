"""The oracle: the operators written out with the full assignment matrix.

Every other backend has these three signatures and must agree with these results, forward and in every gradient.
Nothing here is fast or lean; it is meant to be read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..geometry import Neighbourhood


def logits(
    q: Tensor,
    k: Tensor,
    neighbourhood: Neighbourhood | None,
    scale: float,
    bias: Tensor | None,
    valid: Tensor | None,
) -> Tensor:
    """``s_ij = scale * <k_i, q_j> + bias``, ``-inf`` where token i does not see group j; (B, H, N_in, N_out)."""
    accumulate = torch.promote_types(q.dtype, torch.float32)
    scores = scale * (k.to(accumulate) @ q.to(accumulate).mT)
    if bias is not None:
        scores = scores + expand_bias(bias.to(accumulate), q.shape[1], neighbourhood)
    if neighbourhood is not None:
        scores = scores.masked_fill(~neighbourhood.mask(q.device), -torch.inf)
    if valid is not None:
        scores = scores.masked_fill(~valid[:, None, :, None], -torch.inf)
    return scores


def expand_bias(bias: Tensor, heads: int, neighbourhood: Neighbourhood | None) -> Tensor:
    """A table (H, *window) as one value for every pair, (H, N_in, N_out); a full bias as it is."""
    if neighbourhood is None or not is_table(bias, heads, neighbourhood):
        return bias
    return bias.flatten(1)[:, neighbourhood.window_index(bias.device)]


def is_table(bias: Tensor, heads: int, neighbourhood: Neighbourhood | None) -> bool:
    """Whether a bias is a relative-position table over the window (rather than one value per pair)."""
    return neighbourhood is not None and tuple(bias.shape) == (heads, *(axis.window for axis in neighbourhood.axes))


def safe_logsumexp(scores: Tensor, dim: int) -> Tensor:
    """Logsumexp that is -inf, with zero gradient, where every entry is -inf."""
    nothing = (scores == -torch.inf).all(dim, keepdim=True)
    summed = scores.masked_fill(nothing, 0.0).logsumexp(dim)
    return summed.masked_fill(nothing.squeeze(dim), -torch.inf)


def assign(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    neighbourhood: Neighbourhood | None,
    scale: float,
    bias: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Values of the groups for every fine token, and the tokens' normalisers; see :func:`.api.assign`."""
    scores = logits(q, k, neighbourhood, scale, bias, valid)
    lse = normaliser(scores)
    out = (scores - lse[..., None]).exp() @ u.to(scores.dtype)
    return out.to(u.dtype), lse


def pool(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    neighbourhood: Neighbourhood | None,
    scale: float,
    bias: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Averages of the members of every group, and the logarithm of the groups' masses; see :func:`.api.pool`."""
    scores = logits(q, k, neighbourhood, scale, bias, valid) - lse.to(k.device)[..., None]
    log_mass = safe_logsumexp(scores, dim=-2)
    # An empty group has log mass -inf; dividing by exp(+inf) instead leaves it at 0.
    weights = (scores - log_mass.masked_fill(log_mass == -torch.inf, torch.inf)[..., None, :]).exp()
    return (weights.mT @ v.to(scores.dtype)).to(v.dtype), log_mass


def grouping_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    neighbourhood: Neighbourhood | None,
    scale: float,
    bias: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``pool`` with the normalisers of ``assign``: (out, lse, log_mass)."""
    lse = normaliser(logits(q, k, neighbourhood, scale, bias, valid))
    out, log_mass = pool(q, k, v, lse, neighbourhood, scale, bias, valid)
    return out, lse, log_mass


def normaliser(scores: Tensor) -> Tensor:
    """Logsumexp over the groups; +inf for tokens that belong to nobody, so that ``exp(s - lse)`` is 0."""
    lse = safe_logsumexp(scores, dim=-1)
    return lse.masked_fill(lse == -torch.inf, torch.inf)
