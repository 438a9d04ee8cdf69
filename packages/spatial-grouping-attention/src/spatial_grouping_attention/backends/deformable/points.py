"""Grouping over points at fractional places of the grid of groups (after Deformable DETR, arXiv:2010.04159).

Every fine token looks at P points around its own cell. What it sees at a point is interpolated linearly between the
groups around it, and what it gives to a point is spread over the same groups with the same weights, so its
memberships are ``A_ij = sum_p a_ip w_ipj`` and still sum to one. With points on whole steps this is a window.

Groups that are not valid are not there: points stay in the box that holds the valid ones, and interpolation goes over
those alone. A point near which no group is valid is not visible, and a token without a visible point belongs to nobody.

**The gradient of where a point lies is bounded.** The average of a group with mass m moves by ``a/m (v - out)`` per
weight that a point of share a gives it. Once softmax is sharp that is no use: beside a group that nearly all tokens
leave, m is e^-30, and a point that took the smallest step towards it would replace its average at once. No step can
do more than that, so ``a/m`` counts as 1 where it is more. Groups with a mass of 1 token or more have their exact
gradients, and everything else too: values, sums, logits, and all that flows to queries, keys and values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...geometry.lattice import Lattice
from ..autograd import without_autocast
from .interpolation import held
from .selection import engine


@without_autocast
def point_log_shares(
    q: Tensor,
    k: Tensor,
    places: Tensor,
    visible: Tensor,
    groups: Lattice,
    *,
    scale: float,
    bias: Tensor | None = None,
    lowering: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Logarithm of the share of every token that goes to each of its points.

    ``a_ip = softmax_p (scale <k_i, q(x_ip)> + bias_p - lowering_ip)``.

    Args:
        q: group queries (B, H, N_out, D).
        k: fine keys (B, H, N_in, D).
        places: positions x of the points in steps of the grid of groups (B, H, N_in, P, ndim). Differentiable.
        visible: boolean, broadcastable to (B, H, N_in, P): points that may be looked at.
        groups: the grid of groups.
        scale: factor of the products.
        bias: (H, P) or None.
        lowering: (B, H, N_in, P) or None, taken off the logits.
        backend: see :func:`.selection.engine`.

    Returns:
        log a, (B, H, N_in, P) in float32 at least; -inf for points that are not visible.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(dtype), k.to(dtype)
    by = engine(backend, places, groups, q, k)
    scores: Tensor = scale * by.products(q, k, places, groups)
    if bias is not None:
        scores = scores + bias.to(dtype)[:, None, :]
    if lowering is not None:
        scores = scores - lowering.to(dtype)
    if groups.valid is None:
        return scores.masked_fill(~visible, -torch.inf).log_softmax(-1)
    visible = visible & by.touches(places, groups)
    nobody = ~visible.any(-1, keepdim=True)
    return scores.masked_fill(~(visible | nobody), -torch.inf).log_softmax(-1).masked_fill(nobody, -torch.inf)


def squared_distances(
    tokens: Tensor, strides: tuple[int, ...], starts: Tensor, offsets: Tensor, groups: Lattice
) -> Tensor:
    """Squared distance of every token from where its points lie, in units of the group spacing.

    Counted from the token, so that it is exact wherever the token lies.

    Args:
        tokens: their places (N_in, ndim) in steps of the fine grid, see :meth:`...geometry.Neighbourhood.places`.
        strides: such steps in a group spacing, axis by axis.
        starts: whole steps at which the points start (N_in, P, ndim).
        offsets: how far they have moved from there (B, H, N_in, P, ndim). Differentiable.
        groups: the grid of groups, in whose box points are held.

    Returns:
        (B, H, N_in, P).
    """
    squares: Tensor = torch.zeros((), dtype=offsets.dtype, device=offsets.device)
    columns = zip(tokens.unbind(-1), strides, starts.unbind(-1), offsets.unbind(-1), groups.box, strict=True)
    for token, stride, start, offset, (first, last) in columns:
        # The box has samples in front: (), or (B, 1, 1) beside (N_in,).
        low, high = ((end * stride - token) / stride for end in (first, last))
        apart = (start * stride - token[:, None]) / stride + offset
        squares = squares + held(apart, low.unsqueeze(-1), high.unsqueeze(-1)).square()
    return squares


@without_autocast
def assign(log_shares: Tensor, places: Tensor, u: Tensor, groups: Lattice, backend: str = "auto") -> Tensor:
    """Values of the groups (B, H, N_out, C) -> of the fine tokens (B, H, N_in, C): ``sum_p a_ip u(x_ip)``."""
    shares, wide = log_shares.exp(), u.to(log_shares.dtype)
    out: Tensor = engine(backend, places, groups, shares, wide).averages(shares, places, wide, groups)
    return out.to(u.dtype)


@without_autocast
def spread(log_shares: Tensor, places: Tensor, v: Tensor, groups: Lattice, backend: str = "auto") -> Tensor:
    """Sums of the tokens' values (B, H, N_in, C) over the groups' members (B, H, N_out, C): ``assign``'s adjoint."""
    shares, wide = log_shares.exp(), v.to(log_shares.dtype)
    out: Tensor = engine(backend, places, groups, shares, wide).sums(shares, places, wide, groups)
    return out.to(v.dtype)


@without_autocast
def pool(
    log_shares: Tensor, places: Tensor, v: Tensor, groups: Lattice, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Averages of the fine tokens' values (B, H, N_in, C) over the groups' members, and the groups' log masses.

    Every group's sums are taken relative to its largest membership, so that a group whose members all prefer others
    still has an exact average and finite gradients. Those of the places are bounded, see the module.

    Returns:
        (B, H, N_out, C) in v's dtype, 0 for groups without members; (B, H, N_out), -inf for those.
    """
    wide = v.to(log_shares.dtype)
    by = engine(backend, places, groups, log_shares, wide)
    total, mass, highest = by.relative_sums(log_shares, places, wide, groups)
    empty = mass == 0
    mass = mass.masked_fill(empty, 1.0)
    log_mass = (mass.log() + highest).masked_fill(empty, -torch.inf)
    return (total / mass.unsqueeze(-1)).to(v.dtype), log_mass
