"""Forward passes on points: the derivatives of the form by one operand each, see :mod:`..points`."""

from __future__ import annotations

import math
from typing import Any

from ..bundles import Rows
from ..cells import start_of
from ..jit import helper, kernel
from ..simd import add, fma, get, given, lanes, load, mul, number, put, splat, store, total
from .bundles import Forward, Points, Room, Span, Sums
from .corners import look, take_shares


@helper
def seen(x: Points, room: Room, groups: Rows, start: int, channel: int) -> Any:
    """A vector of what is seen at the point at hand."""
    result = splat(number(room.weight, 0))
    for n in range(x.corners):
        row = load(groups.data, start + get(room.at, n) * groups.row + channel)
        result = fma(get(room.weight, n), row, result)
    return result


@kernel
def products(span: Span, x: Points, to: Forward, room: Room) -> int:
    """``<z(x_ip), r_i>`` of an item's tokens."""
    groups, tokens = start_of(to.groups, span), start_of(to.tokens, span)
    for i in range(span.first, span.last):
        token = tokens + i * to.tokens.row
        for p in range(x.per_token):
            point = (span.pair * x.tokens + i) * x.per_token + p
            look(x, span, room, point, False)
            sums = splat(number(room.weight, 0))
            for c in range(0, to.groups.channels, lanes(room.weight)):
                sums = fma(seen(x, room, to.groups, groups, c), load(to.tokens.data, token + c), sums)
            put(to.factors, point, total(sums))
    return 0


@kernel
def averages(span: Span, x: Points, to: Forward, room: Room) -> int:
    """``sum_p c_ip z(x_ip)`` of an item's tokens, which are 0 before."""
    groups, tokens = start_of(to.groups, span), start_of(to.tokens, span)
    for i in range(span.first, span.last):
        token = tokens + i * to.tokens.row
        for p in range(x.per_token):
            point = (span.pair * x.tokens + i) * x.per_token + p
            look(x, span, room, point, False)
            factor = splat(get(to.factors, point))
            for c in range(0, to.groups.channels, lanes(room.weight)):
                this = mul(factor, seen(x, room, to.groups, groups, c))
                store(to.tokens.data, token + c, add(load(to.tokens.data, token + c), this))
    return 0


@helper
def spread(x: Points, span: Span, room: Room, tokens: Rows, token: int, sums: Any) -> None:
    """Add a token's row to the sums of the groups at the corners of the point at hand, by ``room.weight``."""
    first = span.sums * x.groups
    for c in range(0, tokens.channels, lanes(room.weight)):
        row = load(tokens.data, token + c)
        for n in range(x.corners):
            place = (first + get(room.at, n)) * tokens.channels + c
            store(sums, place, fma(get(room.weight, n), row, load(sums, place)))


@kernel
def sums(span: Span, x: Points, to: Sums, room: Room) -> int:
    """``sum_ip c_ip w_ipj r_i`` of every group; relative to ``exp(highest_j)`` where that is given, with masses."""
    tokens = start_of(to.tokens, span)
    for i in range(span.first, span.last):
        for p in range(x.per_token):
            point = (span.pair * x.tokens + i) * x.per_token + p
            factor = get(to.factors, point)
            look(x, span, room, point, False)
            if given(to.highest):
                take_shares(x, span, room, factor, to.highest)
                for n in range(x.corners):
                    weight = get(room.weight, n) * get(room.share, n)
                    put(room.weight, n, weight)
                    place = span.sums * x.groups + get(room.at, n)
                    put(to.masses, place, get(to.masses, place) + weight)
            else:
                for n in range(x.corners):
                    put(room.weight, n, get(room.weight, n) * factor)
            spread(x, span, room, to.tokens, tokens + i * to.tokens.row, to.sums)
    return 0


@kernel
def highest(span: Span, x: Points, to: Sums, room: Room) -> int:
    """Logarithm of every group's largest membership, where it is more than what is there."""
    for point in range(
        (span.pair * x.tokens + span.first) * x.per_token, (span.pair * x.tokens + span.last) * x.per_token
    ):
        log_share = get(to.factors, point)
        look(x, span, room, point, False)
        for n in range(x.corners):
            place, weight = span.sums * x.groups + get(room.at, n), get(room.weight, n)
            # A weight is 1 at most: its logarithm, which takes long, is wanted of few.
            if weight > 0 and log_share > get(to.highest, place):
                membership = log_share + number(room.weight, math.log(weight))
                if membership > get(to.highest, place):
                    put(to.highest, place, membership)
    return 0


@kernel
def touched(span: Span, x: Points, to: Sums, room: Room) -> int:
    """1 for points that touch something, else 0, into ``factors``."""
    for point in range(
        (span.pair * x.tokens + span.first) * x.per_token, (span.pair * x.tokens + span.last) * x.per_token
    ):
        look(x, span, room, point, False)
        nothing = True
        for n in range(x.corners):
            nothing = nothing and get(room.weight, n) <= 0  # a weight may be NaN
        put(to.factors, point, 0 if nothing else 1)
    return 0
