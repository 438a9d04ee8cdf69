"""The walk over cells: who sees whom, and what all tokens of a cell share.

The tokens of a cell see the same groups. Their queries are kept transposed, one slot of a vector for every group of the
window; along axis 2 a step to the next cell brings in one column of groups and drops one, whose slots it takes. Slots
are therefore a ring along axis 2: a group's slot never changes while it is seen. A dilation d makes d walks of every
row, over every d-th cell, so that it costs nothing.

Heads that lie side by side in memory take turns at every cell. Who sees whom is worked out once for all of them, and a
row that is used asks for the same row of the next head, which lies beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .bundles import Call, Geometry, Room, Rows, Work
from .jit import helper
from .simd import get, given, lanes, number, prefetch, put
from .structures import nth
from .vectors import copied, filled

CELLS_AHEAD = 1
"""How far ahead of its use memory is asked for."""


@helper
def block(geometry: Geometry, axis: int, cell: int) -> tuple[int, int]:
    """Half-open interval of the tokens that a cell owns along an axis."""
    size = geometry.tokens[axis]
    start = 0 if cell == 0 else geometry.offset[axis] + cell * geometry.stride[axis]
    stop = size if cell == geometry.groups[axis] - 1 else geometry.offset[axis] + (cell + 1) * geometry.stride[axis]
    start = min(max(start, 0), size)
    return start, min(max(stop, start), size)


@helper
def window(geometry: Geometry, axis: int, cell: int) -> tuple[int, int]:
    """Half-open interval of the window's entries that a cell sees along an axis."""
    radius, dilation = geometry.radius[axis], geometry.dilation[axis]
    before, after = cell // dilation, (geometry.groups[axis] - 1 - cell) // dilation
    return radius - min(before, radius), radius + min(after, radius) + 1


@helper
def width(geometry: Geometry, axis: int) -> int:
    """Entries of the window."""
    return int(2 * geometry.radius[axis] + 1)


