"""The corners of a point: the groups around it, how near each is, and how that changes as the point moves.

The formulas are those of :mod:`...deformable.interpolation`. A block has all corners of some tokens: the bits of a
corner's number say along which axes it is the upper one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from RoSE.kernels.sealed import opened

from ..sealed import opened_triple
from .bundles import Along, Corners, Here

LEAST_WEIGHT = tl.constexpr(1e-6)
"""As :data:`...deformable.interpolation.LEAST_WEIGHT`."""

LARGEST_EXPONENT = tl.constexpr(80.0)
"""As :data:`...deformable.plain.LARGEST_EXPONENT`."""


@triton.jit
def tokens_of_program(x, BLOCK: tl.constexpr):
    """The tokens that a program owns."""
    tokens = opened(x.tokens)
    blocks = (tokens + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    pair = program // blocks
    heads = opened(x.heads)
    index = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    outer, middle, inner = opened_triple(x.sizes)
    return Here(pair // heads, pair % heads, index, index < tokens, pair.to(tl.int64), outer * middle * inner)


@triton.jit
def number_of(x, here, point, PER_TOKEN: tl.constexpr):
    """The number of a point of every token, in 64 bits."""
    return (here.pair * opened(x.tokens) + here.index) * PER_TOKEN + point


@triton.jit
def along(x, here, number, AXIS: tl.constexpr, NDIM: tl.constexpr):
    """Corners along an axis, of the points of these numbers."""
    corner = tl.arange(0, 2**NDIM)[None, :]
    upper = (corner >> (2 - AXIS)) & 1
    if AXIS < 3 - NDIM:
        one = (number * 0 + 1).to(x.places.dtype.element_ty)
        return Along(here.index[:, None] * 0 + upper, one[:, None] + upper * 0, one[:, None] * 0 + upper, here.exists)
    else:
        if x.first is None:
            first, last = 0, opened_triple(x.sizes)[AXIS] - 1
        else:
            first = tl.load(x.first + here.batch * 3 + AXIS)
            last = tl.load(x.last + here.batch * 3 + AXIS)
        position = tl.load(x.places + number * NDIM + AXIS - (3 - NDIM), mask=here.exists, other=0.0)
        low, high = (here.index * 0 + first).to(position.dtype), (here.index * 0 + last).to(position.dtype)
        moves = (low <= position) & (position <= high)
        position = tl.where(position < low, low, position)
        position = tl.where(position > high, high, position)
        # What is nowhere is at 0; its weights are NaN.
        known = position == position
        whole = tl.where(known, position, low).to(tl.int32)
        # The last group has no upper neighbour: it is reached as fraction 1 of the last but one.
        lower = tl.where(known, tl.maximum(tl.minimum(whole, last - 1), first), 0)
        fraction = (position - lower.to(position.dtype))[:, None]
        index = tl.minimum(lower[:, None] + upper, last)
        weight = tl.where(upper == 1, fraction, 1.0 - fraction)
        slope = tl.where(upper == 1, fraction * 0.0 + 1.0, fraction * 0.0 - 1.0)
        return Along(index, weight, slope, moves)


@triton.jit
def look(x, here, number, NDIM: tl.constexpr):
    """The corners of every token's point of that number."""
    a = along(x, here, number, 0, NDIM)
    b = along(x, here, number, 1, NDIM)
    c = along(x, here, number, 2, NDIM)
    _, middle, inner = opened_triple(x.sizes)
    index = (a.index * middle + b.index) * inner + c.index
    weight = a.weight * b.weight * c.weight
    slope_0 = a.slope * b.weight * c.weight
    slope_1 = a.weight * b.slope * c.weight
    slope_2 = a.weight * b.weight * c.slope
    move_0, move_1, move_2 = a.moves, b.moves, c.moves
    if x.valid is not None:
        pointers = x.valid + here.batch.to(tl.int64) * here.groups + index
        held = tl.load(pointers, mask=here.exists[:, None], other=0).to(weight.dtype)
        weight = weight * held
        total = tl.sum(weight, 1)
        nothing = total < LEAST_WEIGHT
        weight = tl.where(nothing[:, None], 0.0, weight / tl.where(nothing, 1.0, total)[:, None])
        slope_0 = over_holes(slope_0, held, weight)
        slope_1 = over_holes(slope_1, held, weight)
        slope_2 = over_holes(slope_2, held, weight)
        something = nothing == 0
        move_0, move_1, move_2 = move_0 & something, move_1 & something, move_2 & something
    return Corners(index, weight, (slope_0, slope_1, slope_2), (move_0, move_1, move_2))


@triton.jit
def over_holes(slope, held, weight):
    """Slopes of weights that are scaled up where others are not valid: they are not."""
    slope = slope * held
    return slope - weight * tl.sum(slope, 1)[:, None]


@triton.jit
def at_groups(here, corners):
    """Where one number of every group around is found among those of all samples and heads."""
    return here.pair * here.groups + corners.index


@triton.jit
def relative_shares(log_share, highest):
    """Shares relative to the largest memberships of the groups around; NaN stays."""
    exponent = log_share[:, None] - highest
    return tl.exp(tl.where(exponent > LARGEST_EXPONENT, LARGEST_EXPONENT, exponent))
