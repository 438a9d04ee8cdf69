"""The kernels as operators of torch: shapes for tracing, and gradients.

First gradients come from a kernel. Where somebody will differentiate them again (``create_graph=True``), or asks for
several at once (``is_grads_batched=True``), they come from the plain form instead, through which torch sees.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..direct import directly, is_watched
from ..rotation import reduce_plain, rotate_plain
from ..tracing import is_batched
from .plain import rotate_by_positions

_OP = "rotary_spatial_embeddings::"


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


def _run_rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn x, four-dimensional at most, by given cosines and sines."""
    out = torch.empty_like(x)
    _launch().rotate(_four(x), None, _four(out), None, _given(x, cos, sin), interleaved)
    return out


@torch.library.custom_op(_OP + "rotate_", mutates_args=("x",))
def rotate_in_place(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    """The same in place."""
    _launch().rotate(_four(x), None, _four(x), None, _given(x, cos, sin), interleaved)


def _run_rotate_backward(
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


def _run_rotate_positions(
    q: Tensor, k: Tensor | None, coordinates: Tensor, freqs: Tensor, prefix: int, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Turn q and k, (B, H, N, D), by coordinates (B, N - prefix, axes); an empty tensor stands for no k."""
    launch = _launch()
    q_out, k_out = torch.empty_like(q), q.new_empty(0) if k is None else torch.empty_like(k)
    angles = launch.computed(coordinates, freqs, prefix)
    launch.rotate(q, k, q_out, None if k is None else k_out, angles, interleaved)
    return q_out, k_out


@torch.library.custom_op(_OP + "rotate_positions_", mutates_args=("q", "k"))
def rotate_positions_in_place(
    q: Tensor, k: Tensor | None, coordinates: Tensor, freqs: Tensor, prefix: int, interleaved: bool
) -> None:
    """The same in place."""
    launch = _launch()
    launch.rotate(q, k, q, k, launch.computed(coordinates, freqs, prefix), interleaved)


def _run_rotate_positions_backward(
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


rotate = torch.library.custom_op(_OP + "rotate", _run_rotate, mutates_args=())
rotate_backward = torch.library.custom_op(_OP + "rotate_backward", _run_rotate_backward, mutates_args=())
rotate_positions = torch.library.custom_op(_OP + "rotate_positions", _run_rotate_positions, mutates_args=())
rotate_positions_backward = torch.library.custom_op(
    _OP + "rotate_positions_backward", _run_rotate_positions_backward, mutates_args=()
)


def _angle_gradient(x: Tensor | None, cos: Tensor) -> Tensor:
    """Uninitialised gradient of cosines or sines before it is summed to their shape; empty without x."""
    if x is None:
        return torch.empty(0, device=cos.device, dtype=torch.float32)
    return torch.empty(*x.shape[:-1], cos.shape[-1], device=cos.device, dtype=torch.float32)


@rotate.register_fake
def _(x, cos, sin, interleaved):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


@rotate_in_place.register_fake
def _(x, cos, sin, interleaved):  # type: ignore[no-untyped-def]
    return None


@rotate_backward.register_fake
def _(x, cos, sin, interleaved, grad):  # type: ignore[no-untyped-def]
    return torch.empty_like(grad), _angle_gradient(x, cos), _angle_gradient(x, cos)


@rotate_positions.register_fake
def _(q, k, *rest):  # type: ignore[no-untyped-def]
    return torch.empty_like(q), q.new_empty(0) if k is None else torch.empty_like(k)


@rotate_positions_in_place.register_fake
def _(q, k, *rest):  # type: ignore[no-untyped-def]
    return None


@rotate_positions_backward.register_fake
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
    if torch.is_grad_enabled() or is_batched(grad):
        dx = rotate_plain(grad, cos, -sin, ctx.interleaved)
        return dx, *(reduce_plain(grad, x, cos, ctx.interleaved) if ctx.angles_need_grad else (None, None)), None
    back = rotate_backward if is_watched(grad) else _run_rotate_backward
    dx, dcos, dsin = back(x, cos, sin, ctx.interleaved, grad)
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
    grads = grad_q, grad_k if ctx.with_k else None
    if torch.is_grad_enabled() or is_batched(grad_q) or is_batched(grad_k):
        differentiate = _differentiate_plain_form if any(ctx.needs) else _turn_back_plainly
        return *differentiate((q, k), coordinates, freqs, ctx.prefix, ctx.interleaved, grads), None, None
    back = rotate_positions_backward if is_watched(grad_q, grad_k) else _run_rotate_positions_backward
    dq, dk, dcoordinates, dfreqs = back(q, k, coordinates, freqs, ctx.prefix, ctx.interleaved, *grads, *ctx.needs)
    return (
        dq,
        dk if ctx.with_k else None,
        dcoordinates if ctx.needs[0] else None,
        dfreqs if ctx.needs[1] else None,
        None,
        None,
    )


Pair = tuple[Tensor | None, Tensor | None]


def _turn_back_plainly(
    _: Pair, coordinates: Tensor, freqs: Tensor, prefix: int, interleaved: bool, grads: Pair
) -> tuple[Tensor | None, ...]:
    """Gradients of (q, k, coordinates, freqs), differentiable, where the angles need none."""
    back = (None if g is None else rotate_by_positions(g, coordinates, -freqs, prefix, interleaved) for g in grads)
    return *back, None, None


def _differentiate_plain_form(
    features: Pair, coordinates: Tensor, freqs: Tensor, prefix: int, interleaved: bool, grads: Pair
) -> tuple[Tensor | None, ...]:
    """Gradients of (q, k, coordinates, freqs), differentiable, where the angles need some.

    They are partial derivatives: of aliases, behind which one operand may depend on another.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        places, waves = coordinates.view_as(coordinates), freqs.view_as(freqs)
        alias = [None if x is None else x.view_as(x) for x in features]
        pairs = [(x, g) for x, g in zip(alias, grads, strict=True) if x is not None and g is not None]
        turned = [rotate_by_positions(x, places, waves, prefix, interleaved) for x, _ in pairs]
    operands = (*alias, places, waves)
    wanted = [x for x in operands if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(turned, wanted, [g for _, g in pairs], create_graph=again))
    return tuple(next(found) if x is not None and x.requires_grad else None for x in operands)


rotate.register_autograd(_differentiate_rotate, setup_context=_save_rotate)
rotate_positions.register_autograd(_differentiate_positions, setup_context=_save_positions)

rotate_directly = directly("rotate", _run_rotate, _save_rotate, _differentiate_rotate)
rotate_positions_directly = directly(
    "rotate_positions", _run_rotate_positions, _save_positions, _differentiate_positions
)
