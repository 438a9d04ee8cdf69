"""Calls that go around torch's dispatcher where nobody looks on: what it does around an operator costs more than small
grids do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .tracing import is_traced

_ORDINARY = (Tensor, torch.nn.Parameter)


def is_watched(*tensors: Tensor | None) -> bool:
    """Whether somebody looks on who must be shown operators: a compiler, an exporter, a mode or a kind of tensor."""
    if torch.compiler.is_compiling() or is_traced():
        return True
    before = torch._ops._len_torch_dispatch_stack_pre_dispatch()  # type: ignore[no-untyped-call]
    if torch._C._len_torch_dispatch_stack() > 0 or before > 0:
        return True
    for x in tensors:
        if x is not None and (type(x) not in _ORDINARY or torch._C._functorch.is_legacy_batchedtensor(x)):
            return True
    return False


def directly(
    name: str, function: Callable[..., Any], save: Callable[..., None], differentiate: Callable[..., Any]
) -> Callable[..., Any]:
    """A function with its gradient, for when nobody looks on.

    Args:
        name: by which graphs, errors and profiles call it.
        function: what is computed, outside of any graph.
        save: called as ``save(ctx, inputs, outputs)``.
        differentiate: called as ``differentiate(ctx, *gradients)``.
    """

    def forward(ctx: Any, *args: Any) -> Any:
        output = function(*args)
        save(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
    made: Any = type(name, (torch.autograd.Function,), methods)
    apply: Callable[..., Any] = made.apply
    return apply
