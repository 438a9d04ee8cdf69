"""What is computed at points, in plain torch: the formulas, for any device, type and derivative.

``x_ip`` are P points per token at fractional places of the grid of groups, ``w_ipj`` the weights by which the groups
around a point share it. Operands are of one floating type, float32 at least.

Points are worked through a few at a time and recomputed in the backward pass, so memory is O(N * P) numbers, not
vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from RoSE.tracing import is_traced, is_transformed
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...geometry.lattice import Lattice
from ..semantics import LOWEST
from .interpolation import corners, interpolate, touches, with_gradient_of

__all__ = ["averages", "products", "relative_sums", "sums", "touches"]

# Elements of the vectors seen at the points of one part: on a CPU few enough for its cache, on a GPU enough to fill it,
# because every part costs it some hundred launches.
PART_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}

# Where a share is e^80 times a group's largest membership, its weight is so small that their product is nothing.
LARGEST_EXPONENT = 80.0


def products(q: Tensor, k: Tensor, places: Tensor, groups: Lattice) -> Tensor:
    """``<k_i, q(x_ip)>`` with q interpolated between groups.

    Args:
        q: (B, H, N_out, D).
        k: (B, H, N_in, D).
        places: (B, H, N_in, P, ndim).
        groups: the grid of groups.

    Returns:
        (B, H, N_in, P).
    """

    def part(q: Tensor, k: Tensor, some: Tensor) -> Tensor:
        return (k.unsqueeze(3) * _seen(q, some, groups)).sum(-1)

    return torch.cat([_recomputed(part, q, k, some) for some in _parts(places, q.shape[-1])], dim=3)


def averages(shares: Tensor, places: Tensor, u: Tensor, groups: Lattice) -> Tensor:
    """``sum_p a_ip u(x_ip)``.

    Args:
        shares: a (B, H, N_in, P).
        places: (B, H, N_in, P, ndim).
        u: (B, H, N_out, C).
        groups: the grid of groups.

    Returns:
        (B, H, N_in, C).
    """

    def part(share: Tensor, some: Tensor, u: Tensor) -> Tensor:
        return (share.unsqueeze(-1) * _seen(u, some, groups)).sum(3)

    out: Tensor = torch.zeros((), dtype=u.dtype, device=u.device)
    channels = u.shape[-1]
    for share, some in zip(_parts(shares, channels), _parts(places, channels), strict=True):
        out = out + _recomputed(part, share, some, u)
    return out


def sums(shares: Tensor, places: Tensor, v: Tensor, groups: Lattice) -> Tensor:
    """``sum_ip a_ip w_ipj v_i``: the adjoint of :func:`averages`.

    Args:
        shares: a (B, H, N_in, P).
        places: (B, H, N_in, P, ndim).
        v: (B, H, N_in, C).
        groups: the grid of groups.

    Returns:
        (B, H, N_out, C).
    """
    return _collected(lambda share, index: share, shares, places, v, groups)


def relative_sums(log_shares: Tensor, places: Tensor, v: Tensor, groups: Lattice) -> tuple[Tensor, Tensor, Tensor]:
    """The same of ``a_ip / exp(highest_j)``, with highest the logarithm of a group's largest membership.

    In the gradient of places a share counts for no more than the group's mass, see :mod:`.points`.

    Args:
        log_shares: log a (B, H, N_in, P).
        places: (B, H, N_in, P, ndim).
        v: (B, H, N_in, C).
        groups: the grid of groups.

    Returns:
        Sums (B, H, N_out, C), the groups' masses in the same terms and ``highest``, both (B, H, N_out); the last has
        no gradient, and is a finite lowest value for groups without members.
    """
    highest = _highest(log_shares.detach(), places.detach(), groups)

    def relative(log_share: Tensor, index: Tensor) -> Tensor:
        return (log_share - highest.gather(2, index)).clamp(max=LARGEST_EXPONENT).exp()

    largest = None
    # A transform does not tell whether it will ask for the gradient.
    if places.requires_grad or is_transformed():
        ones = log_shares.new_ones(*log_shares.shape[:3], 1)
        largest = _collected(relative, log_shares.detach(), places.detach(), ones, groups).squeeze(-1)
    with_mass = torch.cat((v, torch.ones_like(v[..., :1])), -1)
    total = _collected(relative, log_shares, places, with_mass, groups, largest)
    return total[..., :-1], total[..., -1], highest


def _collected(
    share_at: Callable[[Tensor, Tensor], Tensor],
    numbers: Tensor,
    places: Tensor,
    v: Tensor,
    groups: Lattice,
    largest: Tensor | None = None,
) -> Tensor:
    """``sum_ip s_ipj w_ipj v_i``, with s made of a point's number and the index of a group.

    Where ``largest`` (B, H, N_out) is given, s counts for the gradient of the places as that much at most.
    """
    size = math.prod(groups.shape)

    def part(number: Tensor, some: Tensor, v: Tensor) -> Tensor:
        values = v.repeat_interleave(number.shape[3], 2)
        number, some = number.flatten(2, 3), some.flatten(2, 3)
        total = values.new_zeros(*values.shape[:2], size, values.shape[3])
        for index, weight in corners(some, groups):
            weight = weight.to(values.dtype)
            share = share_at(number, index)
            given = weight * share
            if largest is not None:
                bounded = torch.minimum(share.detach(), largest.gather(2, index))
                given = with_gradient_of(weight.detach() * share, bounded * weight)
            given = given.unsqueeze(-1) * values
            total = total.scatter_add(2, index.unsqueeze(-1).expand_as(given), given)
        return total

    out: Tensor = torch.zeros((), dtype=v.dtype, device=v.device)
    channels = v.shape[-1]
    for number, some in zip(_parts(numbers, channels), _parts(places, channels), strict=True):
        out = out + _recomputed(part, number, some, v)
    return out


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
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in operands)
    if not wanted or torch.compiler.is_compiling() or is_transformed() or is_traced():
        return function(*operands)
    result: Tensor = checkpoint(function, *operands, use_reentrant=False, preserve_rng_state=False)
    return result
