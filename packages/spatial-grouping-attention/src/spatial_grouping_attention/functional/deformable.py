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

from .interpolation import interpolate, spread


def point_weights(
    q: Tensor,
    k: Tensor,
    points: Tensor,
    visible: Tensor,
    shape: Sequence[int],
    *,
    scale: float,
    bias: Tensor | None = None,
) -> Tensor:
    """Share of every token that goes to each of its points: ``softmax_p (scale <k_i, q(x_ip)> + bias_p)``.

    Args:
        q: group queries (B, H, N_out, D).
        k: fine keys (B, H, N_in, D).
        points: positions x in steps of the grid of groups (B, H, N_in, P, ndim). Differentiable.
        visible: (N_in, P) boolean; at least one point of every token.
        shape: grid of groups, product N_out.
        scale: factor of the products.
        bias: (H, P) or None.

    Returns:
        (B, H, N_in, P) in float32 at least; rows sum to 1.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)

    def logits(q: Tensor, k: Tensor, some: Tensor) -> Tensor:
        seen = _seen(q.to(dtype), some, shape)
        return scale * (k.to(dtype).unsqueeze(3) * seen).sum(-1)

    scores = torch.cat([_recomputed(logits, q, k, some) for some in _parts(points)], dim=3)
    if bias is not None:
        scores = scores + bias.to(dtype)[:, None, :]
    return scores.masked_fill(~visible, -torch.inf).softmax(-1)


def assign(weights: Tensor, points: Tensor, u: Tensor, shape: Sequence[int]) -> Tensor:
    """Values of the groups (B, H, N_out, C) -> of the fine tokens (B, H, N_in, C): ``sum_p a_ip u(x_ip)``."""

    def part(weight: Tensor, some: Tensor, u: Tensor) -> Tensor:
        return (weight.unsqueeze(-1) * _seen(u.to(weight.dtype), some, shape)).sum(3)

    out: Tensor = torch.zeros((), dtype=weights.dtype, device=u.device)
    for weight, some in zip(_parts(weights), _parts(points), strict=True):
        out = out + _recomputed(part, weight, some, u)
    return out.to(u.dtype)


def collect(weights: Tensor, points: Tensor, v: Tensor, shape: Sequence[int]) -> Tensor:
    """Values of the fine tokens (B, H, N_in, C) -> sums over the groups' members (B, H, N_out, C): ``A^T v``."""

    def part(weight: Tensor, some: Tensor, v: Tensor) -> Tensor:
        given = weight.unsqueeze(-1) * v.to(weight.dtype).unsqueeze(3)
        return spread(given.flatten(2, 3), some.flatten(2, 3), shape)

    out: Tensor = torch.zeros((), dtype=weights.dtype, device=v.device)
    for weight, some in zip(_parts(weights), _parts(points), strict=True):
        out = out + _recomputed(part, weight, some, v)
    return out.to(v.dtype)


def pool(weights: Tensor, points: Tensor, v: Tensor, shape: Sequence[int]) -> Tensor:
    """Averages of the fine tokens' values (B, H, N_in, C) over the groups' members (B, H, N_out, C)."""
    wide = v.to(weights.dtype)
    total = collect(weights, points, torch.cat((wide, torch.ones_like(wide[..., :1])), -1), shape)
    mass = total[..., -1:]
    return (total[..., :-1] / mass.masked_fill(mass == 0, 1.0)).to(v.dtype)


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
