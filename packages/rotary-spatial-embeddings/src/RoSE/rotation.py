"""The rotation itself in torch's own operations: two ways to compute the same thing.

*In place of the result* (eager tensors): the products are formed inside the one output tensor, so nothing of
x's size is allocated besides it, in either direction: the gradient for x is the inverse rotation, the
gradient for the angles one reduction. What needs scratch space (half types, the reduction) is walked in small
pieces.

*Plain* (compiling, exporting, tensor subclasses): ordinary real arithmetic, which those tools can see through
and fuse. Complex numbers appear on the first path only, because compilers and ONNX have no use for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .tracing import is_batched, is_forward_mode
from .validation import require_floating

# Where scratch space is needed, x is walked in this many pieces: enough that a few of them are small beside x, few
# enough that starting operations costs nothing beside doing them (threads meet at the end of every one).
_PIECES = 8
# Below this many elements x is not worth cutting.
_SMALL = 1 << 16


def work_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype a rotation is computed in: the widest of its inputs, float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def rotate_plain(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the leading pairs of channels out of place, in real arithmetic."""
    channels = 2 * cos.shape[-1]
    dtype = work_dtype(x, cos)
    # Narrowed and reshaped, not indexed, unflattened and flattened: torch's older vmap has no rules for these (an
    # index that is the whole range makes an alias).
    turned, rest = x.narrow(-1, 0, channels).to(dtype), x[..., channels:]
    cos, sin = cos.to(dtype), sin.to(dtype)
    if interleaved:
        first, second = turned.reshape(*turned.shape[:-1], cos.shape[-1], 2).unbind(-1)
    else:
        first, second = turned.chunk(2, dim=-1)
    parts = (first * cos - second * sin, first * sin + second * cos)
    joined = torch.stack(parts, dim=-1).reshape(turned.shape) if interleaved else torch.cat(parts, dim=-1)
    joined = joined.to(x.dtype)
    return torch.cat((joined, rest), dim=-1) if rest.shape[-1] else joined


