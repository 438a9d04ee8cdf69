"""What torch is in the middle of when a function is called: exporting, differentiating forwards, batching.

Torch's compiler asks these questions too. Those without a tensor are marked as constants to it: they are answered while
it traces.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_exporting() -> bool:
    """Whether ``torch.export`` or an ONNX exporter traces."""
    # What torch.compiler.is_exporting() returns, which the compiler of torch 2.11 takes for true without calling it.
    return torch.compiler._is_exporting_flag or torch.onnx.is_in_onnx_export()


def is_forward_mode() -> bool:
    """Whether a forward-mode derivative is under way."""
    return torch.autograd.forward_ad._current_level >= 0


def is_transformed() -> bool:
    """Whether a function transform or a forward-mode derivative is under way."""
    return torch._C._functorch.peek_interpreter_stack() is not None or is_forward_mode()


def is_traced() -> bool:
    """Whether TorchScript's tracer looks on, which knows no functions of Python."""
    return torch._C._get_tracing_state() is not None


for _question in (is_exporting, is_forward_mode, is_traced, is_transformed):
    _question._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_batched(x: Tensor) -> bool:
    """Whether x stands for several tensors, in either of torch's two vmaps."""
    return torch._C._functorch.is_legacy_batchedtensor(x) or torch._C._functorch.is_batchedtensor(x)
