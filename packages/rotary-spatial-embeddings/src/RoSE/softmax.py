"""The softmax attention of features that are rotated already, through torch's fused kernels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .masks import hide_keys
from .tracing import is_forward_mode


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    *,
    k_valid: Tensor | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    **sdpa: Any,
) -> Tensor:
    """Attention of ``(batch, tokens, channels)`` tensors through torch's fused kernels; 0 where no key is valid."""
    if q.is_nested:  # whose kernels want every argument contiguous; v is a slice of a projection
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    q, k, v = (torch.unflatten(t, -1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.to(q.dtype)
    if k_valid is None and is_causal and attn_mask is not None:  # of which torch takes only one everywhere
        k_valid = attn_mask.new_ones(1, k.shape[2], dtype=torch.bool)
    if k_valid is None:
        out = _softmax_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal, **sdpa)
    else:
        mask, sees = hide_keys(k_valid, attn_mask, is_causal, q.shape[2])
        out = _softmax_attention(q, k, v, attn_mask=mask, **sdpa).masked_fill(~sees, 0)
    return out.transpose(1, 2).flatten(2)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, **sdpa: Any) -> Tensor:
    """Torch's attention; by its plain form for forward-mode derivatives, which its fused kernels do not have."""
    if is_forward_mode():
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, **sdpa)
    return F.scaled_dot_product_attention(q, k, v, **sdpa)
