"""What hand-written backward passes have in common: they are exact under autocast, and differentiable once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def as_given(x: Tensor) -> AbstractContextManager[Any]:
    """Leave operands in the dtype they have: autocast has chosen it by now, and sums must stay in float32."""
    if not torch.is_autocast_enabled(x.device.type):
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