@helper
def padded(count: int, array: Any) -> int:
    """Rounded up to whole vectors."""
    step = lanes(array)
    return int((count + step - 1) // step * step)


@helper
def start_of(rows: Rows, work: Work) -> int:
    """Where the rows of a sample and head start."""
    return work.sample * rows.batch + work.head * rows.head


@helper
def tokens_of(geometry: Geometry) -> int:
    """Tokens of the grid."""
    return int(geometry.tokens[0] * geometry.tokens[1] * geometry.tokens[2])


@helper
def groups_of(geometry: Geometry) -> int:
    """Groups of the grid."""
    return int(geometry.groups[0] * geometry.groups[1] * geometry.groups[2])


@helper
def is_valid_token(x: Call, work: Work, token: int) -> bool:
    """Whether a token may belong to a group."""
    return not given(x.valid) or get(x.valid, work.sample * tokens_of(x.geometry) + token) != 0


@helper
def is_valid_group(x: Call, work: Work, group: int) -> bool:
    """Whether a group may be seen."""
    return not given(x.valid_groups) or get(x.valid_groups, work.sample * groups_of(x.geometry) + group) != 0


@helper
def kept_rows(geometry: Geometry) -> int:
    """Rows of groups along axis 0 that are summed at a time: those that one row of cells sees, with what is between."""
    return int(min(2 * geometry.radius[0] * geometry.dilation[0] + 1, geometry.groups[0]))


@helper
def expect_next(rows: Rows, work: Work, place: int) -> None:
    """Ask for the row of the head that is next: items with several heads go through all of them at every cell."""
    if work.heads > 1:
        for c in range(0, rows.channels, lanes(rows.data)):
            prefetch(rows.data, place + rows.head + c)


@helper
def entered(source: Rows, work: Work, group: int, slot: int, slots: int, columns: Any, rows: Any) -> None:
    """Put a group's row into its slot, as a column, and as a row where there is room for it."""
    place = start_of(source, work) + group * source.row
    expect_next(source, work, place)
    if given(columns):
        for c in range(source.channels):
            put(columns, c * slots + slot, get(source.data, place + c))
    if given(rows):
        copied(source.data, place, source.channels, rows, slot * padded(source.channels, rows))


@helper
def enter(x: Call, more: Rows, work: Work, room: Room, c0: int, c1: int, phase: int, step: int) -> None:
    """Bring in the groups at one place of axis 2, ``phase + dilation * step``, around the cells ``c0`` and ``c1``.

    Slots of groups that there are not, or that do not count, are emptied: what they hold must not make anything NaN.
    """
    geometry = x.geometry
    w1, w2 = width(geometry, 1), width(geometry, 2)
    j2 = phase + geometry.dilation[2] * step
    ring = step % w2
    lo0, hi0 = window(geometry, 0, c0)
    lo1, hi1 = window(geometry, 1, c1)
    for e0 in range(width(geometry, 0)):
        j0 = c0 + geometry.dilation[0] * (e0 - geometry.radius[0])
        for e1 in range(w1):
            j1 = c1 + geometry.dilation[1] * (e1 - geometry.radius[1])
            slot = (e0 * w1 + e1) * w2 + ring
            group = (j0 * geometry.groups[1] + j1) * geometry.groups[2] + j2
            there = lo0 <= e0 < hi0 and lo1 <= e1 < hi1 and 0 <= j2 < geometry.groups[2]
            if there and is_valid_group(x, work, group):
                entered(x.q, work, group, slot, room.slots, room.columns, room.rows)
                if given(room.more_columns) or given(room.more_rows):
                    entered(more, work, group, slot, room.slots, room.more_columns, room.more_rows)
            else:
                for c in range(x.q.channels):
                    put(room.columns, c * room.slots + slot, 0)
                if given(room.more_columns):
                    for c in range(more.channels):
                        put(room.more_columns, c * room.slots + slot, 0)


@helper
def expect(rows: Rows, work: Work, row: int) -> None:
    """Ask for a row ahead of time: rows of one head are far apart where heads are side by side in memory."""
    place = start_of(rows, work) + row * rows.row
    for c in range(0, rows.channels, lanes(rows.data)):
        prefetch(rows.data, place + c)


@helper
def expect_groups(x: Call, more: Rows, work: Work, room: Room, c0: int, c1: int, j2: int) -> None:
    """Ask for the groups at one place of axis 2 around the cells ``c0`` and ``c1``."""
    geometry = x.geometry
    if j2 >= geometry.groups[2]:
        return
    lo0, hi0 = window(geometry, 0, c0)
    lo1, hi1 = window(geometry, 1, c1)
    for e0 in range(lo0, hi0):
        j0 = c0 + geometry.dilation[0] * (e0 - geometry.radius[0])
        for e1 in range(lo1, hi1):
            j1 = c1 + geometry.dilation[1] * (e1 - geometry.radius[1])
            group = (j0 * geometry.groups[1] + j1) * geometry.groups[2] + j2
            expect(x.q, work, group)
            if given(room.more_columns) or given(room.more_rows):
                expect(more, work, group)


@helper
def look(x: Call, work: Work, room: Room, c0: int, c1: int, c2: int) -> tuple[int, int]:
    """The groups that a cell sees, of any head: how many, and how many of them the item works for."""
    geometry = x.geometry
    _, g1, g2 = geometry.groups
    w1, w2 = width(geometry, 1), width(geometry, 2)
    t0, t1, t2 = geometry.table_radius
    kept = kept_rows(geometry)
    ring = (c2 // geometry.dilation[2] + w2 - geometry.radius[2]) % w2
    lo0, hi0 = window(geometry, 0, c0)
    lo1, hi1 = window(geometry, 1, c1)
    lo2, hi2 = window(geometry, 2, c2)
    filled(room.base, 0, room.slots, -np.inf)
    seen, members = 0, 0
    for e0 in range(lo0, hi0):
        r0 = e0 - geometry.radius[0]
        j0 = c0 + geometry.dilation[0] * r0
        is_member = work.first <= j0 < work.last
        kept_row = j0 % kept
        for e1 in range(lo1, hi1):
            r1 = e1 - geometry.radius[1]
            j1 = c1 + geometry.dilation[1] * r1
            entries = ((r0 + t0) * (2 * t1 + 1) + r1 + t1) * (2 * t2 + 1) + t2
            group = (j0 * g1 + j1) * g2 + c2
            row = (kept_row * g1 + j1) * g2 + c2
            for e2 in range(lo2, hi2):
                r2 = e2 - geometry.radius[2]
                shift = geometry.dilation[2] * r2
                if not is_valid_group(x, work, group + shift):
                    continue
                place = ring + e2
                slot = (e0 * w1 + e1) * w2 + (place - w2 if place >= w2 else place)
                put(room.base, slot, 0)
                put(room.slot, seen, slot)
                put(room.entry, seen, entries + r2)
                put(room.group, seen, group + shift)
                seen += 1
                if is_member:
                    put(room.member_slot, members, slot)
                    put(room.member_row, members, row + shift)
                    members += 1
                if given(x.compactness):
                    put(room.offsets, slot, geometry.dilation[0] * r0)
                    put(room.offsets, room.slots + slot, geometry.dilation[1] * r1)
                    put(room.offsets, 2 * room.slots + slot, shift)
    return seen, members


@helper
def take_bias(x: Call, work: Work, room: Room, seen: int) -> None:
    """The bias of the groups that a cell sees, for one head."""
    t0, t1, t2 = x.geometry.table_radius
    table = work.head * (2 * t0 + 1) * (2 * t1 + 1) * (2 * t2 + 1)
    for g in range(seen):
        put(room.base, get(room.slot, g), get(x.bias, table + get(room.entry, g)))


@helper
def placed(geometry: Geometry, axis: int, token: int, cell: int, like: Any) -> Any:
    """Where a token lies from its cell's group, in units of the group spacing: both are small whole numbers."""
    twice = 2 * token - geometry.twice_centre[axis] - 2 * geometry.stride[axis] * cell
    return number(like, twice) / number(like, 2 * geometry.stride[axis])


@helper
def list_tokens(x: Call, work: Work, room: Room, c0: int, c1: int, c2: int) -> int:
    """The tokens that a cell owns; how many are valid."""
    geometry = x.geometry
    _, n1, n2 = geometry.tokens
    start0, stop0 = block(geometry, 0, c0)
    start1, stop1 = block(geometry, 1, c1)
    start2, stop2 = block(geometry, 2, c2)
    most = room.most_tokens
    count = 0
    for i0 in range(start0, stop0):
        for i1 in range(start1, stop1):
            for i2 in range(start2, stop2):
                token = (i0 * n1 + i1) * n2 + i2
                if not is_valid_token(x, work, token):
                    continue
                put(room.tokens, count, token)
                if given(x.compactness):
                    put(room.places, count, placed(geometry, 0, i0, c0, room.places))
                    put(room.places, most + count, placed(geometry, 1, i1, c1, room.places))
                    put(room.places, 2 * most + count, placed(geometry, 2, i2, c2, room.places))
                count += 1
    return count


def walk(
    process: Callable[..., None], finish: Callable[..., None], await_token: Callable[..., None]
) -> Callable[..., None]:
    """A function that visits every cell whose tokens see an item's groups, and finishes rows of groups.

    Both are compiled into it: a function that kernels are given as an argument is an address of this process, which
    cannot be kept on disk.

    Args:
        process: called as ``process(x, more, work, room, passed, cell, begin, n, seen, members)`` for up to four tokens
            of a cell, ``room.tokens[begin : begin + n]``; ``cell`` is the cell's coordinate on axis 0, by which a pass
            knows whether the item owns it.
        finish: called as ``finish(x, more, work, room, passed, row)`` for rows of axis 0, all members seen.
        await_token: called as ``await_token(work, passed, token)`` some cells before a token is processed.

    Returns:
        Called as ``visit(x, more, work, room, passed)`` with the second operand of groups and what a pass is given.
    """

    @helper
    def await_tokens(x: Call, work: Work, passed: Any, c0: int, c1: int, c2: int) -> None:
        geometry = x.geometry
        if c2 >= geometry.groups[2]:
            return
        start0, stop0 = block(geometry, 0, c0)
        start1, stop1 = block(geometry, 1, c1)
        start2, stop2 = block(geometry, 2, c2)
        for i0 in range(start0, stop0):
            for i1 in range(start1, stop1):
                for i2 in range(start2, stop2):
                    token = (i0 * geometry.tokens[1] + i1) * geometry.tokens[2] + i2
                    expect(x.k, work, token)
                    await_token(work, passed, token)

    @helper
    def visit_cell(
        x: Call, more: Rows, work: Work, room: Room, passed: Any, c0: int, count: int, seen: int, members: int
    ) -> None:
        if given(x.bias):
            take_bias(x, work, room, seen)
        for begin in range(0, count, 4):
            process(x, more, work, room, passed, c0, begin, min(4, count - begin), seen, members)

    @helper
    def visit_row(x: Call, more: Rows, work: Work, room: Room, passed: Any, c0: int, c1: int) -> None:
        g2, radius, dilation = x.geometry.groups[2], x.geometry.radius[2], x.geometry.dilation[2]
        for phase in range(min(dilation, g2)):
            for head in range(work.heads):
                for step in range(-radius, radius):
                    enter(x, more, nth(work, head), nth(room, head), c0, c1, phase, step)
            for step in range((g2 - phase + dilation - 1) // dilation):
                c2 = phase + dilation * step
                count = list_tokens(x, work, room, c0, c1, c2)
                seen, members = look(x, work, room, c0, c1, c2)
                for head in range(work.heads):
                    one, its = nth(work, head), nth(room, head)
                    enter(x, more, one, its, c0, c1, phase, step + radius)
                    if head == work.heads - 1:
                        await_tokens(x, work, passed, c0, c1, c2 + dilation * CELLS_AHEAD)
                        expect_groups(x, more, work, room, c0, c1, c2 + dilation * (radius + CELLS_AHEAD))
                    if seen > 0:
                        visit_cell(x, more, one, its, passed, c0, count, seen, members)

    @helper
    def visit(x: Call, more: Rows, work: Work, room: Room, passed: Any) -> None:
        geometry = x.geometry
        g0, g1, _ = geometry.groups
        reach = geometry.radius[0] * geometry.dilation[0] if given(room.sums) else 0
        row, last = work.first, min(g0, work.last + reach)
        for c0 in range(max(0, work.first - reach), last):
            for c1 in range(g1):
                visit_row(x, more, work, room, passed, c0, c1)
            while row < work.last and (row + reach <= c0 or c0 == last - 1):
                for head in range(work.heads):
                    finish(x, more, nth(work, head), nth(room, head), passed, row)
                row += 1

    return visit


@helper
def fetch(source: Rows, work: Work, room: Room, begin: int, n: int, operand: int) -> None:
    """Note where the rows of ``n`` tokens start, as operand 0 or 1 of the tokens at hand."""
    start = start_of(source, work)
    for t in range(n):
        place = start + get(room.tokens, begin + t) * source.row
        expect_next(source, work, place)
        put(room.starts, 4 * operand + t, place)


@helper
def whole_rows(source: Rows, room: Room, n: int, operand: int) -> Any:
    """Fetched rows as whole vectors, where they lie or copied; starts are in ``room.whole``, at ``4 * operand + t``.

    Returns:
        The array that they lie in.
    """
    if padded(source.channels, source.data) == source.channels:
        for t in range(n):
            put(room.whole, 4 * operand + t, get(room.starts, 4 * operand + t))
        return source.data
    for t in range(n):
        place = (4 * operand + t) * room.widest
        copied(source.data, get(room.starts, 4 * operand + t), source.channels, room.padded, place)
        put(room.whole, 4 * operand + t, place)
    return room.padded


@helper
def rows_of_window(source: Rows, work: Work, room: Room, copies: Any, seen: int) -> Any:
    """The rows of the groups that a cell sees as whole vectors; starts are in ``room.at``.

    Returns:
        The array that they lie in.
    """
    if given(copies):
        channels = padded(source.channels, copies)
        for g in range(seen):
            put(room.at, g, get(room.slot, g) * channels)
        return copies
    start = start_of(source, work)
    for g in range(seen):
        put(room.at, g, start + get(room.group, g) * source.row)
    return source.data
