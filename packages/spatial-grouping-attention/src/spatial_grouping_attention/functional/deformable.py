"""Grouping over points at fractional places of the grid of groups (after Deformable DETR, arXiv:2010.04159).

Every fine token looks at P points around its own cell. What it sees at a point is interpolated linearly between the
groups around it, and what it gives to a point is spread over the same groups with the same weights, so its
memberships are ``A_ij = sum_p a_ip w_ipj`` and still sum to one. With points on whole steps this is the window of
:mod:`.tiled`.

Points are worked through one after another and recomputed in the backward pass, so memory is O(N * P) numbers, not
vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .chunked import LOWEST
from .interpolation import corners, interpolate, spread


def point_log_shares(
    q: Tensor,
    k: Tensor,
    points: Tensor,
    visible: Tensor,
    shape: Sequence[int],
    *,
    scale: float,
    bias: Tensor | None = None,
) -> Tensor:
    """Logarithm of the share of every token that goes to each of its points.

    ``a_ip = softmax_p (scale <k_i, q(x_ip)> + bias_p)``.

    Args:
        q: group queries (B, H, N_out, D).
        k: fine keys (B, H, N_in, D).
        points: positions x in steps of the grid of groups (B, H, N_in, P, ndim). Differentiable.
        visible: (N_in, P) boolean; at least one point of every token.
        shape: grid of groups, product N_out.
        scale: factor of the products.
        bias: (H, P) or None.

    Returns:
        log a, (B, H, N_in, P) in float32 at least; -inf for points that are not visible.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)

    def logits(q: Tensor, k: Tensor, some: Tensor) -> Tensor:
        seen = _seen(q.to(dtype), some, shape)
        return scale * (k.to(dtype).unsqueeze(3) * seen).sum(-1)

    scores = torch.cat([_recomputed(logits, q, k, some) for some in _parts(points)], dim=3)
    if bias is not None:
        scores = scores + bias.to(dtype)[:, None, :]
    return scores.masked_fill(~visible, -torch.inf).log_softmax(-1)


def assign(log_shares: Tensor, points: Tensor, u: Tensor, shape: Sequence[int]) -> Tensor:
    """Values of the groups (B, H, N_out, C) -> of the fine tokens (B, H, N_in, C): ``sum_p a_ip u(x_ip)``."""

    def part(share: Tensor, some: Tensor, u: Tensor) -> Tensor:
        return (share.unsqueeze(-1) * _seen(u.to(share.dtype), some, shape)).sum(3)

    out: Tensor = torch.zeros((), dtype=log_shares.dtype, device=u.device)
    for share, some in zip(_parts(log_shares.exp()), _parts(points), strict=True):
        out = out + _recomputed(part, share, some, u)
    return out.to(u.dtype)


def collect(log_shares: Tensor, points: Tensor, v: Tensor, shape: Sequence[int]) -> Tensor:
    """Values of the fine tokens (B, H, N_in, C) -> sums over the groups' members (B, H, N_out, C): ``A^T v``."""
    return _collect(log_shares, points, v.to(log_shares.dtype), shape, None).to(v.dtype)


def pool(log_shares: Tensor, points: Tensor, v: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Averages of the fine tokens' values (B, H, N_in, C) over the groups' members, and the groups' log masses.

    Every group's sums are taken relative to its largest membership, so that a group whose members all prefer others
    still has an exact average and finite gradients.

    Returns:
        (B, H, N_out, C) in v's dtype, 0 for groups without members; (B, H, N_out), -inf for those.
    """
    highest = _highest(log_shares.detach(), points.detach(), shape)
    wide = v.to(log_shares.dtype)
    total = _collect(log_shares, points, torch.cat((wide, torch.ones_like(wide[..., :1])), -1), shape, highest)
    mass = total[..., -1]
    empty = mass == 0
    mass = mass.masked_fill(empty, 1.0)
    log_mass = (mass.log() + highest).masked_fill(empty, -torch.inf)
    return (total[..., :-1] / mass.unsqueeze(-1)).to(v.dtype), log_mass


def _collect(log_shares: Tensor, points: Tensor, v: Tensor, shape: Sequence[int], highest: Tensor | None) -> Tensor:
    """``sum_i A_ij v_i``, divided by exp(highest_j) if that is given."""

    def part(log_share: Tensor, some: Tensor, v: Tensor) -> Tensor:
        log_share, some = log_share.flatten(2, 3), some.flatten(2, 3)
        values = v.repeat_interleave(log_share.shape[2] // v.shape[2], 2)
        if highest is None:
            return spread(log_share.exp().unsqueeze(-1) * values, some, shape)
        total = values.new_zeros(*values.shape[:2], highest.shape[2], values.shape[3])
        for index, weight in corners(some, shape):
            # Beyond e^80 the weight is so small that their product is nothing.
            relative = (log_share - highest.gather(2, index)).clamp(max=80.0).exp()
            given = (weight.to(values.dtype) * relative).unsqueeze(-1) * values
            total = total.scatter_add(2, index.unsqueeze(-1).expand_as(given), given)
        return total

    out: Tensor = torch.zeros((), dtype=v.dtype, device=v.device)
    for log_share, some in zip(_parts(log_shares), _parts(points), strict=True):
        out = out + _recomputed(part, log_share, some, v)
    return out


@torch.no_grad()
def _highest(log_shares: Tensor, points: Tensor, shape: Sequence[int]) -> Tensor:
    """Largest log membership of every group, (B, H, N_out); a finite lowest value where there is none."""
    batch, heads = log_shares.shape[:2]
    highest = log_shares.new_full((batch, heads, torch.Size(shape).numel()), LOWEST)
    for log_share, some in zip(_parts(log_shares), _parts(points), strict=True):
        for index, weight in corners(some.flatten(2, 3), shape):
            membership = log_share.flatten(2, 3) + weight.to(log_share.dtype).log()
            highest = highest.scatter_reduce(2, index, membership, "amax")
    return highest


def _seen(values: Tensor, points: Tensor, shape: Sequence[int]) -> Tensor:
    """Values of the groups (B, H, N_out, C) at points (B, H, N_in, P, ndim): (B, H, N_in, P, C)."""
    return interpolate(values, points.flatten(2, 3), shape).reshape(*points.shape[:-1], values.shape[-1])


def _parts(per_point: Tensor) -> tuple[Tensor, ...]:
    """Cut (B, H, N_in, P, ...) into one point at a time; a compiler fuses all of them, and quicker, in one piece."""
    return (per_point,) if torch.compiler.is_compiling() else torch.split(per_point, 1, dim=3)


def _recomputed(function: Callable[..., Tensor], *operands: Tensor) -> Tensor:
    """Call a function, keeping only its operands for the backward pass."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(*operands)
    result: Tensor = checkpoint(function, *operands, use_reentrant=False, preserve_rng_state=False)
    return result
