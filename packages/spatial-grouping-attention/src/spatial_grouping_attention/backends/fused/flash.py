"""torch's fused attention kernels, forward and backward, with their log-sum-exp: one signature for CPU and CUDA.

``scaled_dot_product_attention`` keeps its log-sum-exp to itself and gives no gradient to a key bias in O(N) memory,
so the operators underneath it are called by name. They read keys and values in blocks and never store the scores.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import on_cpu, on_cuda
from .channels import Sums, Terms


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, key_bias: Tensor | None = None, terms: Terms | None = None
) -> tuple[Tensor, Tensor]:
    """``softmax(scale q k^T + key_bias + terms) v`` and its log-sum-exp.

    Args:
        q: (B, H, N, D).
        k: (B, H, M, D).
        v: (B, H, M, Dv).
        scale: factor of the products, not of bias and terms.
        key_bias: (B, H, M) in float32 at least, added to the logits of every query; finite, because a row of
            nothing but -inf is NaN to the kernels.
        terms: further products that are added to the logits.

    Returns:
        (B, H, N, Dv) in q's dtype, and (B, H, N) in float32 at least.
    """
    return _kernels(q.device).attention(q, k, v, scale, key_bias, terms)  # type: ignore[no-any-return]


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
    terms: Terms | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Sums | None]:
    """Gradients of :func:`attention` to (q, k, v, key_bias, terms) from those of its two results.

    The kernels know neither a gradient of their log-sum-exp nor one to a key bias; both ride in extra channels.
    With ds = P (g . v - g . out + grad_lse), the pair (out, grad_out) gets the channel (1, -grad_lse), which only
    enters the product g . out. A channel of ones beside q makes the gradient of its partner in k the sum of ds. A
    log-sum-exp of +inf makes all of a query's P 0.
    """
    operands = (grad_out, grad_lse, q, k, v, out, lse, scale, key_bias, terms)
    return _kernels(q.device).attention_backward(*operands)  # type: ignore[no-any-return]


def _kernels(device: torch.device) -> ModuleType:
    return on_cpu if device.type == "cpu" else on_cuda
