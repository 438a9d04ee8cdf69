"""Forward passes, with A = assignment, T_ij = s_ij - l_i and M = logarithm of the groups' masses.

l_i = logsumexp_j s_ij      out_j = sum_i exp(T_ij - M_j) v_i      M_j = logsumexp_i T_ij

Groups sum exp(T) as it is. Where that nears the limits of the type, because all members would rather leave the group or
because normalisers are someone else's, the group is marked, and :func:`starved` does it again against its largest T.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from .bundles import Call, Floats, Room, Rows, Work
from .cells import (
    block,
    expect,
    expect_next,
    fetch,
    groups_of,
    is_valid_group,
    is_valid_token,
    kept_rows,
    padded,
    placed,
    rows_of_window,
    start_of,
    tokens_of,
    walk,
    whole_rows,
    window,
)
from .jit import helper, kernel
from .simd import get, given, number, put
from .softmax import exponentials, logits, memberships, noted
from .structures import nth
from .vectors import collected, copied, dot, filled, scaled, spread

MASSES = (1e-25, 1e25)
"""Between these, sums lose nothing that could be seen, in float32 and float64."""


class Assigned(NamedTuple):
    """What :func:`assign` fills."""

    out: Rows
    lse: Floats
    """(B * H * N_in,)."""


class Averaged(NamedTuple):
    """What :func:`pool` reads and fills."""

    values: Rows
    lse: Floats
    """(B * H * N_in,), of the logits themselves or given."""
    own: bool
    """Whether of the logits themselves; then they are filled."""
    out: Rows
    log_mass: Floats
    """(B * H * N_out,); NaN where a group must be done again."""


@helper
def _assign_tokens(
    x: Call, u: Rows, work: Work, room: Room, to: Assigned, cell: int, begin: int, n: int, seen: int, members: int
) -> None:
    fetch(x.k, work, room, begin, n, 0)
    logits(x, work.head, room, begin, n)
    first = work.pair * tokens_of(x.geometry)
    memberships(room, n)
    for t in range(n):
        put(to.lse, first + get(room.tokens, begin + t), noted(room, t))
    rows = rows_of_window(u, work, room, room.more_rows, seen)
    collected(n, room, room.first, seen, rows, padded(u.channels, rows))
    start = start_of(to.out, work)
    for t in range(n):
        place = start + get(room.tokens, begin + t) * to.out.row
        expect_next(to.out, work, place)
        copied(room.out, t * room.widest, u.channels, to.out.data, place)


@helper
def _nothing_to_finish(x: Call, u: Rows, work: Work, room: Room, to: Assigned, row: int) -> None:
    pass


@helper
def _await_assigned(work: Work, to: Assigned, token: int) -> None:
    expect(to.out, work, token)


_walk_assign = walk(_assign_tokens, _nothing_to_finish, _await_assigned)


@kernel
def assign(work: Work, x: Call, u: Rows, to: Assigned, room: Room) -> int:
    """Values of the groups for the tokens of an item's cells, and the tokens' normalisers."""
    _walk_assign(x, u, work, room, to)
    return 0


@helper
def _add_tokens(
    x: Call, _: Rows, work: Work, room: Room, to: Averaged, cell: int, begin: int, n: int, seen: int, members: int
) -> None:
    fetch(x.k, work, room, begin, n, 0)
    logits(x, work.head, room, begin, n)
    first = work.pair * tokens_of(x.geometry)
    if to.own:
        memberships(room, n)
    for t in range(n):
        token = first + get(room.tokens, begin + t)
        if not to.own:
            exponentials(room, t, get(to.lse, token))
        elif work.first <= cell < work.last:
            put(to.lse, token, noted(room, t))
    fetch(to.values, work, room, begin, n, 1)
    rows = whole_rows(to.values, room, n, 1)
    width = padded(to.values.channels, rows)
    spread(n, room, room.first, members, rows, 4, width, width, 0)
    for g in range(members):
        slot, row = get(room.member_slot, g), get(room.member_row, g)
        mass = get(room.masses, row)
        for t in range(n):
            mass += get(room.first, t * room.slots + slot)
        put(room.masses, row, mass)


@helper
def _finish_averages(x: Call, _: Rows, work: Work, room: Room, to: Averaged, row: int) -> None:
    size = x.geometry.groups[1] * x.geometry.groups[2]
    width = padded(to.values.channels, room.sums)
    kept, first = row % kept_rows(x.geometry) * size, row * size
    for j in range(size):
        mass = get(room.masses, kept + j)
        fine = MASSES[0] < mass < MASSES[1]
        factor = number(room.sums, 1) / mass if fine else number(room.sums, 0)
        place = start_of(to.out, work) + (first + j) * to.out.row
        scaled(room.sums, (kept + j) * width, to.values.channels, factor, to.out.data, place)
        log_mass = math.log(mass) if fine else number(room.sums, math.nan)
        put(to.log_mass, work.pair * groups_of(x.geometry) + first + j, log_mass)
    filled(room.sums, kept * width, size * width, 0)
    for j in range(size):
        put(room.masses, kept + j, 0)


@helper
def _await_values(work: Work, to: Averaged, token: int) -> None:
    expect(to.values, work, token)


_walk_pool = walk(_add_tokens, _finish_averages, _await_values)


@kernel
def pool(work: Work, x: Call, to: Averaged, room: Room) -> int:
    """Averages over the members of an item's groups; normalisers of its cells' tokens unless they are given.

    Returns:
        How many of its groups must be done again.
    """
    _walk_pool(x, x.q, work, room, to)
    size = x.geometry.groups[1] * x.geometry.groups[2]
    again = 0
    for head in range(work.heads):
        first = nth(work, head).pair * groups_of(x.geometry)
        for j in range(work.first * size, work.last * size):
            again += math.isnan(get(to.log_mass, first + j))
    return again


@kernel
def starved(work: Work, x: Call, to: Averaged) -> int:
    """Do those groups of an item again that :func:`pool` marked."""
    _, g1, g2 = x.geometry.groups
    for head in range(work.heads):
        this = nth(work, head)
        for j0 in range(work.first, work.last):
            for j1 in range(g1):
                for j2 in range(g2):
                    group = (j0 * g1 + j1) * g2 + j2
                    if math.isnan(get(to.log_mass, this.pair * groups_of(x.geometry) + group)):
                        _average_again(x, this, to, j0, j1, j2)
    return 0


@helper
def _average_again(x: Call, work: Work, to: Averaged, j0: int, j1: int, j2: int) -> None:
    """Average over the members of one group against the largest logit so far (Milakov & Gimelshein 2018)."""
    geometry, values, data = x.geometry, to.values, to.out.data
    group = (j0 * geometry.groups[1] + j1) * geometry.groups[2] + j2
    place = start_of(to.out, work) + group * to.out.row
    # Negative infinity would make differences of nothing.
    top, mass = number(data, -1e30), number(data, 0)
    for c in range(values.channels):
        put(data, place + c, 0)
    counts = is_valid_group(x, work, group)
    lo0, hi0 = window(geometry, 0, j0)
    lo1, hi1 = window(geometry, 1, j1)
    lo2, hi2 = window(geometry, 2, j2)
    for e0 in range(lo0, hi0 if counts else lo0):
        c0 = j0 + geometry.dilation[0] * (e0 - geometry.radius[0])
        start0, stop0 = block(geometry, 0, c0)
        for i0 in range(start0, stop0):
            for e1 in range(lo1, hi1):
                c1 = j1 + geometry.dilation[1] * (e1 - geometry.radius[1])
                start1, stop1 = block(geometry, 1, c1)
                for i1 in range(start1, stop1):
                    for e2 in range(lo2, hi2):
                        c2 = j2 + geometry.dilation[2] * (e2 - geometry.radius[2])
                        start2, stop2 = block(geometry, 2, c2)
                        for i2 in range(start2, stop2):
                            token = (i0 * geometry.tokens[1] + i1) * geometry.tokens[2] + i2
                            if not is_valid_token(x, work, token):
                                continue
                            t = _pair_logit(x, work, group, (j0, j1, j2), token, (i0, i1, i2), (c0, c1, c2))
                            t -= get(to.lse, work.pair * tokens_of(geometry) + token)
                            if t == -math.inf:
                                continue
                            if t > top:
                                factor = math.exp(top - t)
                                mass *= factor
                                scaled(data, place, values.channels, factor, data, place)
                                top = t
                            weight = math.exp(t - top)
                            mass += weight
                            row = start_of(values, work) + token * values.row
                            for c in range(values.channels):
                                put(data, place + c, get(data, place + c) + weight * get(values.data, row + c))
    some = mass != 0
    scaled(data, place, values.channels, number(data, 1) / mass if some else number(data, 0), data, place)
    log_mass = top + math.log(mass) if some else number(data, -math.inf)
    put(to.log_mass, work.pair * groups_of(geometry) + group, log_mass)


@helper
def _pair_logit(x: Call, work: Work, group: int, j: Any, token: int, i: Any, c: Any) -> Any:
    """The logit of one token and one group that it sees."""
    geometry, like = x.geometry, x.scale
    k, q = start_of(x.k, work) + token * x.k.row, start_of(x.q, work) + group * x.q.row
    score = get(x.scale, 0) * dot(x.k.data, k, x.q.data, q, x.q.channels)
    entry, square = 0, number(like, 0)
    for axis in range(3):
        radius = geometry.table_radius[axis]
        entry = entry * (2 * radius + 1) + (j[axis] - c[axis]) // geometry.dilation[axis] + radius
        distance = placed(geometry, axis, i[axis], c[axis], like) - number(like, j[axis] - c[axis])
        square += distance * distance
    if given(x.bias):
        t0, t1, t2 = geometry.table_radius
        score += get(x.bias, work.head * (2 * t0 + 1) * (2 * t1 + 1) * (2 * t2 + 1) + entry)
    if given(x.compactness):
        score -= get(x.compactness, work.head) * square
    return score
