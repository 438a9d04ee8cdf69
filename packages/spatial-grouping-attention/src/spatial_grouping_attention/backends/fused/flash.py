"""torch's fused attention kernels, forward and backward, with their log-sum-exp: one signature for CPU and CUDA.

``scaled_dot_product_attention`` keeps its log-sum-exp to itself and gives no gradient to a key bias in O(N) memory,
so the operators underneath it are called by name. They read keys and values in blocks and never store the scores.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import on_cpu, on_cuda
from .channels import Call, Sums


def attention(call: Call) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp.

    Returns:
        (B, H, N, Dv) in q's dtype, and (B, H, N) in float32 at least.
    """
    return _kernels(call.q.device).attention(call)  # type: ignore[no-any-return]


def attention_backward(
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Sums | None]:
    """Gradients of :func:`attention` to (q, k, v, key_bias, terms) from its two results and theirs.

    The kernels know neither a gradient of their log-sum-exp nor one to a key bias; both ride in extra channels.
    With ds = P (g . v - g . out + grad_lse), the pair (out, grad_out) gets the channel (1, -grad_lse), which only
    enters the product g . out. A channel of ones beside q makes the gradient of its partner in k the sum of ds. A
    log-sum-exp of +inf makes all of a query's P 0.
    """
    kernels = _kernels(call.q.device)
    return kernels.attention_backward(call, out, lse, grad_out, grad_lse)  # type: ignore[no-any-return]


def _kernels(device: torch.device) -> ModuleType:
    return on_cpu if device.type == "cpu" else on_cuda
