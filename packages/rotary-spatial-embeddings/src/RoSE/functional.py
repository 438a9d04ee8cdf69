"""Rotary spatial embedding as pure functions: positions to angles, angles to rotated channels.

The modules of this package are thin layers over these three. With a wave vector w for every plane (two
channels) of every head, the token at position p has its plane turned by the angle ``<p, w>``. A query at p
and a key at r then meet under the angle ``<p - r, w>``: the score knows only where they are relative to each
other (Su et al., RoFormer, arXiv:2104.09864, equations 13-16, here with vectors for positions).
"""

from __future__ import annotations

from torch import Tensor

from . import dispatch
from .angles import cos_sin, phases
from .validation import require_flag

__all__ = ["cos_sin", "phases", "rotate"]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = True) -> Tensor:
    """Turn pairs of channels: ``(a, b) -> (a cos - b sin, a sin + b cos)``.

    Args:
        x: ``(..., channels)``, float64, float32, bfloat16 or float16.
        cos: Cosines, of a shape that broadcasts to ``(*x.shape[:-1], planes)`` with ``2 * planes <=
            channels``.
        sin: Sines, of the same shape.
        interleaved: Pairs are channels ``(2i, 2i + 1)``; if False, channels ``(i, i + planes)``, the "half"
            layout of GPT-NeoX and Llama. The two differ by a fixed permutation of channels.

    Returns:
        A new tensor of x's shape and dtype, computed in float32 at least. Channels from ``2 * planes`` on are
        copied unchanged. Differentiable in x, cos and sin; in eager mode nothing of x's size is allocated
        besides the result. On a GPU :mod:`RoSE.kernels` computes it, where it can.

    Raises:
        TypeError: An argument that is not a tensor of real floating-point numbers, ``interleaved`` not True or False.
        ValueError: Shapes that do not broadcast as said.
    """
    return dispatch.rotate(x, cos, sin, require_flag("interleaved", interleaved))
