"""Logits of a few tokens of a cell, and what becomes of them; see the formulas of :mod:`.forward`."""

from __future__ import annotations

import math
from typing import Any

from .bundles import Call, Room
from .exponential import exp
from .jit import helper
from .simd import add, fma, get, given, highest, lanes, largest, load, mul, number, splat, store, sub, total
from .vectors import products


@helper
def squares(room: Room, place: int, s: int) -> Any:
    """Squared distances of a token, ``room.places[place]``, from the groups in a vector of slots."""
    most = room.most_tokens
    d0 = sub(splat(get(room.places, place)), load(room.offsets, s))
    d1 = sub(splat(get(room.places, most + place)), load(room.offsets, room.slots + s))
    d2 = sub(splat(get(room.places, 2 * most + place)), load(room.offsets, 2 * room.slots + s))
    return fma(d0, d0, fma(d1, d1, mul(d2, d2)))


@helper
def logits(x: Call, head: int, room: Room, begin: int, n: int) -> None:
    """Logits of the tokens whose keys are operand 0, into ``room.first``; -inf where nothing is seen."""
    slots, step = room.slots, lanes(room.first)
    products(n, x.k.data, room.starts, 0, x.k.channels, room.columns, slots, room.first)
    scale = splat(get(x.scale, 0))
    for t in range(n):
        for s in range(0, slots, step):
            scores = fma(scale, load(room.first, t * slots + s), load(room.base, s))
            if given(x.compactness):
                scores = fma(-get(x.compactness, head), squares(room, begin + t, s), scores)
            store(room.first, t * slots + s, scores)


@helper
def memberships(room: Room, t: int) -> Any:
    """Make a token's logits memberships; its normaliser, +inf where it belongs to nobody."""
    slots, step = room.slots, lanes(room.first)
    start = t * slots
    most = load(room.first, start)
    for s in range(step, slots, step):
        most = largest(most, load(room.first, start + s))
    top = highest(most)
    # Also where all are NaN or -inf: then the sum tells which.
    if not top > -math.inf:
        top = number(room.first, 0)
    shift, sums = splat(top), splat(number(room.first, 0))
    for s in range(0, slots, step):
        weight = exp(sub(load(room.first, start + s), shift))
        store(room.first, start + s, weight)
        sums = add(sums, weight)
    mass = total(sums)
    if mass == 0:
        return number(room.first, math.inf)
    share = splat(number(room.first, 1) / mass)
    for s in range(0, slots, step):
        store(room.first, start + s, mul(load(room.first, start + s), share))
    return top + math.log(mass)


@helper
def exponentials(room: Room, t: int, lse: Any) -> None:
    """Make a token's logits ``exp(s - lse)``."""
    shift = splat(lse)
    for s in range(t * room.slots, (t + 1) * room.slots, lanes(room.first)):
        store(room.first, s, exp(sub(load(room.first, s), shift)))
