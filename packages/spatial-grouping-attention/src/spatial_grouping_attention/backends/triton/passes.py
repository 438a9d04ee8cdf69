"""The four passes on operands: what is allocated, and which kernels run in which order.

Programs keep whole rows of values in registers, so values of many channels are worked through in slices. Every slice
recomputes the logits; gradients are linear in the values, so the slices' gradients of q, k, bias and normalisers add
up, and what arrives through normalisers and masses enters with the first slice alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..operands import Gradients, Operands, Pooled
from ..semantics import rows_like, scalars_like
from . import backward, forward, table
from .launch import Tensors, group_pass, row_pass, table_pass, token_pass

# Channels of values that a program holds at once.
MOST_CHANNELS = 128


def assign(x: Operands) -> tuple[Tensor, Tensor]:
    """See :func:`.triton.assign`."""
    out, lse = rows_like(x.values, x.k.shape[2], x.values.shape[3]), scalars_like(x.k)
    for c in _slices(x.values):
        part = x._replace(values=x.values[..., c])
        token_pass(forward.token_forward, part, {"u": part.values, "lse": lse, "out": out[..., c]})
    return out, lse


def pool(x: Operands, lse: Tensor | None) -> Pooled:
    """See :func:`.triton.pool`."""
    if lse is None:
        lse = scalars_like(x.k)
        token_pass(forward.token_forward, x._replace(values=x.values[..., :1]), {"u": None, "lse": lse, "out": None})
    out, log_mass = rows_like(x.values, x.q.shape[2], x.values.shape[3]), scalars_like(x.q)
    for c in _slices(x.values):
        part = x._replace(values=x.values[..., c])
        tensors: Tensors = {"v": part.values, "lse": lse, "log_mass": log_mass, "out": out[..., c]}
        group_pass(forward.group_forward, part, tensors)
    return Pooled(out, log_mass, lse)


def assign_backward(x: Operands, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
    """See :func:`.triton.assign_backward`."""
    du, total = torch.empty_like(x.values), None
    for i, c in enumerate(_slices(x.values)):
        part, grad = x._replace(values=x.values[..., c]), grad_out[..., c]
        dq, dk, delta = _room(x.q, x), _room(x.k, x), scalars_like(x.k)
        shared: Tensors = {"u": part.values, "grad": grad, "lse": lse, "delta": delta}
        arriving = {"out": out[..., c], "grad_lse": grad_lse if i == 0 else None}
        token_pass(backward.assign_backward_tokens, part, {**shared, **arriving, "dk": dk})
        dcompactness = group_pass(backward.assign_backward_groups, part, {**shared, "dq": dq, "du": du[..., c]})
        sides: Tensors = {"of_tokens": grad, "of_groups": part.values, "lse": lse, "log_mass": None}
        dbias = table_pass(
            table.table_backward, part, {**sides, "token_delta": delta, "group_delta": None, "dlse": None}
        )
        total = _added(total, Gradients(dq, dk, du, dbias, None, dcompactness))
    return _in_dtypes_of(x, total)


def pool_backward(
    x: Operands, pooled: Pooled, grad_out: Tensor, grad_mass: Tensor | None, grad_lse: Tensor | None
) -> Gradients:
    """See :func:`.triton.pool_backward`."""
    dv, own_lse, total = torch.empty_like(x.values), grad_lse is not None, None
    for i, c in enumerate(_slices(x.values)):
        part, grad = x._replace(values=x.values[..., c]), grad_out[..., c]
        dq, dk, dlse, delta = _room(x.q, x), _room(x.k, x), scalars_like(x.k), scalars_like(x.q)
        arriving = {"grad": grad, "out": pooled.out[..., c], "grad_mass": grad_mass if i == 0 else None}
        row_pass(backward.group_deltas, part, {**arriving, "delta": delta})
        shared: Tensors = {"v": part.values, "grad": grad, "lse": pooled.lse, "log_mass": pooled.log_mass}
        shared |= {"delta": delta, "dlse": dlse}
        results = {"grad_lse": grad_lse if i == 0 else None, "dk": dk, "dv": dv[..., c]}
        token_pass(backward.pool_backward_tokens, part, {**shared, **results}, OWN_LSE=own_lse)
        dcompactness = group_pass(backward.pool_backward_groups, part, {**shared, "dq": dq}, OWN_LSE=own_lse)
        sides: Tensors = {"of_tokens": part.values, "of_groups": grad, "lse": pooled.lse, "log_mass": pooled.log_mass}
        of_lse = dlse if own_lse else None
        dbias = table_pass(
            table.table_backward, part, {**sides, "token_delta": None, "group_delta": delta, "dlse": of_lse}
        )
        total = _added(total, Gradients(dq, dk, dv, dbias, dlse, dcompactness))
    return _in_dtypes_of(x, total)


def _slices(values: Tensor) -> list[slice]:
    """Channels in slices that programs can hold; one slice where there are no channels, for what else a pass makes."""
    return [slice(i, i + MOST_CHANNELS) for i in range(0, max(values.shape[3], 1), MOST_CHANNELS)]


def _room(operand: Tensor, x: Operands) -> Tensor:
    """Uninitialised gradient of q or k from one slice: float32 where there are more, whose sum is rounded once."""
    several = x.values.shape[3] > MOST_CHANNELS
    return torch.empty_like(operand, dtype=torch.float32 if several else operand.dtype)


def _added(total: Gradients | None, part: Gradients) -> Gradients:
    """The sum over slices with one more; gradients of values are not summed, every slice has its own channels."""
    if total is None:
        return part
    total.q.add_(part.q)
    total.k.add_(part.k)
    of_both = (total.bias, part.bias), (total.lse, part.lse), (total.compactness, part.compactness)
    for of_slices, of_slice in of_both:
        if of_slices is not None and of_slice is not None:
            of_slices.add_(of_slice)
    return total


def _in_dtypes_of(x: Operands, total: Gradients | None) -> Gradients:
    assert total is not None  # there is at least one slice
    dbias = dcompactness = None
    if x.bias is not None and total.bias is not None:
        dbias = torch.empty_like(x.bias).copy_(total.bias.view(x.bias.shape))
    if x.compactness is not None and total.compactness is not None:
        dcompactness = torch.empty_like(x.compactness).copy_(total.compactness)
    dq, dk = total.q.to(x.q.dtype), total.k.to(x.k.dtype)
    return Gradients(dq, dk, total.values, dbias, total.lse, dcompactness)
