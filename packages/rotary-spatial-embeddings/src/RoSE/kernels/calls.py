"""The kernels as functions to call: arguments are checked, and what cannot be served is refused, never replaced."""

from __future__ import annotations

import torch
from torch import Tensor

from ..direct import is_watched
from ..tracing import is_transformed
from ..validation import require_position_dtype
from . import operators
from .support import MOST_DIMENSIONS, refusals


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
    if not 2 <= x.dim() <= MOST_DIMENSIONS or cos.shape != sin.shape or 2 * cos.shape[-1] > x.shape[-1]:
        raise ValueError(
            "x must have 2 to 4 dimensions, cos and sin one shape, and at most half of x's channels as planes; "
            f"got x {tuple(x.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}"
        )
    if in_place:
        _require_no_gradient(x, cos, sin)
        operators.rotate_in_place(x, cos, sin, interleaved)
        return x
    turn = operators.rotate if _somebody_looks_on(x, cos, sin) else operators.rotate_directly
    out: Tensor = turn(x, cos, sin, interleaved)
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
        TypeError: Coordinates or freqs that are not float32 or float64.
        ValueError: The kernels cannot serve (every reason is listed), shapes disagree, or ``in_place`` is asked for
            where a gradient is.
    """
    for x in (q,) if k is None else (q, k):
        _require_served(x)
    require_position_dtype("coordinates", coordinates)
    require_position_dtype("freqs", freqs)
    batch, heads, tokens, channels = q.shape if q.dim() == 4 else (0, 0, 0, 0)
    fits = (
        q.dim() == 4
        and (k is None or k.shape == q.shape)
        and freqs.dim() == 3
        and freqs.shape[0] <= heads
        and 2 * freqs.shape[1] <= channels
        and coordinates.shape[-2:] == (tokens - num_prefix_tokens, freqs.shape[2])
        and (coordinates.dim() == 2 or (coordinates.dim() == 3 and coordinates.shape[0] == batch))
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
        operators.rotate_positions_in_place(q, k, positions, freqs, num_prefix_tokens, interleaved)
        return q, k
    watched = _somebody_looks_on(q, k, positions, freqs)
    turn = operators.rotate_positions if watched else operators.rotate_positions_directly
    q_out, k_out = turn(q, k, positions, freqs, num_prefix_tokens, interleaved)
    return q_out, None if k is None else k_out


def _somebody_looks_on(*tensors: Tensor | None) -> bool:
    return is_watched(*tensors) or is_transformed()


def _require_served(x: Tensor) -> None:
    reasons = refusals(x.device, x.dtype, x.shape[-1])
    if reasons:
        raise ValueError("the kernels cannot serve this call:" + "".join(f"\n  - {reason}" for reason in reasons))


def _require_no_gradient(*tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError("in_place must be False where a gradient is wanted (use torch.no_grad()); got True")
