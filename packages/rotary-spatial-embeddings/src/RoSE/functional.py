"""Rotary spatial embedding as pure functions: positions to angles, angles to rotated channels.

The modules of this package are thin layers over these three. With a wave vector w for every plane (two
channels) of every head, the token at position p has its plane turned by the angle ``<p, w>``. A query at p
and a key at r then meet under the angle ``<p - r, w>``: the score knows only where they are relative to each
other (Su et al., RoFormer, arXiv:2104.09864, equations 13-16, here with vectors for positions).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .rotation import rotate_eager, rotate_plain
from .validation import require_floating

__all__ = ["cos_sin", "phases", "rotate"]


def phases(coordinates: Tensor, freqs: Tensor) -> Tensor:
    """Angles of every token, head and plane: the inner products ``<p, w>``.

    Args:
        coordinates: Positions ``(..., tokens, spatial_dims)`` in physical units.
        freqs: Wave vectors ``(heads, planes, spatial_dims)`` in radians per physical unit.

    Returns:
        Angles in radians, ``(..., tokens, heads, planes)``, float64 and not reduced. Float64 because an angle
        of 1e5 radians in float32 is only good to 0.008. (Apple's GPUs have no float64: for tensors there, the
        angles are made on the CPU.)

    Raises:
        TypeError: An argument that is not a tensor of real floating-point numbers.
        ValueError: Shapes that disagree.
    """
    require_floating("coordinates", coordinates)
    require_floating("freqs", freqs)
    if freqs.dim() != 3:
        raise ValueError(f"freqs must have shape (heads, planes, spatial_dims); got {tuple(freqs.shape)}")
    if coordinates.dim() < 2 or coordinates.shape[-1] != freqs.shape[-1]:
        raise ValueError(
            f"coordinates must have shape (..., tokens, {freqs.shape[-1]}) for freqs {tuple(freqs.shape)}; "
            f"got {tuple(coordinates.shape)}"
        )
    if freqs.device.type == "mps":
        coordinates, freqs = coordinates.cpu(), freqs.cpu()
    # Autocast leaves float64 products alone, so this holds under autocast too.
    wide = freqs.to(torch.float64).flatten(0, 1)
    angles = coordinates.to(torch.float64) @ wide.transpose(0, 1)
    return torch.unflatten(angles, -1, freqs.shape[:2])


def cos_sin(angles: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Cosine and sine of angles, accurate however large the angles are.

    The angles are reduced modulo 2 pi in their own dtype (float64 from :func:`phases`) before they are
    rounded to ``dtype``, so positions 1e5 units from zero cost no accuracy.

    Args:
        angles: Radians, any shape.
        dtype: Of the results; float32 or float64.

    Returns:
        Two tensors of the shape of ``angles``.
    """
    require_floating("angles", angles)
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64; got {dtype}")
    # A tensor, because the ONNX exporter narrows plain numbers to float32: 1e-4 off after a hundred turns.
    turn = torch.tensor(2 * math.pi, dtype=torch.float64, device="cpu")
    reduced = (angles / turn).frac_().mul_(turn).to(dtype)
    return reduced.cos(), reduced.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = True) -> Tensor:
    """Turn pairs of channels: ``(a, b) -> (a cos - b sin, a sin + b cos)``.

    Args:
        x: ``(..., channels)``, any real floating dtype.
        cos: Cosines, of a shape that broadcasts to ``(*x.shape[:-1], planes)`` with ``2 * planes <=
            channels``.
        sin: Sines, of the same shape.
        interleaved: Pairs are channels ``(2i, 2i + 1)``; if False, channels ``(i, i + planes)``, the "half"
            layout of GPT-NeoX and Llama. The two differ by a fixed permutation of channels.

    Returns:
        A new tensor of x's shape and dtype, computed in float32 at least. Channels from ``2 * planes`` on are
        copied unchanged. Differentiable in x, cos and sin; in eager mode nothing of x's size is allocated
        besides the result.

    Raises:
        TypeError: An argument that is not a tensor of real floating-point numbers.
        ValueError: Shapes that do not broadcast as said.
    """
    require_floating("x", x)
    require_floating("cos", cos)
    require_floating("sin", sin)
    _require_angle_shape(x, cos, sin)
    # Compilers and tensor subclasses (fake, nested, distributed) need operations they can see through.
    transparent = torch.compiler.is_compiling() or any(
        type(t) not in (Tensor, torch.nn.Parameter) for t in (x, cos, sin)
    )
    return (rotate_plain if transparent else rotate_eager)(x, cos, sin, interleaved)


def _require_angle_shape(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if cos.shape != sin.shape:
        raise ValueError(f"cos and sin must have one shape; got {tuple(cos.shape)} and {tuple(sin.shape)}")
    if x.dim() == 0 or cos.dim() == 0 or 2 * cos.shape[-1] > x.shape[-1]:
        raise ValueError(
            "cos needs one plane (its last dimension) for every two channels rotated, at most half of x's "
            f"channels; got cos {tuple(cos.shape)} for x {tuple(x.shape)}"
        )
    lead, wanted = cos.shape[:-1], x.shape[:-1]
    fits = len(lead) <= len(wanted) and all(
        a == 1 or a == b for a, b in zip(lead, wanted[len(wanted) - len(lead) :], strict=True)
    )
    if not fits:
        raise ValueError(
            f"cos must broadcast to x's leading dimensions {tuple(wanted)}; got {tuple(lead)} before planes"
        )
