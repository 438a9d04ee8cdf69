"""Angles in registers: products of positions and wave numbers, reduced modulo a turn, and their cosines and sines."""

from __future__ import annotations

import triton
import triton.language as tl

from .sealed import opened, opened_stride

TURN = tl.constexpr(6.283185307179586)


@triton.jit
def leading_bits(x):
    """The first 12 bits of a float32's significand: what is left over has 12, and products of such are exact."""
    return (x.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)


@triton.jit
def two_parts(x):
    """A number of any floating type as a float32 and the float32 that is missing."""
    high = x.to(tl.float32)
    return high, (x - high.to(x.dtype)).to(tl.float32)


@triton.jit
def fraction(turns):
    """Turns less the nearest whole number of them; exact."""
    return turns - tl.floor(turns + 0.5)


@triton.jit
def reduced_product(p, p_rest, w, w_rest):
    """(p + p_rest) * (w + w_rest) turns less a whole number of turns, in float32 throughout.

    The products of parts of 12 bits are exact, and so are their fractions: it does not matter whether a compiler fuses
    multiplication and subtraction. What is left is below a turn for angles up to 1e7 radians.
    """
    p1 = leading_bits(p)
    p2 = p - p1
    w1 = leading_bits(w)
    w2 = w - w1
    middle = fraction(p1 * w2) + fraction(p2 * w1)
    return fraction(fraction(p1 * w1) + (middle + (p2 * w2 + (p_rest * w + p * w_rest))))


@triton.jit
def cos_sin(turns):
    """Cosine and sine of an angle of a few turns.

    One reduction to an eighth of a turn serves both. The polynomials are those of sinf.c and cosf.c of the Cephes
    library (S. L. Moshier); their error there is below 1e-7.
    """
    quarters = tl.floor(turns * 4 + 0.5)
    x = (turns - quarters * 0.25) * TURN
    z = x * x
    s = x + x * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
    c = 1.0 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
    quadrant = quarters.to(tl.int32) & 3
    odd = (quadrant & 1) == 1
    cos = tl.where(odd, s, c)
    sin = tl.where(odd, c, s)
    cos = tl.where((quadrant == 1) | (quadrant == 2), -cos, cos)
    sin = tl.where(quadrant >= 2, -sin, sin)
    return cos, sin


@triton.jit
def base_of(x, batch, head, strides, ALIGNED: tl.constexpr):
    """Pointer to a sample's and head's rows; in 64 bits, because whole batches can be that large."""
    of_batch, of_head = opened_stride(strides[0], ALIGNED), opened_stride(strides[1], ALIGNED)
    return x + batch.to(tl.int64) * of_batch + head.to(tl.int64) * of_head


@triton.jit
def position(coordinates, batch, token, exists, axis, prefix, strides, WIDE: tl.constexpr):
    """One coordinate of the tokens in two parts; 0 for those in front of the first that has a position."""
    row = token - prefix
    if WIDE:
        row = row.to(tl.int64)
    pointers = coordinates + batch.to(tl.int64) * opened(strides[0]) + row * opened(strides[1]) + axis * strides[2]
    return two_parts(tl.load(pointers, mask=exists & (token >= prefix), other=0.0))


@triton.jit
def wave_number(freqs, head, plane, axis, strides, rotary_heads, PLANES: tl.constexpr):
    """One component of the wave vectors of a head, in turns per unit, in two parts; 0 where nothing rotates."""
    pointers = freqs + head * opened(strides[0]) + plane * opened(strides[1]) + axis * strides[2]
    planes = tl.where(head < rotary_heads, PLANES, 0)
    return two_parts(tl.load(pointers, mask=plane < planes, other=0.0))


@triton.jit
def rotation(
    cos,
    sin,
    coordinates,
    freqs,
    cos_strides,
    sin_strides,
    coordinates_strides,
    freqs_strides,
    batch,
    head,
    token,
    exists,
    plane,
    rotary_heads,
    prefix,
    AXES: tl.constexpr,
    PLANES: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED_ANGLES: tl.constexpr,
):
    """Cosines and sines of a block of tokens and planes: loaded if given, else computed from positions."""
    if cos is not None:
        mask = exists[:, None] & (plane < PLANES)[None, :]
        rows = token.to(tl.int64) if WIDE else token
        c_rows = base_of(cos, batch, head, cos_strides, ALIGNED_ANGLES)
        s_rows = base_of(sin, batch, head, sin_strides, ALIGNED_ANGLES)
        c_rows += rows[:, None] * opened_stride(cos_strides[2], ALIGNED_ANGLES)
        s_rows += rows[:, None] * opened_stride(sin_strides[2], ALIGNED_ANGLES)
        c = tl.load(c_rows + plane[None, :] * cos_strides[3], mask=mask, other=1.0)
        s = tl.load(s_rows + plane[None, :] * sin_strides[3], mask=mask, other=0.0)
        return c.to(tl.float32), s.to(tl.float32)
    else:
        turns = tl.zeros((token.shape[0], plane.shape[0]), tl.float32)
        for axis in tl.static_range(AXES):
            p, p_rest = position(coordinates, batch, token, exists, axis, prefix, coordinates_strides, WIDE)
            w, w_rest = wave_number(freqs, head, plane, axis, freqs_strides, rotary_heads, PLANES)
            turns += reduced_product(p[:, None], p_rest[:, None], w[None, :], w_rest[None, :])
        return cos_sin(turns)