def require_angle_shape(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Check that cosines and sines are there for at most all pairs of channels, and broadcast to the rest of x."""
    require_floating("x", x)
    require_floating("cos", cos)
    require_floating("sin", sin)
    if cos.shape != sin.shape:
        raise ValueError(f"cos and sin must have one shape; got {tuple(cos.shape)} and {tuple(sin.shape)}")
    if x.dim() == 0 or cos.dim() == 0 or 2 * cos.shape[-1] > x.shape[-1]:
        raise ValueError(
            "cos must have one plane (its last dimension) for every two channels rotated, at most half of x's "
            f"channels; got cos {tuple(cos.shape)} for x {tuple(x.shape)}"
        )
    lead, wanted = cos.shape[:-1], x.shape[:-1]
    fits = len(lead) <= len(wanted)
    for dim in range(-1, -len(lead) - 1, -1):  # a loop: this runs at every call, and generators cost
        fits = fits and (lead[dim] == 1 or lead[dim] == wanted[dim])
    if not fits:
        raise ValueError(
            f"cos must broadcast to x's leading dimensions {tuple(wanted)}; got {tuple(lead)} before planes"
        )


class Rotation(torch.autograd.Function):
    """The rotation as one differentiable operation of x, cos and sin (it is bilinear in x and cos, sin)."""

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        """Rotate into one new contiguous tensor."""
        channels = 2 * cos.shape[-1]
        dtype = work_dtype(x, cos)
        turn = _turn_complex if interleaved else _turn_real
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        direct = x.dtype == dtype and (not interleaved or (_is_complex_ready(x) and _is_complex_ready(out)))
        for source, target, c, s in [(x, out, cos, sin)] if direct else _pieces(x, out, cos, sin):
            turning, turned = source[..., :channels], target[..., :channels]
            c, s = c.to(dtype), s.to(dtype)
            if direct:
                turn(turning, turned, c, s)
            else:
                turning = turning.to(dtype, memory_format=torch.contiguous_format, copy=True)
                scratch = torch.empty_like(turning)
                turn(turning, scratch, c, s)
                turned.copy_(scratch)
            target[..., channels:] = source[..., channels:]
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the inputs; x is only needed for the gradient of the angles."""
        x, cos, sin, interleaved = inputs
        ctx.interleaved = interleaved
        ctx.angles_need_grad = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(x if ctx.angles_need_grad else None, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """Turn the gradient back for x; reduce gradient times conjugate input for cos and sin."""
        (grad,) = grads
        x, cos, sin = ctx.saved_tensors
        grad_x = rotate_eager(grad, cos, -sin, ctx.interleaved) if ctx.needs_input_grad[0] else None
        if not ctx.angles_need_grad:
            return grad_x, None, None, None
        # With create_graph the reduction must itself be differentiable, which writing into buffers is not; nor can
        # several gradients at once be written into buffers for one.
        reduce = reduce_plain if torch.is_grad_enabled() or is_batched(grad) else _reduce_blocks
        grad_cos, grad_sin = reduce(grad, x, cos, ctx.interleaved)
        return grad_x, grad_cos, grad_sin, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
    ) -> tuple[Tensor, int]:
        """Treat the mapped dimension as one more leading dimension."""
        rank = x.dim() - (in_dims[0] is not None)
        x, cos, sin = (_lead(t, dim, rank, info.batch_size) for t, dim in zip((x, cos, sin), in_dims[:3], strict=True))
        return rotate_eager(x, cos, sin, interleaved), 0


def rotate_eager(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate x by angles whose shape broadcasts to ``(*x.shape[:-1], planes)``."""
    # Forward-mode derivatives, and the older vmap inside of torch.autograd (``vectorize=True``,
    # ``is_grads_batched=True``), which knows no functions of ours, see through ordinary operations.
    if is_forward_mode() or any(map(torch._C._functorch.is_legacy_batchedtensor, (x, cos, sin))):
        return rotate_plain(x, cos, sin, interleaved)
    # Function.apply reads its own signature anew at every call, as long as a small rotation takes. Only function
    # transforms need what else it does.
    transformed = torch._C._are_functorch_transforms_active()
    apply: Any = Rotation.apply if transformed else super(torch.autograd.Function, Rotation).apply
    out: Tensor = apply(x, cos, sin, interleaved)
    return out


def _turn_complex(source: Tensor, target: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate interleaved pairs of ``source`` into ``target``: put the phases there, multiply in place."""
    pairs = torch.view_as_complex(torch.unflatten(source, -1, (-1, 2)))
    phasors = torch.view_as_complex(torch.unflatten(target, -1, (-1, 2)))
    torch.complex(cos.expand(pairs.shape), sin.expand(pairs.shape), out=phasors).mul_(pairs)


def _turn_real(source: Tensor, target: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate half-layout pairs of ``source`` into ``target``, four products, no scratch space."""
    first, second = source.chunk(2, dim=-1)
    out_first, out_second = target.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(first, sin, out=out_second).addcmul_(second, cos)


def reduce_plain(grad: Tensor, x: Tensor, cos: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Gradients of cos and sin: ``grad * conj(x)``, summed over the dimensions cos was broadcast along."""
    dtype = work_dtype(x, cos)
    a, b = _pair_views(x, cos.shape[-1], interleaved)
    g, h = _pair_views(grad, cos.shape[-1], interleaved)
    a, b, g, h = a.to(dtype), b.to(dtype), g.to(dtype), h.to(dtype)
    grad_cos = torch.addcmul(g * a, h, b).sum_to_size(cos.shape)
    grad_sin = torch.addcmul(h * a, g, b, value=-1).sum_to_size(cos.shape)
    return grad_cos.to(cos.dtype), grad_sin.to(cos.dtype)


def _reduce_blocks(grad: Tensor, x: Tensor, cos: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The same, piece by piece."""
    dtype = work_dtype(x, cos)
    grad_cos = torch.zeros(cos.shape, dtype=dtype, device=x.device)
    grad_sin = torch.zeros_like(grad_cos)
    for x_piece, g_piece, c_piece, cos_out, sin_out in _pieces(x, grad, cos, grad_cos, grad_sin):
        part_cos, part_sin = reduce_plain(g_piece, x_piece, c_piece.to(dtype), interleaved)
        cos_out += part_cos
        sin_out += part_sin
    return grad_cos.to(cos.dtype), grad_sin.to(cos.dtype)


def _pair_views(x: Tensor, planes: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The first and second channels of every rotated pair, as views."""
    channels = 2 * planes
    if interleaved:
        return x[..., 0:channels:2], x[..., 1:channels:2]
    return x[..., :planes], x[..., planes:channels]


def _is_complex_ready(x: Tensor) -> bool:
    """Whether neighbouring channels of x can be read as complex numbers where they lie."""
    *outer, channel = x.stride()
    # Numbers are all even where their greatest common divisor is (that of none is 0).
    return channel == 1 and math.gcd(x.storage_offset(), *outer) % 2 == 0


def _pieces(x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut x along its longest leading dimension, and with it all tensors that broadcast against x."""
    tensors = tuple(t.reshape(*(1,) * (x.dim() - t.dim()), *t.shape) for t in (x, *others))
    if x.dim() == 1 or x.numel() == 0:
        yield tensors
        return
    dim = max(range(x.dim() - 1), key=lambda d: x.shape[d])
    length = x.shape[dim]
    step = length if x.numel() <= _SMALL else -(-length // _PIECES)
    for start in range(0, length, step):
        size = min(step, length - start)
        yield tuple(t if t.shape[dim] == 1 else t.narrow(dim, start, size) for t in tensors)


def _lead(tensor: Tensor, dim: int | None, rank: int, size: int) -> Tensor:
    """Bring a mapped dimension to the front of a tensor padded to ``rank`` dimensions behind it."""
    tensor = tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.reshape(size, *(1,) * (rank + 1 - tensor.dim()), *tensor.shape[1:])
