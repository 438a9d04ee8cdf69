"""Stochastic depth."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """Leave out whole samples of a residual branch while training (stochastic depth, arXiv:1603.09382).

    Kept samples are scaled by 1/(1 - probability), so that the branch's expectation does not change.

    Args:
        probability: of leaving a sample out, in [0, 1).
    """

    def __init__(self, probability: float = 0.0) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, ...)."""
        if self.probability == 0.0 or not self.training:
            return x
        keep = 1.0 - self.probability
        mask = torch.rand(x.shape[0], *(1,) * (x.ndim - 1), device=x.device) < keep
        return x * mask.to(x.dtype) / keep

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return f"probability={self.probability}"
