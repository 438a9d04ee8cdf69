"""The operators as torch sees them: schemas, shapes for tracing, gradients and batching, once for all engines.

Registered with ``torch.library``, they are taken by ``torch.compile`` and ``torch.export`` as they are: a compiler
would unroll the chunks of an engine. Where nobody looks on, engines are called without that way round. A schema has
no place for a bundle, so here, and only here, operands travel one by one: the engine's name, the neighbourhood as its
integers, the rest as it is.

Averages leave the operators in float32 at least, and are rounded outside. The backward passes subtract ``g . out``
from ``g . v``: where the values of a group are alike the two nearly cancel, and what rounding did to ``out`` would be
all that is left.
"""

from __future__ import annotations

from typing import Any

import torch
from RoSE.direct import directly, is_watched
from torch import Tensor

from ..geometry import Neighbourhood
from .autograd import once, refuse_second_derivative, without_autocast
from .engines import KEEPING, engine
from .flops import announce
from .operands import Gradients, Operands, Pooled
from .semantics import rows_like, scalars_like
from .transforms import mapped, under_transform

_OP = "spatial_grouping_attention::"


def assign(x: Operands, name: str) -> tuple[Tensor, Tensor]:
    """Values of the groups for every fine token, and the tokens' normalisers, by the engine of that name."""
    announce()
    watched = _assign if is_watched(x.q, x.k, x.values) else _assign_directly
    out, lse = (_assign_transformed if under_transform() else watched)(name, *_spread(x))
    return out.to(x.values.dtype), lse


def pool(x: Operands, lse: Tensor | None, name: str) -> Pooled:
    """Averages over the members of every group; without ``lse`` with the logits' own normalisers."""
    announce()
    watched = _pool if is_watched(x.q, x.k, x.values) else _pool_directly
    out, log_mass, own_lse, _ = (_pool_transformed if under_transform() else watched)(name, *_spread(x), lse)
    return Pooled(out.to(x.values.dtype), log_mass, own_lse if lse is None else lse)


def _spread(x: Operands) -> tuple[Any, ...]:
    """Operands in the order of the schemas."""
    geometry = [] if x.neighbourhood is None else x.neighbourhood.integers()
    return x.q, x.k, x.values, x.bias, x.compactness, x.valid, x.valid_groups, geometry, x.scale


def _gather(
    q: Tensor,
    k: Tensor,
    values: Tensor,
    bias: Tensor | None,
    compactness: Tensor | None,
    valid: Tensor | None,
    valid_groups: Tensor | None,
    geometry: list[int],
    scale: float,
) -> Operands:
    """The bundle that :func:`_spread` took apart."""
    neighbourhood = Neighbourhood.from_integers(geometry) if geometry else None
    masks = {"valid": valid, "valid_groups": valid_groups}
    return Operands(q, k, values, neighbourhood, scale, bias, compactness=compactness, **masks)


