"""The backward pass of all others on points: derivatives of the form, see :mod:`..points`."""

from __future__ import annotations

from typing import Any

from ..cells import start_of
from ..jit import helper, kernel
from ..simd import fma, get, given, lanes, load, number, put, splat, store, total
from .bundles import Backward, Points, Room, Span
from .corners import look, take_shares
from .forward import spread


@helper
def _place_factors(x: Points, span: Span, room: Room, to: Backward, point: int) -> Any:
    """Put what belongs to corners into their weights and slopes; the factor that is left for all of them.

    Relative shares belong to corners. In the gradient of the place they count for no more than the group's mass.
    """
    factor = get(to.factors, point)
    if not given(to.highest):
        return factor
    take_shares(x, span, room, factor, to.highest)
    for n in range(x.corners):
        share = get(room.share, n)
        put(room.weight, n, get(room.weight, n) * share)
        share = min(share, get(to.largest, span.pair * x.groups + get(room.at, n)))
        for axis in range(3):
            put(room.slope, 8 * axis + n, get(room.slope, 8 * axis + n) * share)
    return number(room.weight, 1)


@kernel
def derivatives(span: Span, x: Points, to: Backward, room: Room) -> int:
    """Derivatives of the form by everything that is wanted, for an item's tokens; rows and sums are 0 before."""
    nothing, step = splat(number(room.weight, 0)), lanes(room.weight)
    groups, tokens, rows = start_of(to.groups, span), start_of(to.tokens, span), start_of(to.of_tokens, span)
    for i in range(span.first, span.last):
        token, row = tokens + i * to.tokens.row, rows + i * to.of_tokens.row
        for p in range(x.per_token):
            point = (span.pair * x.tokens + i) * x.per_token + p
            look(x, span, room, point, True)
            factor = _place_factors(x, span, room, to, point)
            factors, value, along_0, along_1, along_2 = splat(factor), nothing, nothing, nothing, nothing
            for c in range(0, to.groups.channels, step):
                seen, slope_0, slope_1, slope_2 = nothing, nothing, nothing, nothing
                for n in range(x.corners):
                    vector = load(to.groups.data, groups + get(room.at, n) * to.groups.row + c)
                    seen = fma(get(room.weight, n), vector, seen)
                    slope_0 = fma(get(room.slope, n), vector, slope_0)
                    slope_1 = fma(get(room.slope, 8 + n), vector, slope_1)
                    slope_2 = fma(get(room.slope, 16 + n), vector, slope_2)
                if given(to.of_tokens.data):
                    store(to.of_tokens.data, row + c, fma(factors, seen, load(to.of_tokens.data, row + c)))
                vector = load(to.tokens.data, token + c)
                value = fma(seen, vector, value)
                along_0, along_1 = fma(slope_0, vector, along_0), fma(slope_1, vector, along_1)
                along_2 = fma(slope_2, vector, along_2)
            _finish(x, span, room, to, point, factor, total(value), total(along_0), total(along_1), total(along_2))
            if given(to.of_groups):
                for n in range(x.corners):
                    put(room.weight, n, get(room.weight, n) * factor)
                spread(x, span, room, to.tokens, token, to.of_groups)
    return 0


@helper
def _finish(
    x: Points,
    span: Span,
    room: Room,
    to: Backward,
    point: int,
    factor: Any,
    value: Any,
    along_0: Any,
    along_1: Any,
    along_2: Any,
) -> None:
    """Write what belongs to the point, with what reaches it through masses."""
    if given(to.grad_masses):
        for n in range(x.corners):
            arriving = get(to.grad_masses, span.pair * x.groups + get(room.at, n))
            value += get(room.weight, n) * arriving
            along_0 += get(room.slope, n) * arriving
            along_1 += get(room.slope, 8 + n) * arriving
            along_2 += get(room.slope, 16 + n) * arriving
    if given(to.of_factors):
        put(to.of_factors, point, value)
    if given(to.of_places):
        start = (point + 1) * x.ndim - 3
        if x.ndim > 2:
            _write_move(room, to, start, 0, factor * along_0)
        if x.ndim > 1:
            _write_move(room, to, start, 1, factor * along_1)
        _write_move(room, to, start, 2, factor * along_2)


@helper
def _write_move(room: Room, to: Backward, start: int, axis: int, move: Any) -> None:
    put(to.of_places, start + axis, move if get(room.moves, axis) > 0 else number(to.of_places, 0))
