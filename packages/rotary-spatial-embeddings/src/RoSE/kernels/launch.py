"""The kernels as functions of tensors: allocate shares, describe operands, launch."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import device
from .sealed import seal

# Channels of a block of tokens. A rotation does little else than move bytes, so one size serves every case: large
# enough for wide loads by 128 threads, small enough that nothing spills.
_BLOCK_CHANNELS = 4096

# Samples are the second axis of a launch, which ends here.
_MOST_SAMPLES = 65_535

# Tensors of channels, whose rows are loaded in wide pieces where all of them begin at multiples of 16 elements; and
# those of cosines and sines.
_CHANNELS = ("q", "k", "q_out", "k_out", "grad_q", "grad_k", "dq", "dk")
_ANGLES = ("cos", "sin", "dcos", "dsin")

# Offsets within one sample and head fit 32 bits below this.
_NARROW = 2**31


class Strided(NamedTuple):
    """How a tensor lies in memory."""

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def block_of_tokens(channels: int) -> int:
    """Tokens per program."""
    return int(max(1, min(128, _BLOCK_CHANNELS // (2 * _padded_planes(channels)))))


def rotate(
    q: Tensor, k: Tensor | None, q_out: Tensor, k_out: Tensor | None, angles: dict[str, Any], interleaved: bool
) -> None:
    """Turn (B, H, N, D) tensors; ``angles`` as :func:`given` or :func:`computed` describe them."""
    tensors = {"q": q, "k": k, "q_out": q_out, "k_out": k_out}
    _launch(device.rotate_forward, q, tensors, angles, interleaved)


def rotate_backward(
    x: tuple[Tensor | None, Tensor | None],
    grads: tuple[Tensor, Tensor | None],
    results: tuple[Tensor, Tensor | None],
    shares: dict[str, Tensor | None],
    angles: dict[str, Any],
    interleaved: bool,
) -> None:
    """Turn gradients back; ``shares`` holds what to fill for the gradients of the angles."""
    tensors = {"q": x[0], "k": x[1], "grad_q": grads[0], "grad_k": grads[1], "dq": results[0], "dk": results[1]}
    _launch(device.rotate_backward, grads[0], tensors | shares, angles, interleaved)


def given(cos: Tensor, sin: Tensor) -> dict[str, Any]:
    """Angles by their cosines and sines, (B, H, N, planes) by strides."""
    return {
        "cos": cos,
        "sin": sin,
        "coordinates": None,
        "freqs": None,
        "rotary_heads": cos.shape[1],
        "prefix": 0,
        "PLANES": cos.shape[-1],
        "AXES": 0,
    }


def computed(coordinates: Tensor, freqs: Tensor, prefix: int) -> dict[str, Any]:
    """Angles by positions (B, N - prefix, axes) and wave vectors (heads, planes, axes).

    The kernels count in turns, because whole turns can be taken off exactly in any precision.
    """
    return {
        "cos": None,
        "sin": None,
        "coordinates": coordinates,
        "freqs": freqs.to(torch.float64) / (2 * math.pi),
        "rotary_heads": freqs.shape[0],
        "prefix": prefix,
        "PLANES": freqs.shape[1],
        "AXES": freqs.shape[2],
    }


def _launch(
    kernel: Any, like: Tensor, tensors: dict[str, Tensor | None], angles: dict[str, Any], interleaved: bool
) -> None:
    if like.numel() == 0:
        return
    operands = tensors | angles
    if like.shape[0] <= _MOST_SAMPLES:
        _launch_part(kernel, like, operands, interleaved)
        return
    for start in range(0, like.shape[0], _MOST_SAMPLES):
        part = {
            name: x[start : start + _MOST_SAMPLES] if isinstance(x, Tensor) and name != "freqs" else x
            for name, x in operands.items()
        }
        _launch_part(kernel, like[start : start + _MOST_SAMPLES], part, interleaved)


def _launch_part(kernel: Any, like: Tensor, operands: dict[str, Any], interleaved: bool) -> None:
    forms = tuple(Strided(name, x.shape, x.stride()) for name, x in operands.items() if isinstance(x, Tensor))
    grid, described = _described(kernel, like.shape, forms)
    # Triton launches on the current device, wherever the operands are.
    with torch.cuda.device_of(like):  # type: ignore[no-untyped-call]
        kernel[grid](**operands, **described, INTERLEAVED=interleaved)


# Asked again and again of the same few, and more work than a launch.
@functools.lru_cache(1024)
def _described(
    kernel: Any, like: tuple[int, ...], forms: tuple[Strided, ...]
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Programs of a launch, and what its kernel is told of the tensors."""
    batch, heads, tokens, channels = like
    named = {x.name: x for x in forms}
    block = block_of_tokens(channels)
    described: dict[str, Any] = {
        name: None if (x := named.get(name.removesuffix("_strides"))) is None else _sealed(x)
        for name in kernel.arg_names
        if name.endswith("_strides")
    }
    described |= {
        "heads": heads,
        "tokens": tokens,
        "CHANNELS": channels,
        "BLOCK_N": block,
        "BLOCK_P": _padded_planes(channels),
        "ALIGNED": _aligned(named, _CHANNELS),
        "ALIGNED_ANGLES": _aligned(named, _ANGLES),
        "WIDE": any(_extent(x) >= _NARROW for x in forms),
    }
    return (heads * triton.cdiv(tokens, block), batch), described


def _padded_planes(channels: int) -> int:
    return int(triton.next_power_of_2((channels + 1) // 2))


def _extent(x: Strided) -> int:
    """Distance in elements from the first to the last of one sample and head."""
    return sum((n - 1) * s for n, s in zip(x.shape[-2:], x.strides[-2:], strict=True))


def _strides(x: Strided) -> tuple[int, ...]:
    """Those of axes along which there is more than one; of others they may be anything, and 0 is as good."""
    return tuple(0 if n == 1 else stride for n, stride in zip(x.shape, x.strides, strict=True))


def _sealed(x: Strided) -> tuple[int, ...]:
    """Strides, which change with sizes; that along rows does not, and 1 is worth a kernel."""
    *others, last = _strides(x)
    return (*seal(tuple(others)), x.strides[-1] if last == 0 else last)


def _aligned(named: dict[str, Strided], names: tuple[str, ...]) -> bool:
    return all(stride % 16 == 0 for name in names if name in named for stride in _strides(named[name])[:-1])
