"""torch's fused attention kernels, forward and backward, with their log-sum-exp: one wrapper for CPU and CUDA.

``scaled_dot_product_attention`` keeps its log-sum-exp to itself and gives no gradient to a key bias in O(N) memory,
so the operators underneath it are called by name. They read keys and values in blocks and never store the scores.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, key_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``softmax(scale q k^T + key_bias) v`` and its log-sum-exp.

    Args:
        q: (B, H, N, D).
        k: (B, H, M, D).
        v: (B, H, M, Dv).
        scale: factor of the products, not of the bias.
        key_bias: (B, H, M) in float32 at least, added to the logits of every query; finite, because a row of
            nothing but -inf is NaN to the kernels.

    Returns:
        (B, H, N, Dv) in q's dtype, and (B, H, N) in float32 at least.
    """
    value_size = v.shape[-1]
    if q.device.type == "cpu":
        size = max(q.shape[-1], value_size)
        # A mask with stride 0 over the queries is read as a row; any other is expanded to a full matrix first.
        mask = None if key_bias is None else key_bias.contiguous().unsqueeze(-2)
        q, k, v = (_pad(x, size) for x in (q, k, v))
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
        return out[..., :value_size], lse
    if key_bias is not None:
        q, k = _append_bias(q, k, key_bias / scale)
    q, k, v = (_pad_to_multiple(x) for x in (q, k, v))
    out, lse, _, _ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)
    return out[..., :value_size], lse[..., : q.shape[-2]]


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of :func:`attention` to (q, k, v, key_bias) from those of its two results.

    The kernels know neither a gradient of their log-sum-exp nor one to a key bias; both ride in extra channels.
    With ds = P (g . v - g . out + grad_lse), the pair (out, grad_out) gets the channel (1, -grad_lse), which only
    enters the product g . out. A channel of ones beside q makes the gradient of its partner in k the sum of ds.
    """
    head_size, value_size = q.shape[-1], v.shape[-1]
    if grad_lse is not None:
        v = append(v, 0.0)
        out = append(out, 1.0)
        grad_out = append(grad_out, -grad_lse[..., None])
    if q.device.type == "cpu":
        mask = None
        if key_bias is not None:
            mask = key_bias.contiguous().unsqueeze(-2)
            q = append(q, 1.0)
            k = append(k, 0.0)
        size = max(q.shape[-1], v.shape[-1])
        q, k, v, out, grad_out = (_pad(x, size) for x in (q, k, v, out, grad_out))
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=scale
        )
    else:
        if key_bias is not None:
            q, k = _append_bias(q, k, key_bias / scale)
        q, k, v, out, grad_out = (_pad_to_multiple(x) for x in (q, k, v, out, grad_out))
        # This kernel wants its log-sum-exp padded to whole blocks of 32 queries; +inf makes the padding inert.
        lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)
        unused = torch.empty((), dtype=torch.int64, device=q.device)
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            grad_out,
            q,
            k,
            v,
            None,
            out,
            lse,
            unused,
            unused,
            0.0,
            [True, True, True, False],
            False,
            scale=scale,
        )
    dbias = None if key_bias is None else dk[..., head_size] / scale
    return dq[..., :head_size], dk[..., :head_size], dv[..., :value_size], dbias


def append(x: Tensor, channels: Tensor | float) -> Tensor:
    """More channels, or one of the same number everywhere."""
    if not isinstance(channels, Tensor):
        channels = x.new_full((*x.shape[:-1], 1), channels)
    return torch.cat((x, channels.to(x.dtype)), dim=-1)


def _append_bias(q: Tensor, k: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Channels whose product is the bias: ones beside q, the bias beside k.

    Half types get it in three parts, because one channel would round it to 8 or 11 bits.
    """
    if q.dtype in (torch.float32, torch.float64):
        parts = [bias.to(k.dtype)]
    else:
        rest, parts = bias.clamp(min=-3e4), []
        for _ in range(3):
            parts.append(rest.to(k.dtype))
            rest = rest - parts[-1]
    channels = torch.stack(parts, dim=-1)
    ones = q.new_ones(*q.shape[:-1], len(parts))
    return append(q, ones), append(k, channels)


def _pad(x: Tensor, size: int) -> Tensor:
    """``size`` channels, next to each other in memory: the kernels read other strides wrongly."""
    if x.shape[-1] != size:
        return F.pad(x, (0, size - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


def _pad_to_multiple(x: Tensor, multiple: int = 8) -> Tensor:
    """Head sizes that the CUDA kernels can load in aligned vectors."""
    return _pad(x, x.shape[-1] + -x.shape[-1] % multiple)
