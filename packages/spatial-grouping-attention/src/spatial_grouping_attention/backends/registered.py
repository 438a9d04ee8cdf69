"""The windowed operators as torch sees them: schemas, shapes for tracing and gradients, once for all engines.

Registered with ``torch.library``, they are taken by ``torch.compile`` and ``torch.export`` as they are: a compiler
would unroll the chunks of an engine. A schema has no place for a bundle, so here, and only here, operands travel one
by one: the engine's name, the neighbourhood as its integers, the rest as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..geometry import Neighbourhood
from .autograd import refuse_second_derivative, without_autocast
from .engines import engine
from .operands import Operands, Pooled
from .semantics import rows_like, scalars_like

_OP = "spatial_grouping_attention::windowed_"


def assign(x: Operands, name: str) -> tuple[Tensor, Tensor]:
    """Values of the groups for every fine token, and the tokens' normalisers, by the engine of that name."""
    out, lse = _assign(name, *_spread(x))
    return out, lse


def pool(x: Operands, lse: Tensor | None, name: str) -> Pooled:
    """Averages over the members of every group; without ``lse`` with the logits' own normalisers."""
    out, log_mass, own_lse = _pool(name, *_spread(x), lse)
    return Pooled(out, log_mass, own_lse if lse is None else lse)


def _spread(x: Operands) -> tuple[Any, ...]:
    """Operands in the order of the schemas."""
    geometry = x.neighbourhood.integers()  # type: ignore[union-attr]
    return x.q, x.k, x.values, x.bias, x.valid, x.valid_groups, geometry, x.scale


def _gather(
    q: Tensor,
    k: Tensor,
    values: Tensor,
    bias: Tensor | None,
    valid: Tensor | None,
    valid_groups: Tensor | None,
    geometry: list[int],
    scale: float,
) -> Operands:
    """The bundle that :func:`_spread` took apart."""
    return Operands(q, k, values, Neighbourhood.from_integers(geometry), scale, bias, valid, valid_groups)


@torch.library.custom_op(_OP + "assign", mutates_args=())
@without_autocast
def _assign(
    name: str,
    q: Tensor,
    k: Tensor,
    u: Tensor,
    bias: Tensor | None,
    valid: Tensor | None,
    valid_groups: Tensor | None,
    geometry: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    out, lse = engine(name).assign(_gather(q, k, u, bias, valid, valid_groups, geometry, scale))
    return out, lse


@torch.library.custom_op(_OP + "pool", mutates_args=())
@without_autocast
def _pool(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    valid: Tensor | None,
    valid_groups: Tensor | None,
    geometry: list[int],
    scale: float,
    given_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, log_mass, lse); lse is empty where it was given, because an operator may not return its argument."""
    pooled = engine(name).pool(_gather(q, k, v, bias, valid, valid_groups, geometry, scale), given_lse)
    return pooled.out, pooled.log_mass, pooled.lse if given_lse is None else q.new_empty(0)


@torch.library.custom_op(_OP + "assign_backward", mutates_args=())
@without_autocast
def _assign_backward(
    name: str,
    q: Tensor,
    k: Tensor,
    u: Tensor,
    bias: Tensor | None,
    valid: Tensor | None,
    valid_groups: Tensor | None,
    geometry: list[int],
    scale: float,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to (q, k, u, bias), the last one empty where there is no bias."""
    x = _gather(q, k, u, bias, valid, valid_groups, geometry, scale)
    gradients = engine(name).assign_backward(x, out, lse, grad_out, grad_lse)
    return gradients.q, gradients.k, gradients.values, q.new_empty(0) if bias is None else gradients.bias


@torch.library.custom_op(_OP + "pool_backward", mutates_args=())
@without_autocast
def _pool_backward(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    valid: Tensor | None,
    valid_groups: Tensor | None,
    geometry: list[int],
    scale: float,
    out: Tensor,
    log_mass: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_mass: Tensor,
    grad_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to (q, k, v, bias, lse); ``grad_lse`` given means that lse is the logits' own normaliser.

    Then what reaches lse, from outside and through the averages, goes on into the logits, and the last result is
    unused.
    """
    x = _gather(q, k, v, bias, valid, valid_groups, geometry, scale)
    gradients = engine(name).pool_backward(x, Pooled(out, log_mass, lse), grad_out, grad_mass, grad_lse)
    dbias = q.new_empty(0) if bias is None else gradients.bias
    return gradients.q, gradients.k, gradients.values, dbias, gradients.lse


@_assign.register_fake
def _(name, q, k, u, *rest):  # type: ignore[no-untyped-def]
    return rows_like(u, k.shape[2], u.shape[3]), scalars_like(k)


@_pool.register_fake
def _(name, q, k, v, bias, valid, valid_groups, geometry, scale, given_lse):  # type: ignore[no-untyped-def]
    lse = scalars_like(k) if given_lse is None else q.new_empty(0)
    return rows_like(v, q.shape[2], v.shape[3]), scalars_like(q), lse


def _empty_gradients(q: Tensor, k: Tensor, values: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    dbias = q.new_empty(0) if bias is None else torch.empty_like(bias)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(values), dbias


@_assign_backward.register_fake
def _(name, q, k, u, bias, *rest):  # type: ignore[no-untyped-def]
    return _empty_gradients(q, k, u, bias)


@_pool_backward.register_fake
def _(name, q, k, v, bias, *rest):  # type: ignore[no-untyped-def]
    return *_empty_gradients(q, k, v, bias), scalars_like(k)


_OPERANDS = 9
"""Arguments that all four operators share: the engine's name and what :func:`_spread` yields."""


def _save_assign(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.name, *tensors, ctx.geometry, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate_assign(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    *tensors, out, lse = ctx.saved_tensors
    call = (ctx.name, *tensors, ctx.geometry, ctx.scale)
    dq, dk, du, dbias = _assign_backward(*call, out, lse, grad_out, grad_lse)
    return None, dq, dk, du, None if tensors[3] is None else dbias, *(None,) * (_OPERANDS - 5)


def _save_pool(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.name, *tensors, ctx.geometry, ctx.scale, given_lse = inputs
    out, log_mass, lse = output
    ctx.own_lse = given_lse is None
    ctx.save_for_backward(*tensors, out, log_mass, lse if ctx.own_lse else given_lse)


def _differentiate_pool(ctx: Any, grad_out: Tensor, grad_mass: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
    *tensors, out, log_mass, lse = ctx.saved_tensors
    call = (ctx.name, *tensors, ctx.geometry, ctx.scale)
    own_grad_lse = grad_lse if ctx.own_lse else None
    dq, dk, dv, dbias, dlse = _pool_backward(*call, out, log_mass, lse, grad_out, grad_mass, own_grad_lse)
    dbias = None if tensors[3] is None else dbias
    return None, dq, dk, dv, dbias, *(None,) * (_OPERANDS - 5), None if ctx.own_lse else dlse


_assign.register_autograd(_differentiate_assign, setup_context=_save_assign)
_pool.register_autograd(_differentiate_pool, setup_context=_save_pool)
_assign_backward.register_autograd(refuse_second_derivative)
_pool_backward.register_autograd(refuse_second_derivative)
