"""The corners of a point: the groups around it, how near each is, and how that changes as the point moves.

The formulas are those of :mod:`...deformable.interpolation`, written out for three axes.
"""

from __future__ import annotations

import math
from typing import Any

from ..exponential import exp
from ..jit import helper
from ..simd import get, given, load, number, put, store
from .bundles import Points, Room, Span

LEAST_WEIGHT = 1e-6
"""As :data:`...deformable.interpolation.LEAST_WEIGHT`."""

LARGEST_EXPONENT = 80.0
"""As :data:`...deformable.plain.LARGEST_EXPONENT`."""


@helper
def _along(x: Points, span: Span, room: Room, point: int, axis: int) -> Any:
    """Indices below and above along an axis, and how far the point lies from the lower one."""
    unused = 3 - x.ndim
    zero = number(x.places, 0)
    if axis < unused:
        put(room.moves, axis, 0)
        return 0, 0, zero
    first, last = get(x.first, span.sample * x.box + axis), get(x.last, span.sample * x.box + axis)
    position = get(x.places, point * x.ndim + axis - unused)
    low, high = number(x.places, first), number(x.places, last)
    put(room.moves, axis, low <= position <= high)
    if position < low:
        position = low
    if position > high:
        position = high
    lower = 0
    if not math.isnan(position):
        # The last group has no upper neighbour: it is reached as fraction 1 of the last but one.
        lower = max(min(int(position), last - 1), first)
    return lower, min(lower + 1, last), position - number(x.places, lower)


@helper
def look(x: Points, span: Span, room: Room, point: int, slopes: bool) -> None:
    """Find the corners of a point, their weights, and where they are wanted the slopes of these."""
    one = number(x.places, 1)
    a, aa, u = _along(x, span, room, point, 0)
    b, bb, v = _along(x, span, room, point, 1)
    c, cc, w = _along(x, span, room, point, 2)
    _, middle, inner = x.sizes
    low, high = (a * middle + b) * inner, (a * middle + bb) * inner
    put(room.at, 0, low + c)
    put(room.at, 1, low + cc)
    put(room.at, 2, high + c)
    put(room.at, 3, high + cc)
    low, high = (aa * middle + b) * inner, (aa * middle + bb) * inner
    put(room.at, 4, low + c)
    put(room.at, 5, low + cc)
    put(room.at, 6, high + c)
    put(room.at, 7, high + cc)
    f, g, h = one - u, one - v, one - w
    fg, fv, ug, uv = f * g, f * v, u * g, u * v
    put(room.weight, 0, fg * h)
    put(room.weight, 1, fg * w)
    put(room.weight, 2, fv * h)
    put(room.weight, 3, fv * w)
    put(room.weight, 4, ug * h)
    put(room.weight, 5, ug * w)
    put(room.weight, 6, uv * h)
    put(room.weight, 7, uv * w)
    if slopes:
        _slopes(room, 0, 4, 2, 1, g * h, g * w, v * h, v * w)
        _slopes(room, 8, 2, 4, 1, f * h, f * w, u * h, u * w)
        _slopes(room, 16, 1, 4, 2, fg, fv, ug, uv)
    if given(x.valid):
        _go_round_holes(x, span, room, slopes)


@helper
def _slopes(room: Room, to: int, own: int, far: int, near: int, a: Any, b: Any, c: Any, d: Any) -> None:
    """Derivatives of weights by the place along an axis.

    Args:
        room: to be filled.
        to: where those of the axis start.
        own: from a corner to its neighbour along the axis.
        far: along the first of the others.
        near: along the second.
        a: the product of the others' weights at the corner that is low along both,
        b: high along the second,
        c: high along the first,
        d: along both.
    """
    put(room.slope, to, -a)
    put(room.slope, to + near, -b)
    put(room.slope, to + far, -c)
    put(room.slope, to + far + near, -d)
    put(room.slope, to + own, a)
    put(room.slope, to + own + near, b)
    put(room.slope, to + own + far, c)
    put(room.slope, to + own + far + near, d)


@helper
def _go_round_holes(x: Points, span: Span, room: Room, slopes: bool) -> None:
    """Weights of groups that are not valid are 0, and the others are scaled up; their slopes are not."""
    total = number(x.places, 0)
    for n in range(x.corners):
        held = number(x.places, get(x.valid, span.sample * x.groups + get(room.at, n)))
        put(room.weight, n, get(room.weight, n) * held)
        total += get(room.weight, n)
        if slopes:
            for axis in range(3):
                put(room.slope, 8 * axis + n, get(room.slope, 8 * axis + n) * held)
    nothing = total < number(x.places, LEAST_WEIGHT)
    if nothing:
        for axis in range(3):
            put(room.moves, axis, 0)
    for n in range(x.corners):
        put(room.weight, n, number(x.places, 0) if nothing else get(room.weight, n) / total)
    if slopes:
        for axis in range(3):
            along = number(x.places, 0)
            for n in range(x.corners):
                along += get(room.slope, 8 * axis + n)
            for n in range(x.corners):
                put(room.slope, 8 * axis + n, get(room.slope, 8 * axis + n) - get(room.weight, n) * along)


@helper
def take_shares(x: Points, span: Span, room: Room, log_share: Any, highest: Any) -> None:
    """The share of the point at hand relative to the largest membership of the group at every corner."""
    for n in range(x.corners):
        relative = log_share - get(highest, span.pair * x.groups + get(room.at, n))
        if relative > number(x.places, LARGEST_EXPONENT):
            relative = number(x.places, LARGEST_EXPONENT)
        put(room.share, n, relative)
    store(room.share, 0, exp(load(room.share, 0)))
