"""Grouping over points at fractional places of the grid of groups (after Deformable DETR, arXiv:2010.04159).

Every fine token looks at P points around its own cell. What it sees at a point is interpolated linearly between the
groups around it, and what it gives to a point is spread over the same groups with the same weights, so its
memberships are ``A_ij = sum_p a_ip w_ipj`` and still sum to one. With points on whole steps this is a window.

Groups that are not valid are not there: points stay in the box that holds the valid ones, and interpolation goes over
those alone. A point near which no group is valid is not visible, and a token without a visible point belongs to nobody.

Points are worked through a few at a time and recomputed in the backward pass, so memory is O(N * P) numbers, not
vectors.

**The gradient of where a point lies is bounded.** The average of a group with mass m moves by ``a/m (v - out)`` per
weight that a point of share a gives it. Once softmax is sharp that is no use: beside a group that nearly all tokens
leave, m is e^-30, and a point that took the smallest step towards it would replace its average at once. No step can
do more than that, so ``a/m`` counts as 1 where it is more. Groups with a mass of 1 token or more have their exact
gradients, and everything else too: values, sums, logits, and all that flows to queries, keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from RoSE.tracing import is_transformed
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..autograd import without_autocast
from ..semantics import LOWEST
from .interpolation import Lattice, corners, held, interpolate, touches, with_gradient_of

# Elements of the vectors seen at the points of one part: on a CPU few enough for its cache, on a GPU enough to fill it,
# because every part costs it some hundred launches.
PART_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}


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

    Returns:
        log a, (B, H, N_in, P) in float32 at least; -inf for points that are not visible.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)

    def logits(q: Tensor, k: Tensor, some: Tensor) -> Tensor:
        return scale * (k.to(dtype).unsqueeze(3) * _seen(q.to(dtype), some, groups)).sum(-1)

    scores = torch.cat([_recomputed(logits, q, k, some) for some in _parts(places, q.shape[-1])], dim=3)
    if bias is not None:
        scores = scores + bias.to(dtype)[:, None, :]
    if lowering is not None:
        scores = scores - lowering.to(dtype)
    if groups.valid is None:
        return scores.masked_fill(~visible, -torch.inf).log_softmax(-1)
    visible = visible & touches(places.flatten(2, 3), groups).view(scores.shape)
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
def assign(log_shares: Tensor, places: Tensor, u: Tensor, groups: Lattice) -> Tensor:
    """Values of the groups (B, H, N_out, C) -> of the fine tokens (B, H, N_in, C): ``sum_p a_ip u(x_ip)``."""

    def part(share: Tensor, some: Tensor, u: Tensor) -> Tensor:
        return (share.unsqueeze(-1) * _seen(u.to(share.dtype), some, groups)).sum(3)

    out: Tensor = torch.zeros((), dtype=log_shares.dtype, device=u.device)
    channels = u.shape[-1]
    for share, some in zip(_parts(log_shares.exp(), channels), _parts(places, channels), strict=True):
        out = out + _recomputed(part, share, some, u)
    return out.to(u.dtype)


@without_autocast
def spread(log_shares: Tensor, places: Tensor, v: Tensor, groups: Lattice) -> Tensor:
    """Sums of the tokens' values (B, H, N_in, C) over the groups' members (B, H, N_out, C): ``assign``'s adjoint."""
    return _collect(log_shares, places, v.to(log_shares.dtype), groups).to(v.dtype)


@without_autocast
def pool(log_shares: Tensor, places: Tensor, v: Tensor, groups: Lattice) -> tuple[Tensor, Tensor]:
    """Averages of the fine tokens' values (B, H, N_in, C) over the groups' members, and the groups' log masses.

    Every group's sums are taken relative to its largest membership, so that a group whose members all prefer others
    still has an exact average and finite gradients. Those of the places are bounded, see the module.

    Returns:
        (B, H, N_out, C) in v's dtype, 0 for groups without members; (B, H, N_out), -inf for those.
    """
    highest = _highest(log_shares.detach(), places.detach(), groups)
    # A transform does not tell whether it will ask for the gradient.
    differentiated = places.requires_grad or is_transformed()
    largest = _relative_mass(log_shares.detach(), places.detach(), groups, highest) if differentiated else None
    wide = v.to(log_shares.dtype)
    ones = torch.ones_like(wide[..., :1])
    total = _collect(log_shares, places, torch.cat((wide, ones), -1), groups, highest, largest)
    mass = total[..., -1]
    empty = mass == 0
    mass = mass.masked_fill(empty, 1.0)
    log_mass = (mass.log() + highest).masked_fill(empty, -torch.inf)
    return (total[..., :-1] / mass.unsqueeze(-1)).to(v.dtype), log_mass


