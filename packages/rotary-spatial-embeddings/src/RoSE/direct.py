"""Calls that go around torch's dispatcher where nobody looks on: what it does around an operator costs more than small
grids do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_ORDINARY = (Tensor, torch.nn.Parameter)
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch


def is_watched(*tensors: Tensor | None) -> bool:
    """Whether somebody looks on who must be shown operators: a compiler, an exporter, a mode or a kind of tensor."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    # Modes that trace before dispatch are on a stack of their own, and the key says whether there is any.
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH):
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
