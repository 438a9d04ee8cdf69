"""The kernels as operators of torch: checks, shapes for tracing, gradients."""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_CHANNELS = 512

# Compute capability of the oldest GPUs that work in bfloat16.
OLDEST_GPU = (8, 0)

_INSTALLED = importlib.util.find_spec("triton") is not None
# Triton decides this when a kernel is defined, so it must not change once kernels have been imported.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def refusals(device: torch.device, dtype: torch.dtype, channels: int) -> list[str]:
    """Reasons why the kernels cannot turn features; empty where they can.

    Args:
        device: of all operands.
        dtype: of the features.
        channels: of a head.
    """
    reasons = []
    if not _INSTALLED:
        reasons.append("triton is not installed")
    if device.type not in (("cpu", "cuda") if _INTERPRETED else ("cuda",)):
        reasons.append(
            f"the kernels need tensors on cuda (or TRITON_INTERPRET=1 for tests on a cpu); got {device.type}"
        )
    elif device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST_GPU:
        oldest = ".".join(map(str, OLDEST_GPU))
        reasons.append(f"the kernels need a GPU of compute capability {oldest} or newer")
    if dtype not in DTYPES:
        reasons.append(f"the kernels take float32, bfloat16 and float16; got {dtype}")
    if channels > MOST_CHANNELS:
        reasons.append(f"the kernels take heads of up to {MOST_CHANNELS} channels; got {channels}")
    return reasons


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = True, in_place: bool = False) -> Tensor:
    """:func:`RoSE.functional.rotate` in one kernel.

    Args:
        x: ``(..., channels)`` of two to four dimensions, strided in any way.
        cos: Cosines, of a shape that broadcasts to ``(*x.shape[:-1], planes)``.
        sin: Sines, of the same shape.
        interleaved: Layout of the pairs.
        in_place: Overwrite x and return it; not differentiable.

    Raises:
        ValueError: The kernels cannot serve (every reason is listed), the shapes do not broadcast, or ``in_place``
            is asked for where a gradient is.
    """
    _require_served(x)
    if not 2 <= x.dim() <= 4 or cos.shape != sin.shape or 2 * cos.shape[-1] > x.shape[-1]:
        raise ValueError(
            "x must have 2 to 4 dimensions, cos and sin one shape, and at most half of x's channels as planes; "
            f"got x {tuple(x.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}"
        )
    if in_place:
        _require_no_gradient(x, cos, sin)
        _rotate_(x, cos, sin, interleaved)
        return x
    out: Tensor = _rotate(x, cos, sin, interleaved)
    return out