def _collect(
    log_shares: Tensor,
    places: Tensor,
    v: Tensor,
    groups: Lattice,
    highest: Tensor | None = None,
    largest: Tensor | None = None,
) -> Tensor:
    """``sum_i A_ij v_i / exp(highest_j)``, by default with 0 for highest.

    Where ``largest`` is given, shares count for the gradient of the places as that much at most, relative to
    ``exp(highest_j)`` too; both are (B, H, N_out).
    """
    size = math.prod(groups.shape)

    def part(log_share: Tensor, some: Tensor, v: Tensor) -> Tensor:
        log_share, some = log_share.flatten(2, 3), some.flatten(2, 3)
        values = v.repeat_interleave(log_share.shape[2] // v.shape[2], 2)
        total = values.new_zeros(*values.shape[:2], size, values.shape[3])
        for index, weight in corners(some, groups):
            weight = weight.to(values.dtype)
            # Beyond e^80 the weight is so small that their product is nothing.
            relative = log_share if highest is None else (log_share - highest.gather(2, index)).clamp(max=80.0)
            share = relative.exp()
            given = weight * share
            if largest is not None:
                bounded = torch.minimum(share.detach(), largest.gather(2, index))
                given = with_gradient_of(weight.detach() * share, bounded * weight)
            given = given.unsqueeze(-1) * values
            total = total.scatter_add(2, index.unsqueeze(-1).expand_as(given), given)
        return total

    out: Tensor = torch.zeros((), dtype=v.dtype, device=v.device)
    channels = v.shape[-1]
    for log_share, some in zip(_parts(log_shares, channels), _parts(places, channels), strict=True):
        out = out + _recomputed(part, log_share, some, v)
    return out


def _relative_mass(log_shares: Tensor, places: Tensor, groups: Lattice, highest: Tensor) -> Tensor:
    """Mass of every group relative to its largest membership, (B, H, N_out); 0 for groups without members."""
    ones = log_shares.new_ones(*log_shares.shape[:3], 1)
    return _collect(log_shares, places, ones, groups, highest).squeeze(-1)


@torch.no_grad()
def _highest(log_shares: Tensor, places: Tensor, groups: Lattice) -> Tensor:
    """Largest log membership of every group, (B, H, N_out); a finite lowest value where there is none."""
    batch, heads = log_shares.shape[:2]
    highest = log_shares.new_full((batch, heads, math.prod(groups.shape)), LOWEST)
    for log_share, some in zip(_parts(log_shares, 1), _parts(places, 1), strict=True):
        for index, weight in corners(some.flatten(2, 3), groups):
            membership = log_share.flatten(2, 3) + weight.to(log_share.dtype).log()
            highest = highest.scatter_reduce(2, index, membership, "amax")
    return highest


def _seen(values: Tensor, places: Tensor, groups: Lattice) -> Tensor:
    """Values of the groups (B, H, N_out, C) at places (B, H, N_in, P, ndim): (B, H, N_in, P, C)."""
    return interpolate(values, places.flatten(2, 3), groups).reshape(*places.shape[:-1], values.shape[-1])


def _parts(per_point: Tensor, channels: int) -> tuple[Tensor, ...]:
    """Cut (B, H, N_in, P, ...) into as many points at a time as a part's vectors of ``channels`` allow.

    A compiler fuses all of them, and quicker, in one piece.
    """
    if torch.compiler.is_compiling():
        return (per_point,)
    elements = max(1, math.prod(per_point.shape[:3]) * channels)
    budget = PART_ELEMENTS.get(per_point.device.type, PART_ELEMENTS["cpu"])
    return torch.split(per_point, max(1, budget // elements), dim=3)


def _recomputed(function: Callable[..., Tensor], *operands: Tensor) -> Tensor:
    """Call a function, keeping only its operands for the backward pass."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or is_transformed():
        return function(*operands)
    result: Tensor = checkpoint(function, *operands, use_reentrant=False, preserve_rng_state=False)
    return result
