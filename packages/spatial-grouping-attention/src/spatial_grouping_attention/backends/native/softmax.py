"""Logits of a few tokens of a cell, and what becomes of them; see the formulas of :mod:`.forward`."""

from __future__ import annotations

import math
from typing import Any

from .bundles import Call, Room
from .exponential import exp
from .jit import helper
from .simd import add, fma, get, given, highest, lanes, largest, load, mul, number, put, splat, store, sub, total
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
def memberships(room: Room, n: int) -> None:
    """Make the logits of ``n`` tokens memberships, and note their normalisers, +inf where a token belongs to nobody.

    Step by step for all tokens: a processor goes on with the next while it waits for the last result of one.
    """
    slots, step = room.slots, lanes(room.first)
    numbers = 4 * step
    for t in range(n):
        most = load(room.first, t * slots)
        for s in range(t * slots + step, (t + 1) * slots, step):
            most = largest(most, load(room.first, s))
        top = highest(most)
        # Also where all are NaN or -inf: then the sum tells which.
        put(room.of_tokens, numbers + t, top if top > -math.inf else number(room.first, 0))
    for t in range(n):
        shift, sums = splat(get(room.of_tokens, numbers + t)), splat(number(room.first, 0))
        for s in range(t * slots, (t + 1) * slots, step):
            weight = exp(sub(load(room.first, s), shift))
            store(room.first, s, weight)
            sums = add(sums, weight)
        store(room.of_tokens, t * step, sums)
    for t in range(n):
        mass = total(load(room.of_tokens, t * step))
        share = splat(number(room.first, 1) / mass if mass != 0 else mass)
        for s in range(t * slots, (t + 1) * slots, step):
            store(room.first, s, mul(load(room.first, s), share))
        put(room.of_tokens, t * step, mass)
    for t in range(n):
        mass = get(room.of_tokens, t * step)
        lse = get(room.of_tokens, numbers + t) + math.log(mass) if mass != 0 else number(room.first, math.inf)
        put(room.of_tokens, numbers + t, lse)


@helper
def noted(room: Room, t: int) -> Any:
    """The number of a token that was noted."""
    return get(room.of_tokens, 4 * lanes(room.of_tokens) + t)


@helper
def exponentials(room: Room, t: int, lse: Any) -> None:
    """Make a token's logits ``exp(s - lse)``."""
    shift = splat(lse)
    for s in range(t * room.slots, (t + 1) * room.slots, lanes(room.first)):
        store(room.first, s, exp(sub(load(room.first, s), shift)))
