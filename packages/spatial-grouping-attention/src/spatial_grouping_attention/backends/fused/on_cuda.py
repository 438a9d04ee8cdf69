"""The memory-efficient attention kernels of CUDA devices: biases and terms are channels, in half types in parts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .channels import Call, Sums, Terms, append, cut, pad

aten = torch.ops.aten

# A half type holds 8 or 11 bits, so what is added to logits comes in three parts. A float16 also ends at 65504, so its
# parts carry powers of two on the other side: of ones, and of whole numbers up to 256.
_PARTS = {torch.bfloat16: ((0, 0, 0), (0, 0, 0)), torch.float16: ((15, 4, 0), (7, 3, 0))}


def attention(call: Call) -> tuple[Tensor, Tensor]:
    """See :func:`.flash.attention`."""
    q, k, v, scale, key_bias, terms = call
    value_size = v.shape[-1]
    q, k, _ = _with_channels(q, k, scale, key_bias, terms)
    q, k, v = (_aligned(x) for x in (q, k, v))
    out, lse, _, _ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)
    return cut(out, value_size), lse[..., : q.shape[-2]]


def attention_backward(
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Sums | None]:
    """See :func:`.flash.attention_backward`."""
    q, k, v, scale, key_bias, terms = call
    head_size, value_size = q.shape[-1], v.shape[-1]
    if grad_lse is not None:
        v, out, grad_out = append(v, 0.0), append(out, 1.0), append(grad_out, -grad_lse[..., None])
    q, k, places = _with_channels(q, k, scale, key_bias, terms)
    rows = q.shape[-1]
    if terms is not None:
        q, k = append(q, 0.0), append(k, 1.0)
    q, k, v, out, grad_out = (_aligned(x) for x in (q, k, v, out, grad_out))
    # This kernel takes rows of ``out`` to lie as the forward kernel wrote them, whatever its strides say, and wants its
    # log-sum-exp padded to whole blocks of 32 queries; +inf makes the padding inert.
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)
    unused = torch.empty((), dtype=torch.int64, device=q.device)
    wanted = [True, True, True, False]
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        grad_out, q, k, v, None, out, lse, unused, unused, 0.0, wanted, False, scale=scale
    )
    of_bias, of_terms = (None if place is None else dk[..., place].float() / scale for place in places)
    dbias = None if of_bias is None else of_bias.squeeze(-1)
    sums = None if of_terms is None else Sums(of_terms, dq[..., rows].float() / scale)
    return cut(dq, head_size), cut(dk, head_size), cut(dv, value_size), dbias, sums


def _with_channels(
    q: Tensor, k: Tensor, scale: float, key_bias: Tensor | None, terms: Terms | None
) -> tuple[Tensor, Tensor, tuple[slice | None, slice | None]]:
    """Queries and keys with channels for what is added to logits, and where the last parts of each are among them."""
    of_ones, of_terms = _PARTS.get(q.dtype, ((0,), (0,)))
    places: list[slice | None] = [None, None]
    if key_bias is not None:
        q, k, places[0] = _with_parts(q, k, q.new_ones(1, 1), key_bias[..., None] / scale, of_ones)
    if terms is not None:
        q, k, places[1] = _with_parts(q, k, terms.left, terms.right / scale, of_terms)
    return q, k, (places[0], places[1])


def _with_parts(
    q: Tensor, k: Tensor, left: Tensor, right: Tensor, powers: tuple[int, ...]
) -> tuple[Tensor, Tensor, slice]:
    # Finite, also times what is on the left, in the kernels' float32.
    rest = right.clamp(*(sign * min(torch.finfo(k.dtype).max, 1e33) * 2.0 ** powers[0] for sign in (-1, 1)))
    for power in powers:
        part = (rest / 2.0**power).to(k.dtype)
        rest = rest - part.to(rest.dtype) * 2.0**power
        q, k = append(q, left * 2.0**power), append(k, part)
    return q, k, slice(q.shape[-1] - right.shape[-1], q.shape[-1])


def _aligned(x: Tensor) -> Tensor:
    """A head size that the kernels can load in aligned vectors, in rows that start where such vectors do."""
    x = pad(x, x.shape[-1] + -x.shape[-1] % 8)
    steps = [stride * x.element_size() for stride in x.stride()[:-1]]
    # Views such as the first 8 of 9 channels start in the middle of 16 bytes.
    misaligned = any(step % 16 for step in steps) or x.storage_offset() * x.element_size() % 16
    return x.contiguous() if misaligned else x
