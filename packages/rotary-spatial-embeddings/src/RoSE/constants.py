"""Numbers of Python's as tensors, moved to a device once: every move would wait for all that was launched before."""

from __future__ import annotations

import torch
from torch import Tensor

from .memo import remembered


@remembered(256)
def numbers(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A float64 tensor ``(len(values),)``, shared by all who ask for the same: not to be written to.

    A tensor, because the ONNX exporter narrows plain numbers to float32.
    """
    return torch.tensor(values, dtype=torch.float64, device=device)