def rotate_positions(
    q: Tensor,
    k: Tensor | None,
    coordinates: Tensor,
    freqs: Tensor,
    *,
    num_prefix_tokens: int = 0,
    interleaved: bool = True,
    in_place: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Turn q and k by the angles ``<p, w>``, which never leave the registers.

    Angles are computed in float32 parts that lose nothing: positions of 1e5 units cost no accuracy, and those of
    float64 are read in full.

    Args:
        q: ``(batch, heads, tokens, channels)``, strided in any way (``x.transpose(1, 2)`` for token-major features).
        k: The same shape, or None.
        coordinates: ``(tokens, axes)`` or ``(batch, tokens, axes)``, without the prefix tokens.
        freqs: ``(rotary heads, planes, axes)``; further heads and channels stay as they are.
        num_prefix_tokens: Leading tokens that have no position and stay as they are.
        interleaved: Layout of the pairs.
        in_place: Overwrite q and k and return them; not differentiable.

    Returns:
        The turned q and k, each of its own dtype. Differentiable in q, k, coordinates and freqs.

    Raises:
        ValueError: The kernels cannot serve (every reason is listed), shapes disagree, or ``in_place`` is asked for
            where a gradient is.
    """
    for x in (q,) if k is None else (q, k):
        _require_served(x)
    batch, heads, tokens, channels = q.shape if q.dim() == 4 else (0, 0, 0, 0)
    fits = (
        q.dim() == 4
        and (k is None or k.shape == q.shape)
        and freqs.dim() == 3
        and freqs.shape[0] <= heads
        and 2 * freqs.shape[1] <= channels
        and coordinates.shape[-2:] == (tokens - num_prefix_tokens, freqs.shape[2])
        and (coordinates.dim() == 2 or (coordinates.dim() == 3 and coordinates.shape[0] in (1, batch)))
    )
    if not fits:
        raise ValueError(
            "q and k must be (batch, heads, tokens, channels), coordinates ([batch,] tokens - num_prefix_tokens, "
            "axes) and freqs (at most heads, at most channels/2, axes); got "
            f"q {tuple(q.shape)}, k {None if k is None else tuple(k.shape)}, coordinates {tuple(coordinates.shape)}, "
            f"freqs {tuple(freqs.shape)}, num_prefix_tokens={num_prefix_tokens}"
        )
    positions = coordinates if coordinates.dim() == 3 else coordinates.unsqueeze(0)
    positions = positions.expand(batch, -1, -1)
    if in_place:
        _require_no_gradient(q, q if k is None else k, coordinates, freqs)
        _rotate_positions_(q, k, positions, freqs, num_prefix_tokens, interleaved)
        return q, k
    q_out, k_out = _rotate_positions(q, k, positions, freqs, num_prefix_tokens, interleaved)
    return q_out, None if k is None else k_out


def _require_served(x: Tensor) -> None:
    reasons = refusals(x.device, x.dtype, x.shape[-1])
    if reasons:
        raise ValueError("the kernels cannot serve this call:" + "".join(f"\n  - {reason}" for reason in reasons))


def _require_no_gradient(*tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError("in_place overwrites what a gradient would need; call it under torch.no_grad()")


def _launch() -> ModuleType:
    from . import launch

    return launch


def _four(x: Tensor, *lead: int) -> Tensor:
    """A view with as many leading dimensions in front as make four, or expanded to ``lead``."""
    x = x[(None,) * (4 - x.dim())]
    return x.expand(*lead, x.shape[-1]) if lead else x


def _given(x: Tensor, cos: Tensor, sin: Tensor) -> dict[str, Any]:
    lead = _four(x).shape[:3]
    return _launch().given(_four(cos, *lead), _four(sin, *lead))  # type: ignore[no-any-return]


_OP = "rotary_spatial_embeddings::"


@torch.library.custom_op(_OP + "rotate", mutates_args=())
def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    out = torch.empty_like(x)
    _launch().rotate(_four(x), None, _four(out), None, _given(x, cos, sin), interleaved)
    return out


@torch.library.custom_op(_OP + "rotate_", mutates_args=("x",))
def _rotate_(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    _launch().rotate(_four(x), None, _four(x), None, _given(x, cos, sin), interleaved)


@torch.library.custom_op(_OP + "rotate_backward", mutates_args=())
def _rotate_backward(
    x: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (x, cos, sin); the latter two empty without x."""
    dx = torch.empty_like(grad)
    dcos, dsin = (_angle_gradient(x, cos) for _ in range(2))
    wanted = x is not None
    _launch().rotate_backward(
        (None if x is None else _four(x), None),
        (_four(grad), None),
        (_four(dx), None),
        {
            "dcos": _four(dcos) if wanted else None,
            "dsin": _four(dsin) if wanted else None,
            "dcoordinates": None,
            "dfreqs": None,
        },
        _given(grad, cos, sin),
        interleaved,
    )
    return dx, dcos, dsin


@torch.library.custom_op(_OP + "rotate_positions", mutates_args=())
def _rotate_positions(
    q: Tensor, k: Tensor | None, coordinates: Tensor, freqs: Tensor, prefix: int, interleaved: bool
) -> tuple[Tensor, Tensor]:
    launch = _launch()
    q_out, k_out = torch.empty_like(q), q.new_empty(0) if k is None else torch.empty_like(k)
    angles = launch.computed(coordinates, freqs, prefix)
    launch.rotate(q, k, q_out, None if k is None else k_out, angles, interleaved)
    return q_out, k_out


@torch.library.custom_op(_OP + "rotate_positions_", mutates_args=("q", "k"))
def _rotate_positions_(
    q: Tensor, k: Tensor | None, coordinates: Tensor, freqs: Tensor, prefix: int, interleaved: bool
) -> None:
    launch = _launch()
    launch.rotate(q, k, q, k, launch.computed(coordinates, freqs, prefix), interleaved)


@torch.library.custom_op(_OP + "rotate_positions_backward", mutates_args=())
def _rotate_positions_backward(
    q: Tensor | None,
    k: Tensor | None,
    coordinates: Tensor,
    freqs: Tensor,
    prefix: int,
    interleaved: bool,
    grad_q: Tensor,
    grad_k: Tensor | None,
    needs_coordinates: bool,
    needs_freqs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (q, k, coordinates, freqs), the last two where needed; q and k are needed for those alone."""
    launch = _launch()
    batch, heads, tokens, channels = grad_q.shape
    axes = freqs.shape[2]
    dq, dk = torch.empty_like(grad_q), grad_q.new_empty(0) if grad_k is None else torch.empty_like(grad_k)
    by_head = by_block = None
    if needs_coordinates:
        by_head = grad_q.new_empty((batch, heads, tokens - prefix, axes), dtype=torch.float32)
    if needs_freqs:
        blocks = -(-tokens // launch.block_of_tokens(channels))
        by_block = grad_q.new_empty((batch, blocks, *freqs.shape), dtype=torch.float32)
    launch.rotate_backward(
        (q, k),
        (grad_q, grad_k),
        (dq, None if grad_k is None else dk),
        {"dcos": None, "dsin": None, "dcoordinates": by_head, "dfreqs": by_block},
        launch.computed(coordinates, freqs, prefix),
        interleaved,
    )
    dcoordinates = coordinates.new_empty(0) if by_head is None else by_head.sum(1).to(coordinates.dtype)
    dfreqs = freqs.new_empty(0) if by_block is None else by_block.sum((0, 1)).to(freqs.dtype)
    return dq, dk, dcoordinates, dfreqs


def _angle_gradient(x: Tensor | None, cos: Tensor) -> Tensor:
    """Uninitialised gradient of cosines or sines before it is summed to their shape; empty without x."""
    if x is None:
        return torch.empty(0, device=cos.device, dtype=torch.float32)
    return torch.empty(*x.shape[:-1], cos.shape[-1], device=cos.device, dtype=torch.float32)


@_rotate.register_fake
def _(x, cos, sin, interleaved):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


@_rotate_.register_fake
def _(x, cos, sin, interleaved):  # type: ignore[no-untyped-def]
    return None


@_rotate_backward.register_fake
def _(x, cos, sin, interleaved, grad):  # type: ignore[no-untyped-def]
    return torch.empty_like(grad), _angle_gradient(x, cos), _angle_gradient(x, cos)


@_rotate_positions.register_fake
def _(q, k, *rest):  # type: ignore[no-untyped-def]
    return torch.empty_like(q), q.new_empty(0) if k is None else torch.empty_like(k)


@_rotate_positions_.register_fake
def _(q, k, *rest):  # type: ignore[no-untyped-def]
    return None


@_rotate_positions_backward.register_fake
def _(q, k, coordinates, freqs, prefix, interleaved, grad_q, grad_k, needs_coordinates, needs_freqs):  # type: ignore[no-untyped-def]
    return (
        torch.empty_like(grad_q),
        grad_q.new_empty(0) if grad_k is None else torch.empty_like(grad_k),
        coordinates.new_empty(coordinates.shape if needs_coordinates else (0,)),
        freqs.new_empty(freqs.shape if needs_freqs else (0,)),
    )


def _save_rotate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cos, sin, ctx.interleaved = inputs
    ctx.angles_need_grad = cos.requires_grad or sin.requires_grad
    ctx.save_for_backward(x if ctx.angles_need_grad else None, cos, sin)


def _differentiate_rotate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, cos, sin = ctx.saved_tensors
    dx, dcos, dsin = _rotate_backward(x, cos, sin, ctx.interleaved, grad)
    if not ctx.angles_need_grad:
        return dx, None, None, None
    return dx, dcos.sum_to_size(cos.shape).to(cos.dtype), dsin.sum_to_size(sin.shape).to(sin.dtype), None


def _save_positions(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, coordinates, freqs, ctx.prefix, ctx.interleaved = inputs
    ctx.needs = coordinates.requires_grad, freqs.requires_grad
    ctx.with_k = k is not None
    keep = any(ctx.needs)
    ctx.save_for_backward(q if keep else None, k if keep else None, coordinates, freqs)


def _differentiate_positions(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    q, k, coordinates, freqs = ctx.saved_tensors
    dq, dk, dcoordinates, dfreqs = _rotate_positions_backward(
        q,
        k,
        coordinates,
        freqs,
        ctx.prefix,
        ctx.interleaved,
        grad_q,
        grad_k if ctx.with_k else None,
        *ctx.needs,
    )
    return (
        dq,
        dk if ctx.with_k else None,
        dcoordinates if ctx.needs[0] else None,
        dfreqs if ctx.needs[1] else None,
        None,
        None,
    )


_rotate.register_autograd(_differentiate_rotate, setup_context=_save_rotate)
_rotate_positions.register_autograd(_differentiate_positions, setup_context=_save_positions)
