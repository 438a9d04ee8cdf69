"""Gradients of the windowed operators as torch sees them: the same for every backend that registers its four passes.

A backend registers ``pool``, ``assign`` and their backward passes with ``torch.library.custom_op``, with the schemas
of :mod:`.tiled`; here they are tied together.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._library.custom_ops import CustomOpDef

from .once import refuse_second_derivative


def register_gradients(
    pool: CustomOpDef, assign: CustomOpDef, pool_backward: CustomOpDef, assign_backward: CustomOpDef
) -> None:
    """Make ``pool`` and ``assign`` differentiable once, through their backward passes."""

    def save_pool(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        q, k, v, given_lse, bias, valid, ctx.geometry, ctx.scale = inputs
        out, log_mass, lse = output
        ctx.own_lse = given_lse is None
        ctx.save_for_backward(q, k, v, bias, valid, out, lse if ctx.own_lse else given_lse, log_mass)

    def differentiate_pool(ctx: Any, grad_out: Tensor, grad_mass: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
        q, k, v, bias, valid, out, lse, log_mass = ctx.saved_tensors
        call = (q, k, v, bias, valid, ctx.geometry, ctx.scale)
        own_grad_lse = grad_lse if ctx.own_lse else None
        dq, dk, dv, dbias, dlse = pool_backward(*call, out, lse, log_mass, grad_out, own_grad_lse, grad_mass)
        dbias = None if bias is None else dbias.to(bias.dtype)
        return dq, dk, dv, None if ctx.own_lse else dlse, dbias, None, None, None

    def save_assign(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        q, k, u, bias, valid, ctx.geometry, ctx.scale = inputs
        ctx.save_for_backward(q, k, u, bias, valid, *output)

    def differentiate_assign(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
        q, k, u, bias, valid, out, lse = ctx.saved_tensors
        call = (q, k, u, bias, valid, ctx.geometry, ctx.scale)
        dq, dk, du, dbias = assign_backward(*call, out, lse, grad_out, grad_lse)
        return dq, dk, du, None if bias is None else dbias.to(bias.dtype), None, None, None

    pool.register_autograd(differentiate_pool, setup_context=save_pool)
    assign.register_autograd(differentiate_assign, setup_context=save_assign)
    pool_backward.register_autograd(refuse_second_derivative)
    assign_backward.register_autograd(refuse_second_derivative)
