"""Dense operators on torch's fused attention kernels: exact, and memory O(N) forward and backward.

The signatures are those of :mod:`.reference`. ``assign`` is ordinary attention with the fine tokens as queries and
the groups as keys; ``pool`` is ordinary attention the other way round, with ``-lse`` as one bias per key:

    D_ij = A_ij / sum_i A_ij = softmax_i (s_ij - l_i)

``grouping_attention`` chains the normalisers l and ``pool``. The gradient of l needs no score either: with
E_i = sum_j A_ij q_j it is dk_i = dl_i E_i and dq_j = sum_i A_ij dl_i k_i, and the latter is the average that ``pool``
computes of dl k, times the group's mass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..geometry import Neighbourhood
from . import flash
from .once import Once, without_autocast


def assign(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    neighbourhood: Neighbourhood | None,
    scale: float,
    bias: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`.reference.assign`; every token sees every group, no bias."""
    q, k, values = _widen(q), _widen(k), _widen(u)
    out, lse = _apply(_Assign, q, k, values, scale)
    if valid is not None:
        nobody = ~valid[:, None, :]
        out, lse = out.masked_fill(nobody[..., None], 0.0), lse.masked_fill(nobody, torch.inf)
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
    """See :func:`.reference.pool`; every token sees every group, no bias."""
    out, log_mass = _apply(_Pool, _widen(q), _widen(k), _widen(v), _key_bias(lse, valid), scale)
    # A group is empty only where no token of the sample is valid; the kernel then averages its padding.
    empty = log_mass < flash.LOWEST / 2
    return out.masked_fill(empty[..., None], 0.0).to(v.dtype), log_mass.masked_fill(empty, -torch.inf)


def grouping_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    neighbourhood: Neighbourhood | None,
    scale: float,
    bias: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`.reference.grouping_attention`; every token sees every group, no bias."""
    lse: Tensor = _apply(_Normaliser, _widen(q), _widen(k), scale)
    if valid is not None:
        lse = lse.masked_fill(~valid[:, None, :], torch.inf)
    out, log_mass = pool(q, k, v, lse, neighbourhood, scale, bias, valid)
    return out, lse, log_mass


def _apply(function: type[torch.autograd.Function], *operands: Any) -> Any:
    """``Function.apply``, which torch leaves untyped."""
    return function.apply(*operands)  # type: ignore[no-untyped-call]


def _widen(x: Tensor) -> Tensor:
    """On a CPU half types are computed in float32: as fast there, and exact to it."""
    return x.float() if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) else x


def _key_bias(lse: Tensor, valid: Tensor | None) -> Tensor:
    if valid is not None:
        lse = lse.masked_fill(~valid[:, None, :], torch.inf)
    return (-lse).clamp(min=flash.LOWEST)


class _Assign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, u: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = flash.attention(k, q, u, scale)
        ctx.save_for_backward(q, k, u, out, lse)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_apply(Once, _assign_backward, *ctx.saved_tensors, grad_out, grad_lse, ctx.scale), None


@without_autocast
def _assign_backward(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    scale: float,
) -> tuple[Tensor, ...]:
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    dk, dq, du, _ = flash.attention_backward(grad_out, grad_lse, k, q, u, out, lse, scale)
    return dq, dk, du


class _Normaliser(torch.autograd.Function):
    """lse_i = logsumexp_j s_ij."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, scale: float) -> Tensor:
        expected_q, lse = flash.attention(k, q, q, scale)
        ctx.save_for_backward(q, k, expected_q, lse)
        ctx.scale = scale
        return lse

    @staticmethod
    def backward(ctx: Any, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        return *_apply(Once, _normaliser_backward, *ctx.saved_tensors, grad_lse, ctx.scale), None


@without_autocast
def _normaliser_backward(
    q: Tensor, k: Tensor, expected_q: Tensor, lse: Tensor, grad_lse: Tensor, scale: float
) -> tuple[Tensor, ...]:
    grad_lse = (grad_lse * scale).unsqueeze(-1)
    mean, log_mass = flash.attention(q, k, (grad_lse * k).to(k.dtype), scale, key_bias=-lse)
    dq = log_mass.exp().unsqueeze(-1) * mean
    return dq.to(q.dtype), (grad_lse * expected_q).to(k.dtype)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, log_mass = flash.attention(q, k, v, scale, key_bias)
        ctx.save_for_backward(q, k, v, key_bias, out, log_mass)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return out, log_mass

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_mass: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_apply(Once, _pool_backward, *ctx.saved_tensors, grad_out, grad_mass, ctx.scale), None


@without_autocast
def _pool_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor,
    out: Tensor,
    log_mass: Tensor,
    grad_out: Tensor | None,
    grad_mass: Tensor | None,
    scale: float,
) -> tuple[Tensor | None, ...]:
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    return flash.attention_backward(grad_out, grad_mass, q, k, v, out, log_mass, scale, key_bias)
