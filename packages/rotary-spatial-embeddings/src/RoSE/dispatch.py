"""The one place that decides what computes a rotation: the kernels, or one of the two plain forms.

The kernels serve on a GPU, where they can and have shown that they can (:mod:`RoSE.kernels.selfcheck`). Everything
that has to see through the rotation gets ordinary operations instead: function transforms and forward-mode derivatives,
tensor subclasses, and exporters and TorchScript's tracer, whose programs must run where this package is not installed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import kernels
from .angles import angles_of_tokens
from .kernels.agreement import check_rotation
from .kernels.selfcheck import SelfCheck
from .layouts import Heads, back_in_layout, heads_in_front
from .rotation import require_angle_shape, rotate_eager, rotate_plain
from .tracing import is_exporting, is_traced, is_transformed

_ORDINARY = frozenset((Tensor, torch.nn.Parameter))

# Device types on which the kernels are looked at.
DEVICE_TYPES = ("cuda",)

ROTATION_CHECK = SelfCheck("the rotation kernels of RoSE", check_rotation, "plain PyTorch")


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """:func:`RoSE.functional.rotate`."""
    require_angle_shape(x, cos, sin)
    if 2 <= x.dim() <= kernels.MOST_DIMENSIONS and _kernels_serve(x, cos, sin):
        return kernels.rotate(x, cos, sin, interleaved=interleaved)
    # Compilers, tracers and tensor subclasses (fake, nested, distributed) need operations they can see through.
    if torch.compiler.is_compiling() or is_traced() or not _are_ordinary(x, cos, sin):
        return rotate_plain(x, cos, sin, interleaved)
    return rotate_eager(x, cos, sin, interleaved)


def rotate_heads(x: Tensor, cos: Tensor, sin: Tensor, layout: str, heads: Heads) -> Tensor:
    """Turn the rotary heads by angles ``([batch,] tokens, rotary heads, planes)``; the others are copied."""
    if layout == "bnd":
        split = torch.unflatten(x, 2, (heads.number, heads.size))
        return rotate_heads(split, cos, sin, "bnhd", heads).flatten(2)
    heads_dim = 2 if layout == "bnhd" else 1
    if layout == "bhnd":
        cos, sin = cos.transpose(-3, -2), sin.transpose(-3, -2)
    if heads.rotary == heads.number:
        return rotate(x, cos, sin, heads.interleaved)
    turned = x.narrow(heads_dim, 0, heads.rotary)
    rest = x.narrow(heads_dim, heads.rotary, heads.number - heads.rotary)
    return torch.cat((rotate(turned, cos, sin, heads.interleaved), rest), dim=heads_dim)


def rotate_at(
    positions: Tensor, freqs: Tensor, features: Sequence[Tensor], num_prefix_tokens: int, layout: str, heads: Heads
) -> tuple[Tensor, ...]:
    """Rotate one or two tensors of features by their tokens' positions; what they share is computed once.

    Args:
        positions: ``([batch,] tokens, spatial_dims)``.
        freqs: Wave vectors ``(rotary heads, planes, spatial_dims)``.
        features: Laid out as ``layout`` says, with ``num_prefix_tokens`` before the tokens that have a position.
        num_prefix_tokens: Leading tokens that do not turn.
        layout: Of the features.
        heads: Of the features.
    """
    if _kernels_serve(features[0], positions, freqs) and _kernels_serve(features[-1], positions, freqs):
        return _rotate_in_kernels(positions, freqs, features, num_prefix_tokens, layout, heads)
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in features), torch.float32)
    cos, sin = angles_of_tokens(positions, freqs, num_prefix_tokens, dtype)
    return tuple(rotate_heads(x, cos, sin, layout, heads) for x in features)


def _rotate_in_kernels(
    positions: Tensor, freqs: Tensor, features: Sequence[Tensor], num_prefix_tokens: int, layout: str, heads: Heads
) -> tuple[Tensor, ...]:
    views = [heads_in_front(x, layout, heads) for x in features]
    turn = functools.partial(
        kernels.rotate_positions,
        coordinates=positions,
        freqs=freqs,
        num_prefix_tokens=num_prefix_tokens,
        interleaved=heads.interleaved,
    )
    together = len(views) == 2 and views[0].shape == views[1].shape
    turned = turn(*views) if together else [turn(x, None)[0] for x in views]
    return tuple(back_in_layout(x, layout) for x in turned if x is not None)


def _kernels_serve(x: Tensor, *others: Tensor) -> bool:
    if x.is_cpu and "cpu" not in DEVICE_TYPES:  # the usual answer, and cheaper than asking for a device's name
        return False
    if x.device.type not in DEVICE_TYPES:
        return False
    if not _are_ordinary(x, *others) or any(other.device != x.device for other in others):
        return False
    if is_exporting() or is_traced() or is_transformed():
        return False
    return not kernels.refusals(x.device, x.dtype, x.shape[-1]) and ROTATION_CHECK.passed(x.device)


def _are_ordinary(*tensors: Tensor) -> bool:
    return _ORDINARY.issuperset(map(type, tensors))
