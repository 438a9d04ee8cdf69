"""What backward passes have in common: all are exact under autocast, those written by hand are differentiable once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from RoSE.direct import is_watched
from torch import Tensor

from .transforms import under_transform

P = ParamSpec("P")
R = TypeVar("R")


def as_given(x: Tensor) -> AbstractContextManager[Any]:
    """Leave operands in the dtype they have: autocast has chosen it by now, and sums must stay in float32."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):  # autocast does not know meta tensors
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function of tensors, the first of which tells the device, with autocast off."""

    @functools.wraps(function)
    def exact(*args: P.args, **kwargs: P.kwargs) -> R:
        first = next(x for x in args if isinstance(x, Tensor))
        with as_given(first):
            return function(*args, **kwargs)

    return exact


def refuse_second_derivative(ctx: Any, *gradients: Any) -> Any:
    """Backward of a backward pass that has none."""
    raise RuntimeError(
        "this backward pass is written by hand and cannot be differentiated twice; "
        "for second derivatives use backend='reference'"
    )


class Once(torch.autograd.Function):
    """Call ``function(*operands)`` so that differentiating the result says that it cannot be done."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], *operands: Any) -> Any:
        """Call the function, outside of any graph."""
        return function(*operands)

    backward = staticmethod(refuse_second_derivative)


def shown(operator: Callable[..., Any], function: Callable[..., Any], *tensors: Tensor | None) -> Callable[..., Any]:
    """An operator where somebody looks on or transforms, and else the function it is made of.

    The first call of any operator of ours imports the whole compiler, a second or more.
    """
    return operator if under_transform() or is_watched(*tensors) else function


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass that says so if it is to be differentiated."""

    def call(*args: Any) -> Any:
        return Once.apply(function, *args) if torch.is_grad_enabled() else function(*args)  # type: ignore[no-untyped-call]

    return call


def products(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.mT``, whose gradient, and that of its gradient, stay exact where backward runs under autocast."""
    if torch.compiler.is_compiling() or not (a.requires_grad or b.requires_grad or under_transform()):
        return a @ b.mT
    result: Tensor = _Products.apply(a, b)  # type: ignore[no-untyped-call]
    return result


class _Products(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        with as_given(a):
            return a @ b.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return products(gradient, b.mT), products(gradient.mT, a.mT)

    @staticmethod
    def jvp(ctx: Any, a_dot: Tensor | None, b_dot: Tensor | None) -> Tensor:
        a, b = ctx.saved_tensors
        terms = [products(x, y) for x, y in ((a_dot, b), (a, b_dot)) if x is not None and y is not None]
        return sum(terms[1:], terms[0])
