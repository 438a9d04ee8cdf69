"""Which tokens are real, and what attention makes of it.

Padding is seen by nobody, gives nothing and gets nothing back: its features are replaced by zeros on the way in (so
that what they hold, NaN included, does not matter), its keys are hidden, and its results are zeros on the way out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .tracing import is_exporting
from .validation import FLOATING_DTYPES, require_tensor


def require_attn_mask(attn_mask: Tensor | None, batch: int, heads: int, queries: int, keys: int) -> None:
    """Check a mask of an attention, whose sizes torch would broadcast from the right, whatever they mean.

    Raises:
        TypeError: Neither boolean nor floating.
        ValueError: Another shape than (queries, keys) or (batch or 1, heads or 1, queries or 1, keys or 1), or two
            dimensions of which the first is as large as the batch: it could be either.
    """
    if attn_mask is None:
        return
    require_tensor("attn_mask", attn_mask)
    if attn_mask.dtype not in (torch.bool, *FLOATING_DTYPES):
        raise TypeError(
            f"attn_mask must be boolean (true where a query sees a key) or floating (added to scores); "
            f"got {attn_mask.dtype}"
        )
    shape = tuple(attn_mask.shape)
    rule = (
        f"(queries, keys) or, with any size possibly 1, (batch, heads, queries, keys) = {(batch, heads, queries, keys)}"
    )
    way_out = "which keys are real is said by k_valid=, (batch, keys)"
    if len(shape) == 4:
        if any(n not in (1, whole) for n, whole in zip(shape, (batch, heads, queries, keys), strict=True)):
            raise ValueError(f"attn_mask must have shape {rule}; got {shape}")
    elif shape != (queries, keys):
        raise ValueError(f"attn_mask must have shape {rule}; got {shape}; {way_out}")
    # Not where a batch is still to be any: an exporter would take the question for a promise.
    elif not is_exporting() and batch == queries > 1:
        raise ValueError(
            f"attn_mask must have 4 dimensions where there are as many queries as samples, because two could be "
            f"(queries, keys) or (batch, keys); got {shape}: give attn_mask[None, None], or {way_out}"
        )


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
