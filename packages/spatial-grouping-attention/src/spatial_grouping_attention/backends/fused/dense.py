"""The dense operators and their gradients by the identities of attention.

``assign`` is ordinary attention with the fine tokens as queries and the groups as keys; ``pool`` is ordinary attention
the other way round, with ``-lse`` as one bias per key:

    D_ij = A_ij / sum_i A_ij = softmax_i (s_ij - l_i)

Grouping chains the normalisers l and ``pool``. The gradient of l needs no score either: with E_i = sum_j A_ij q_j it
is dk_i = scale dl_i E_i and dq_j = scale sum_i A_ij dl_i k_i, and the latter's sum is the average that ``pool``
computes of dl k, times the group's mass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..operands import Gradients, Operands, Pooled, Problem
from ..semantics import LOWEST, rows_like, scalars_like, widened
from .channels import Call, append
from .frames import attention, attention_backward, frames_of, weighted_means


def refusals(problem: Problem) -> list[str]:
    """Reasons why torch's kernels cannot serve a call; empty where they can."""
    reasons = []
    if problem.device.type not in ("cpu", "cuda", "meta"):
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
    q, k, (u, centre) = _widen(x.q), _widen(x.k), _centred(x.values)
    out, lse = attention(Call(k, q, u, x.scale, _group_bias(x)), frames_of(x)[0])
    out, nobody = _moved(out, centre), _nobody(x)
    if nobody is not None:
        out, lse = out.masked_fill(nobody[..., None], 0.0), lse.masked_fill(nobody, torch.inf)
    return _into(rows_like(x.values, *out.shape[2:]), out), _into(scalars_like(x.k), lse)


