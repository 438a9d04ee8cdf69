"""The attention kernels of a CPU, in float32 and float64: a bias of the keys is a mask of one row."""

from __future__ import annotations

import torch
from torch import Tensor

from .channels import Call, Sums, append, cut, pad

aten = torch.ops.aten


def attention(call: Call) -> tuple[Tensor, Tensor]:
    """See :func:`.flash.attention`."""
    q, k, v, scale, key_bias, terms = call
    if terms is not None:
        q, k = append(q, terms.left), append(k, terms.right / scale)
    value_size, size = v.shape[-1], max(q.shape[-1], v.shape[-1])
    q, k, v = (pad(x, size) for x in (q, k, v))
    mask = _row(key_bias)
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
    return cut(out, value_size), lse


def attention_backward(
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Sums | None]:
    """See :func:`.flash.attention_backward`."""
    q, k, v, scale, key_bias, terms = call
    head_size, value_size = q.shape[-1], v.shape[-1]
    if grad_lse is not None:
        v, out, grad_out = append(v, 0.0), append(out, 1.0), append(grad_out, -grad_lse[..., None])
    if terms is not None:
        q, k = append(append(q, terms.left), 0.0), append(append(k, terms.right / scale), 1.0)
    with_terms = q.shape[-1]
    if key_bias is not None:
        q, k = append(q, 1.0), append(k, 0.0)
    size = max(q.shape[-1], v.shape[-1])
    q, k, v, out, grad_out = (pad(x, size) for x in (q, k, v, out, grad_out))
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, q, k, v, out, lse, 0.0, False, attn_mask=_row(key_bias), scale=scale
    )
    dbias = None if key_bias is None else dk[..., with_terms] / scale
    last = with_terms - 1
    sums = None if terms is None else Sums(dk[..., head_size:last] / scale, dq[..., last] / scale)
    return cut(dq, head_size), cut(dk, head_size), cut(dv, value_size), dbias, sums


def _row(key_bias: Tensor | None) -> Tensor | None:
    """A mask with stride 0 over the queries is read as a row; any other is expanded to a full matrix first."""
    return None if key_bias is None else key_bias.contiguous().unsqueeze(-2)
