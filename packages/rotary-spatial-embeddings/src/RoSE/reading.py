"""Whether the values of a tensor may be read, to judge an argument by them or to warn."""

from __future__ import annotations

import torch
from torch import Tensor


def values_are_at_hand(value: Tensor) -> bool:
    """Whether a tensor's values can be read without making an accelerator wait.

    To read them there would stall its queue at every call, and could not be captured in a graph.
    """
    return value.device.type == "cpu" and values_are_readable(value)


def values_are_readable(value: Tensor) -> bool:
    """Whether a tensor's values may steer Python: only an ordinary tensor's, while nobody looks over our shoulder.

    Not while compiling, transforming, tracing or faking, not on meta, and not where a subclass stands for values that
    are elsewhere (fake, distributed).
    """
    return not (
        torch.compiler.is_compiling()
        or value.is_meta
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._functorch.is_legacy_batchedtensor(value)
        or torch._C._len_torch_dispatch_stack() > 0
        or type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__
    )
