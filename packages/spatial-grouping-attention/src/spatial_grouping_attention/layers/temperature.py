"""How sharply a head chooses: a learned factor on its logits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

TEMPERATURES = ("fixed", "learned")


def make_log_temperature(
    kind: str, num_heads: int, *, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Parameter | None:
    """Logarithm of a factor per head (H,), which starts at 1; None where the factor stays there."""
    return nn.Parameter(torch.zeros(num_heads, device=device, dtype=dtype)) if kind == "learned" else None


def heat(q: Tensor, log_temperature: Tensor | None) -> Tensor:
    """Multiply the queries (B, H, N, D) of every head, and so its logits, by its factor."""
    return q if log_temperature is None else q * log_temperature.exp().to(q.dtype)[:, None, None]
