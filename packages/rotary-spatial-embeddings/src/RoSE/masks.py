"""Which tokens are real, and what attention makes of it.

Padding is seen by nobody, gives nothing and gets nothing back: its features are replaced by zeros on the way in (so
that what they hold, NaN included, does not matter), its keys are hidden, and its results are zeros on the way out.
"""

from __future__ import annotations

import torch
from torch import Tensor


def emptied(x: Tensor, valid: Tensor | None) -> Tensor:
    """``(batch, tokens, channels)`` with zeros, value and gradient, at tokens that are not real."""
    return x if valid is None else x.masked_fill(~valid.unsqueeze(-1), 0)


def hide_keys(k_valid: Tensor, attn_mask: Tensor | None, is_causal: bool, queries: int) -> tuple[Tensor, Tensor]:
    """The mask of an attention whose keys are not all real, and which of its queries see any key.

    Queries that see none are shown all keys, so that their softmax is a number; their result is to be replaced.

    Args:
        k_valid: ``(batch, keys)``.
        attn_mask: Boolean or additive, as in ``scaled_dot_product_attention``.
        is_causal: Whether tokens see only tokens that are not behind them.
        queries: Their number.

    Returns:
        A mask that broadcasts to (batch, heads, queries, keys), and a boolean one with a single key.
    """
    shown = k_valid[:, None, None, :]
    if is_causal:
        shown = shown & torch.ones(queries, k_valid.shape[1], dtype=torch.bool, device=k_valid.device).tril()
    if attn_mask is None or attn_mask.dtype == torch.bool:
        mask = shown if attn_mask is None else shown & attn_mask
        sees = mask.any(-1, keepdim=True)
        return mask | ~sees, sees
    mask = torch.where(shown, attn_mask, -torch.inf)
    sees = (mask > -torch.inf).any(-1, keepdim=True)
    return torch.where(sees, mask, 0), sees
