"""The dense operators and their gradients by the identities of attention.

``assign`` is ordinary attention with the fine tokens as queries and the groups as keys; ``pool`` is ordinary attention
the other way round, with ``-lse`` as one bias per key:

    D_ij = A_ij / sum_i A_ij = softmax_i (s_ij - l_i)

Grouping chains the normalisers l and ``pool``. The gradient of l needs no score either: with E_i = sum_j A_ij q_j it
is dk_i = dl_i E_i and dq_j = sum_i A_ij dl_i k_i, and the latter is the average that ``pool`` computes of dl k, times
the group's mass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autograd import Once, without_autocast
from ..operands import Operands, Pooled, Problem
from ..semantics import LOWEST
from . import flash


def refusals(problem: Problem) -> list[str]:
    """Reasons why torch's kernels cannot serve a call; empty where they can."""
    reasons = []
    if problem.device.type not in ("cpu", "cuda"):
        reasons.append(
            f"torch's attention kernels return their log-sum-exp on cpu and cuda only; got {problem.device.type}"
        )
    elif problem.device.type == "cuda" and problem.dtype == torch.float64:
        reasons.append("torch's CUDA attention kernels do not take float64")
    if not problem.dense:
        reasons.append("fused is dense: it needs neighbourhood=None or a window that covers every group")
    if problem.bias is not None:
        reasons.append(f"fused takes no bias; got a {problem.bias} one: its kernels give it no gradient")
    return reasons


def assign(x: Operands) -> tuple[Tensor, Tensor]:
    """``A u`` and the tokens' normalisers."""
    q, k, values = _widen(x.q), _widen(x.k), _widen(x.values)
    out, lse = _apply(_Assign, q, k, values, _group_bias(x), x.scale)
    nobody = _nobody(x)
    if nobody is not None:
        out, lse = out.masked_fill(nobody[..., None], 0.0), lse.masked_fill(nobody, torch.inf)
    return out.to(x.values.dtype), lse


def pool(x: Operands, lse: Tensor | None) -> Pooled:
    """Averages over the members of every group; without ``lse`` with the logits' own normalisers."""
    q, k, values = _widen(x.q), _widen(x.k), _widen(x.values)
    nobody, may_be_empty = _nobody(x), lse is not None
    if lse is None:
        lse = _apply(_Normaliser, q, k, _group_bias(x), x.scale)
    if nobody is not None:
        lse, may_be_empty = lse.masked_fill(nobody, torch.inf), True
    out, log_mass = _apply(_Pool, q, k, values, (-lse).clamp(min=LOWEST), x.scale)
    if may_be_empty:
        # Where no token of the sample takes part, the kernel averages over all that do not.
        empty = log_mass < LOWEST / 2
        if x.valid_groups is not None:
            empty = empty | ~x.valid_groups[:, None, :]
        out, log_mass = out.masked_fill(empty[..., None], 0.0), log_mass.masked_fill(empty, -torch.inf)
    return Pooled(out.to(x.values.dtype), log_mass, lse)


def _nobody(x: Operands) -> Tensor | None:
    """(B, 1, N_in) tokens that belong to no group, None where every token belongs to some."""
    nobody = None if x.valid is None else ~x.valid[:, None, :]
    if x.valid_groups is not None:
        nothing_to_see = ~x.valid_groups.any(1)[:, None, None]
        nobody = nothing_to_see.expand(-1, -1, x.k.shape[2]) if nobody is None else nobody | nothing_to_see
    return nobody


def _group_bias(x: Operands) -> Tensor | None:
    """(B, H, N_out) bias that hides groups which are not valid."""
    if x.valid_groups is None:
        return None
    wide = torch.promote_types(x.q.dtype, torch.float32)
    bias = torch.zeros(x.valid_groups.shape, dtype=wide, device=x.q.device).masked_fill(~x.valid_groups, LOWEST)
    return bias[:, None, :].expand(-1, x.q.shape[1], -1)


def _apply(function: type[torch.autograd.Function], *operands: Any) -> Any:
    """``Function.apply``, which torch leaves untyped."""
    return function.apply(*operands)  # type: ignore[no-untyped-call]


def _widen(x: Tensor) -> Tensor:
    """On a CPU half types are computed in float32: as fast there, and exact to it."""
    return x.float() if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) else x


class _Assign(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, u: Tensor, group_bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse = flash.attention(k, q, u, scale, group_bias)
        ctx.save_for_backward(q, k, u, group_bias, out, lse)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_apply(Once, _assign_backward, *ctx.saved_tensors, grad_out, grad_lse, ctx.scale), None, None


@without_autocast
def _assign_backward(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    group_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    scale: float,
) -> tuple[Tensor, ...]:
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    dk, dq, du, _ = flash.attention_backward(grad_out, grad_lse, k, q, u, out, lse, scale, group_bias)
    return dq, dk, du


class _Normaliser(torch.autograd.Function):
    """lse_i = logsumexp_j s_ij."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, group_bias: Tensor | None, scale: float) -> Tensor:
        expected_q, lse = flash.attention(k, q, q, scale, group_bias)
        ctx.save_for_backward(q, k, expected_q, lse)
        ctx.scale = scale
        return lse

    @staticmethod
    def backward(ctx: Any, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        return *_apply(Once, _normaliser_backward, *ctx.saved_tensors, grad_lse, ctx.scale), None, None


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