def assign_backward(x: Operands, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
    """Gradients of :func:`assign`; a normaliser of +inf makes all memberships of its token 0."""
    q, k, (u, centre) = _for_backward(x)
    grad_out, out = grad_out.to(u.dtype), _moved(out, centre, -1).to(u.dtype)
    call = Call(k, q, u, x.scale, _group_bias(x))
    dk, dq, du, _, dbeta = attention_backward(call, out, lse, grad_out, grad_lse, frames_of(x)[0])
    return _gradients(x, dq, dk, du, None, dbeta)


def pool(x: Operands, lse: Tensor | None) -> Pooled:
    """Averages over the members of every group; without ``lse`` with the logits' own normalisers."""
    q, k, (v, centre) = _widen(x.q), _widen(x.k), _centred(x.values)
    nobody, may_be_empty, expected_q = _nobody(x), lse is not None, None
    of_tokens, of_groups = frames_of(x, own_lse=lse is None)
    if lse is None:
        expected_q, own = attention(Call(k, q, q, x.scale, _group_bias(x)), of_tokens)
        expected_q, lse = _into(torch.empty_like(x.k), expected_q), _into(scalars_like(x.k), own)
    if nobody is not None:
        lse, may_be_empty = lse.masked_fill(nobody, torch.inf), True
    out, log_mass = attention(Call(q, k, v, x.scale, _key_bias(lse)), of_groups)
    out = _moved(out, centre)
    if may_be_empty:
        # Where no token of the sample takes part, the kernel averages over all that do not.
        empty = (lse == torch.inf).all(-1, keepdim=True)
        if x.valid_groups is not None:
            empty = empty | ~x.valid_groups[:, None, :]
        out, log_mass = out.masked_fill(empty[..., None], 0.0), log_mass.masked_fill(empty, -torch.inf)
    out = _into(rows_like(x.values, *out.shape[2:]), out)
    return Pooled(out, _into(scalars_like(x.q), log_mass), lse, expected_q)


def pool_backward(
    x: Operands, pooled: Pooled, grad_out: Tensor, grad_mass: Tensor | None, grad_lse: Tensor | None
) -> Gradients:
    """Gradients of :func:`pool`; ``grad_lse`` given means that lse is the logits' own normaliser."""
    q, k, (v, centre) = _for_backward(x)
    grad_out, out = grad_out.to(v.dtype), _moved(pooled.out, centre, -1).to(v.dtype)
    nobody = _nobody(x)  # of whom a given lse does not know
    key_bias = _key_bias(pooled.lse if nobody is None else pooled.lse.masked_fill(nobody, torch.inf))
    # A mass of +inf makes all shares in its group 0: an empty group has no members to send anything to.
    log_mass = pooled.log_mass.masked_fill(pooled.log_mass == -torch.inf, torch.inf)
    mass, channels = pooled.log_mass.exp()[..., None], v.shape[-1]
    measured = grad_lse is not None and v.dtype == mass.dtype
    if measured:
        v, out, grad_out = append(v, 0.0), append(out, 0.0), append(grad_out, mass)
    _, frames = frames_of(x, own_lse=grad_lse is not None)
    call = Call(q, k, v, x.scale, key_bias)
    dq, dk, dv, dbias, dbeta = attention_backward(call, out, log_mass, grad_out, grad_mass, frames)
    dlse = -dbias.to(pooled.lse.dtype)  # type: ignore[union-attr]  # there is a key bias
    if grad_lse is None:
        return _gradients(x, dq, dk, dv, dlse, dbeta)
    dlse = (dlse + grad_lse).masked_fill_(pooled.lse == torch.inf, 0.0)
    arriving = (dlse * x.scale)[..., None]
    # Where logits are large, rounding them makes a token's memberships, exp(s - l), sum up to something near one; what
    # cancels exactly in theory needs exactly one. The channel of masses has gathered that sum.
    spread = dv[..., channels:].clamp(min=0.5) if measured else 1.0
    mean, squares = weighted_means(call, (arriving / spread).squeeze(-1), frames)
    if dbeta is not None and squares is not None:
        dbeta = dbeta - (mass.squeeze(-1) * squares).sum((0, 2)) / x.scale
    dk = dk + arriving * pooled.expected_q  # type: ignore[operator]  # kept with the logits' own normaliser
    return _gradients(x, dq + mass * mean, dk, dv[..., :channels], dlse, dbeta)


def _gradients(
    x: Operands, dq: Tensor, dk: Tensor, dvalues: Tensor, dlse: Tensor | None, dbeta: Tensor | None
) -> Gradients:
    """Gradients in the operands' dtypes and places."""
    of_operands = zip((x.q, x.k, x.values), (dq, dk, dvalues), strict=True)
    dq, dk, dvalues = (_into(torch.empty_like(operand), gradient) for operand, gradient in of_operands)
    return Gradients(dq, dk, dvalues, None, None if dlse is None else _into(scalars_like(x.k), dlse), dbeta)


def _into(room: Tensor, x: Tensor) -> Tensor:
    """What a kernel returned, with the type and the place in memory that the operators promise."""
    return x if x.dtype == room.dtype and x.stride() == room.stride() else room.copy_(x)


def _key_bias(lse: Tensor) -> Tensor:
    """``-lse`` (B, H, N_in), finite for tokens that belong to nobody."""
    return (-lse).clamp(min=LOWEST)


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
    bias = torch.zeros(x.valid_groups.shape, dtype=widened(x.q.dtype), device=x.q.device).masked_fill(
        ~x.valid_groups, LOWEST
    )
    return bias[:, None, :].expand(-1, x.q.shape[1], -1)


def _widen(x: Tensor) -> Tensor:
    """On a CPU half types are computed in float32: as fast there, and exact to it."""
    return x.float() if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) else x


def _for_backward(x: Operands) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor | None]]:
    """Queries, keys and centred values; the gradient of compactness subtracts squares, which half types would round."""
    if x.compactness is None:
        return _widen(x.q), _widen(x.k), _centred(x.values)
    q, k, values = (operand.to(widened(operand.dtype)) for operand in (x.q, x.k, x.values))
    return q, k, (values, None)


def _centred(values: Tensor) -> tuple[Tensor, Tensor | None]:
    """Values for a kernel, and what must be added to their averages.

    A kernel for half types rounds its averages and subtracts products with them from products with the values. That
    leaves most where both are small; averages of values less a constant are the averages less that constant.
    """
    values = _widen(values)
    if values.dtype == widened(values.dtype):
        return values, None
    centre = values.mean(2, keepdim=True, dtype=torch.float32)
    return (values - centre).to(values.dtype), centre


def _moved(x: Tensor, centre: Tensor | None, factor: int = 1) -> Tensor:
    return x if centre is None else x + factor * centre