@without_autocast
def _run_assign(
    name: str,
    q: Tensor,
    k: Tensor,
    u: Tensor,
    bias: Tensor | None,
    compactness: Tensor | None,
    valid: Tensor | None,
    valid_groups: Tensor | None,
    geometry: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    out, lse = engine(name).assign(_gather(q, k, u, bias, compactness, valid, valid_groups, geometry, scale))
    return out, lse


@without_autocast
def _run_pool(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    compactness: Tensor | None,
    valid: Tensor | None,
    valid_groups: Tensor | None,
    geometry: list[int],
    scale: float,
    given_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, log_mass, lse, expected_q); the last two are empty where there is nothing to return.

    That is lse where it was given, because an operator may not return its argument.
    """
    pooled = engine(name).pool(_gather(q, k, v, bias, compactness, valid, valid_groups, geometry, scale), given_lse)
    lse = pooled.lse if given_lse is None else q.new_empty(0)
    return pooled.out, pooled.log_mass, lse, q.new_empty(0) if pooled.expected_q is None else pooled.expected_q


@without_autocast
def _run_assign_backward(
    name: str,
    q: Tensor,
    k: Tensor,
    u: Tensor,
    bias: Tensor | None,
    compactness: Tensor | None,
    valid: Tensor | None,
    valid_groups: Tensor | None,
    geometry: list[int],
    scale: float,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to (q, k, u, bias, compactness), of the last two empty where there is none."""
    x = _gather(q, k, u, bias, compactness, valid, valid_groups, geometry, scale)
    gradients = engine(name).assign_backward(x, out, lse, grad_out, grad_lse)
    return gradients.q, gradients.k, gradients.values, *_of_heads(gradients, q)


@without_autocast
def _run_pool_backward(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    compactness: Tensor | None,
    valid: Tensor | None,
    valid_groups: Tensor | None,
    geometry: list[int],
    scale: float,
    out: Tensor,
    log_mass: Tensor,
    lse: Tensor,
    expected_q: Tensor | None,
    grad_out: Tensor,
    grad_mass: Tensor | None,
    grad_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to (q, k, v, bias, compactness, lse); ``grad_lse`` given means that lse is the logits' own normaliser.

    Then what reaches lse, from outside and through the averages, goes on into the logits, and the last result is
    unused.
    """
    x = _gather(q, k, v, bias, compactness, valid, valid_groups, geometry, scale)
    pooled = Pooled(out, log_mass, lse, expected_q)
    gradients = engine(name).pool_backward(x, pooled, grad_out, grad_mass, grad_lse)
    return gradients.q, gradients.k, gradients.values, *_of_heads(gradients, q), gradients.lse


def _of_heads(gradients: Gradients, q: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients that belong to heads alone; an operator must return a tensor where there is none."""
    dbias, dcompactness = gradients.bias, gradients.compactness
    return (
        q.new_empty(0) if dbias is None else dbias,
        q.new_empty(0) if dcompactness is None else dcompactness,
    )


_assign = torch.library.custom_op(_OP + "assign", _run_assign, mutates_args=())
_pool = torch.library.custom_op(_OP + "pool", _run_pool, mutates_args=())
_assign_backward = torch.library.custom_op(_OP + "assign_backward", _run_assign_backward, mutates_args=())
_pool_backward = torch.library.custom_op(_OP + "pool_backward", _run_pool_backward, mutates_args=())


@_assign.register_fake
def _(name, q, k, u, *rest):  # type: ignore[no-untyped-def]
    return rows_like(u, k.shape[2], u.shape[3]), scalars_like(k)


@_pool.register_fake
def _(name, q, k, v, bias, compactness, valid, valid_groups, geometry, scale, given_lse):  # type: ignore[no-untyped-def]
    own = given_lse is None
    expected_q = torch.empty_like(k) if own and name in KEEPING else q.new_empty(0)
    lse = scalars_like(k) if own else q.new_empty(0)
    return rows_like(v, q.shape[2], v.shape[3]), scalars_like(q), lse, expected_q


def _empty_gradients(q: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(q.new_empty(0) if x is None else torch.empty_like(x) for x in (q, *others))


@_assign_backward.register_fake
def _(name, q, k, u, bias, compactness, *rest):  # type: ignore[no-untyped-def]
    return _empty_gradients(q, k, u, bias, compactness)


@_pool_backward.register_fake
def _(name, q, k, v, bias, compactness, *rest):  # type: ignore[no-untyped-def]
    return *_empty_gradients(q, k, v, bias, compactness), scalars_like(k)


_UNDIFFERENTIATED = (None,) * 4
"""For what ends the arguments that all four operators share: masks, geometry and scale."""


def _where_given(gradients: tuple[Tensor, ...], operands: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else gradient for gradient, x in zip(gradients, operands, strict=False))


def _save_assign(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.name, *tensors, ctx.geometry, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate_assign(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    *tensors, out, lse = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    watched = _assign_backward if is_watched(grad_out, *tensors[:3]) else _assign_backward_directly
    function = _assign_backward_transformed if under_transform() else watched
    gradients = function(ctx.name, *tensors, ctx.geometry, ctx.scale, out, lse, grad_out, grad_lse)
    return None, *_where_given(gradients, tensors), *_UNDIFFERENTIATED


def _save_pool(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.name, *tensors, ctx.geometry, ctx.scale, given_lse = inputs
    out, log_mass, lse, expected_q = output
    ctx.own_lse = given_lse is None
    kept = (expected_q if ctx.name in KEEPING else None) if ctx.own_lse else None
    ctx.save_for_backward(*tensors, out, log_mass, lse if ctx.own_lse else given_lse, kept)


def _differentiate_pool(
    ctx: Any, grad_out: Tensor | None, grad_mass: Tensor | None, grad_lse: Tensor | None, _: Any
) -> tuple[Any, ...]:
    *tensors, out, log_mass, lse, expected_q = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    if not ctx.own_lse:
        grad_lse = None
    elif grad_lse is None:
        grad_lse = torch.zeros_like(lse)
    watched = _pool_backward if is_watched(grad_out, *tensors[:3]) else _pool_backward_directly
    function = _pool_backward_transformed if under_transform() else watched
    saved = (ctx.name, *tensors, ctx.geometry, ctx.scale, out, log_mass, lse, expected_q)
    *gradients, dlse = function(*saved, grad_out, grad_mass, grad_lse)
    dlse = None if ctx.own_lse else dlse
    return None, *_where_given(tuple(gradients), tensors), *_UNDIFFERENTIATED, dlse


_assign.register_autograd(_differentiate_assign, setup_context=_save_assign)
_pool.register_autograd(_differentiate_pool, setup_context=_save_pool)
_assign_backward.register_autograd(refuse_second_derivative)
_pool_backward.register_autograd(refuse_second_derivative)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


_assign_directly = directly("assign", _run_assign, _save_assign, _differentiate_assign)
_pool_directly = directly("pool", _run_pool, _save_pool, _differentiate_pool)
_assign_backward_directly = once(_run_assign_backward)
_pool_backward_directly = once(_run_pool_backward)

_assign_transformed = mapped(_assign, _save_assign, _differentiate_assign)
_pool_transformed = mapped(_pool, _save_pool, _differentiate_pool)
_assign_backward_transformed = mapped(_assign_backward, _save_nothing, refuse_second_derivative, tables=(3, 4))
_pool_backward_transformed = mapped(_pool_backward, _save_nothing, refuse_second_derivative, tables=(3, 4))
