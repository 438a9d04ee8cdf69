"""Backward passes, in the terms of :mod:`.forward`; g is the gradient of the result.

    pool    dT_ij = D_ij (g_j . v_i - g_j . out_j + dM_j)      dl_i += -sum_j dT_ij      ds_ij = dT_ij + dl_i A_ij
    assign  ds_ij = A_ij (g_i . u_j - sum_j' A_ij' g_i . u_j' + dl_i)

with D = A divided by its column sums, and dl_i entering ds only where l is these logits' own normaliser. What belongs
to tokens is written by the item that owns their cell; what belongs to groups is summed over the cells that see them.
Sums over all pairs, for the bias and for compactness, are kept for every few rows of cells and added up in the end, so
that they do not depend on how work was divided.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from .bundles import Call, Floats, Room, Rows, Work
from .cells import (
    expect,
    expect_next,
    fetch,
    groups_of,
    kept_rows,
    padded,
    rows_of_window,
    start_of,
    tokens_of,
    walk,
    whole_rows,
)
from .exponential import exp
from .jit import helper, kernel
from .simd import add, fma, get, given, lanes, load, mul, number, put, splat, store, sub, total
from .softmax import logits, noted, squares
from .structures import nth
from .vectors import collected, dot, filled, products, scaled, spread


class OfPairs(NamedTuple):
    """Sums over pairs: of every sample and head, for every few rows of cells."""

    rows: int
    """Of cells along axis 0 that make one sum."""
    blocks: int
    """Sums of a sample and head."""
    bias: Floats
    """(B * H * blocks, entries of a head's table)."""
    compactness: Floats
    """(B * H * blocks, lanes of a vector)."""


class AssignBackward(NamedTuple):
    """What :func:`assign_backward` reads and fills."""

    lse: Floats
    grad: Rows
    grad_lse: Floats
    dq: Rows
    dk: Rows
    du: Rows
    pairs: OfPairs


class Deltas(NamedTuple):
    """What :func:`deltas` reads and fills."""

    out: Rows
    grad_mass: Floats
    """dM, (B * H * N_out,)."""
    delta: Floats
    """(B * H * N_out,)."""


class PoolBackward(NamedTuple):
    """What :func:`pool_backward` reads and fills."""

    values: Rows
    lse: Floats
    log_mass: Floats
    delta: Floats
    """``g_j . out_j - dM_j`` (B * H * N_out,)."""
    own: bool
    """Whether lse is of the logits themselves."""
    grad_lse: Floats
    dq: Rows
    dk: Rows
    dv: Rows
    dlse: Floats
    """Only where lse was given."""
    pairs: OfPairs


@helper
def _write(room: Room, to: Rows, work: Work, begin: int, n: int, factor: Any) -> None:
    """Write results of tokens, times a number."""
    start = start_of(to, work)
    for t in range(n):
        place = start + get(room.tokens, begin + t) * to.row
        expect_next(to, work, place)
        scaled(room.out, t * room.widest, to.channels, factor, to.data, place)


@helper
def _add_pairs(x: Call, work: Work, room: Room, pairs: OfPairs, begin: int, n: int, seen: int, cell: int) -> None:
    """Add the gradients of logits, ``room.second``, to the sums over pairs."""
    block = work.pair * pairs.blocks + cell // pairs.rows
    if given(pairs.bias):
        t0, t1, t2 = x.geometry.table_radius
        size = (2 * t0 + 1) * (2 * t1 + 1) * (2 * t2 + 1)
        for g in range(seen):
            place = block * size + get(room.entry, g)
            summed = get(pairs.bias, place)
            for t in range(n):
                summed += get(room.second, t * room.slots + get(room.slot, g))
            put(pairs.bias, place, summed)
    if given(pairs.compactness):
        step = lanes(room.second)
        sums = load(pairs.compactness, block * step)
        for t in range(n):
            for s in range(0, room.slots, step):
                sums = fma(load(room.second, t * room.slots + s), squares(room, begin + t, s), sums)
        store(pairs.compactness, block * step, sums)


@helper
def _finish(
    room: Room, work: Work, kept: int, row: int, size: int, to: Rows, factor: Any, shift: int, width: int
) -> None:
    """Write the sums of a row of groups, times a number."""
    start = start_of(to, work) + row * size * to.row
    for j in range(size):
        place = (kept * size + j) * width + shift
        scaled(room.sums, place, to.channels, factor, to.data, start + j * to.row)


@helper
def _assign_logits(room: Room, n: int, lse: Floats, grad_lse: Floats, first: int, begin: int) -> None:
    """Memberships of tokens into ``first``, gradients of their logits into ``second``.

    A token's result is the average by its memberships, so ``g_i . out_i`` is that of ``g_i . u_j``. Step by step for
    all tokens, as in :func:`.softmax.memberships`.
    """
    slots, step = room.slots, lanes(room.first)
    for t in range(n):
        shift, sums = splat(get(lse, first + get(room.tokens, begin + t))), splat(number(room.first, 0))
        for s in range(t * slots, (t + 1) * slots, step):
            membership = exp(sub(load(room.first, s), shift))
            sums = fma(membership, load(room.second, s), sums)
            store(room.first, s, membership)
        store(room.of_tokens, t * step, sums)
    for t in range(n):
        delta = total(load(room.of_tokens, t * step))
        if given(grad_lse):
            delta -= get(grad_lse, first + get(room.tokens, begin + t))
        deltas = splat(delta)
        for s in range(t * slots, (t + 1) * slots, step):
            store(room.second, s, mul(load(room.first, s), sub(load(room.second, s), deltas)))


@helper
def _assign_tokens(
    x: Call,
    u: Rows,
    work: Work,
    room: Room,
    to: AssignBackward,
    cell: int,
    begin: int,
    n: int,
    seen: int,
    members: int,
) -> None:
    slots = room.slots
    fetch(x.k, work, room, begin, n, 0)
    logits(x, work.head, room, begin, n)
    fetch(to.grad, work, room, begin, n, 1)
    products(n, to.grad.data, room.starts, 4, u.channels, room.more_columns, slots, room.second)
    _assign_logits(room, n, to.lse, to.grad_lse, work.pair * tokens_of(x.geometry), begin)
    if work.first <= cell < work.last:
        rows = rows_of_window(x.q, work, room, room.rows, seen)
        keys = padded(x.q.channels, rows)
        collected(n, room, room.second, seen, rows, keys)
        _write(room, to.dk, work, begin, n, get(x.scale, 0))
        _add_pairs(x, work, room, to.pairs, begin, n, seen, cell)
    rows = whole_rows(x.k, room, n, 0)
    keys, width = padded(x.k.channels, rows), padded(x.k.channels, rows) + padded(u.channels, rows)
    spread(n, room, room.second, members, rows, 0, keys, width, 0)
    rows = whole_rows(to.grad, room, n, 1)
    spread(n, room, room.first, members, rows, 4, width - keys, width, keys)


@helper
def _finish_assign(x: Call, u: Rows, work: Work, room: Room, to: AssignBackward, row: int) -> None:
    size, kept = x.geometry.groups[1] * x.geometry.groups[2], row % kept_rows(x.geometry)
    keys = padded(x.q.channels, room.sums)
    width = keys + padded(u.channels, room.sums)
    _finish(room, work, kept, row, size, to.dq, get(x.scale, 0), 0, width)
    _finish(room, work, kept, row, size, to.du, number(room.sums, 1), keys, width)
    filled(room.sums, kept * size * width, size * width, 0)


@helper
def _await_assigned(work: Work, to: AssignBackward, token: int) -> None:
    expect(to.grad, work, token)
    expect(to.dk, work, token)


_walk_assign = walk(_assign_tokens, _finish_assign, _await_assigned)


@kernel
def assign_backward(work: Work, x: Call, u: Rows, to: AssignBackward, room: Room) -> int:
    """Gradients of :func:`.forward.assign`."""
    _walk_assign(x, u, work, room, to)
    return 0


@kernel
def deltas(work: Work, x: Call, grad: Rows, to: Deltas) -> int:
    """``g_j . out_j - dM_j`` of an item's groups."""
    size = x.geometry.groups[1] * x.geometry.groups[2]
    for head in range(work.heads):
        this = nth(work, head)
        first, grads, outs = this.pair * groups_of(x.geometry), start_of(grad, this), start_of(to.out, this)
        for j in range(work.first * size, work.last * size):
            delta = dot(grad.data, grads + j * grad.row, to.out.data, outs + j * to.out.row, grad.channels)
            if given(to.grad_mass):
                delta -= get(to.grad_mass, first + j)
            put(to.delta, first + j, delta)
    return 0


@helper
def _look_at_groups(x: Call, work: Work, room: Room, to: PoolBackward, seen: int) -> None:
    """Logarithms of masses, deltas and masses of the groups that a cell sees."""
    slots = room.slots
    filled(room.of_groups, 0, 3 * slots, 0)
    first = work.pair * groups_of(x.geometry)
    for g in range(seen):
        slot, group = get(room.slot, g), first + get(room.group, g)
        log_mass = get(to.log_mass, group)
        put(room.of_groups, slot, log_mass)
        put(room.of_groups, slots + slot, get(to.delta, group))
    for s in range(0, slots, lanes(room.of_groups)):
        store(room.of_groups, 2 * slots + s, exp(load(room.of_groups, s)))
    for g in range(seen):
        slot = get(room.slot, g)
        if get(room.of_groups, slot) == -math.inf:  # an empty group has no members to send anything to
            put(room.of_groups, slot, math.inf)


@helper
def _pool_logits(room: Room, n: int, lse: Floats, grad_lse: Floats, first: int, begin: int, own: bool) -> None:
    """Gradients of tokens' logits into ``second``, their shares of averages into ``third``; notes dlse.

    A membership is a share times the group's mass: one exponential gives both. Step by step for all tokens, as in
    :func:`.softmax.memberships`.
    """
    slots, step = room.slots, lanes(room.first)
    numbers = 4 * step
    for t in range(n):
        shift, sums = splat(get(lse, first + get(room.tokens, begin + t))), splat(number(room.first, 0))
        for s in range(0, slots, step):
            place = t * slots + s
            share = exp(sub(sub(load(room.first, place), shift), load(room.of_groups, s)))
            gradient = mul(share, sub(load(room.second, place), load(room.of_groups, slots + s)))
            sums = add(sums, gradient)
            store(room.second, place, gradient)
            store(room.third, place, share)
        store(room.of_tokens, t * step, sums)
    for t in range(n):
        token = first + get(room.tokens, begin + t)
        arriving = get(grad_lse, token) if given(grad_lse) else number(room.first, 0)
        put(room.of_tokens, numbers + t, arriving - total(load(room.of_tokens, t * step)))
    if own:
        for t in range(n):
            factor = splat(get(room.of_tokens, numbers + t))
            for s in range(0, slots, step):
                place = t * slots + s
                membership = mul(load(room.third, place), load(room.of_groups, 2 * slots + s))
                store(room.second, place, fma(factor, membership, load(room.second, place)))


@helper
def _pool_tokens(
    x: Call,
    grad: Rows,
    work: Work,
    room: Room,
    to: PoolBackward,
    cell: int,
    begin: int,
    n: int,
    seen: int,
    members: int,
) -> None:
    slots = room.slots
    if begin == 0:
        _look_at_groups(x, work, room, to, seen)
    fetch(x.k, work, room, begin, n, 0)
    logits(x, work.head, room, begin, n)
    fetch(to.values, work, room, begin, n, 1)
    products(n, to.values.data, room.starts, 4, grad.channels, room.more_columns, slots, room.second)
    owned = work.first <= cell < work.last
    first = work.pair * tokens_of(x.geometry)
    _pool_logits(room, n, to.lse, to.grad_lse, first, begin, to.own)
    if owned:
        if given(to.dlse):
            for t in range(n):
                put(to.dlse, first + get(room.tokens, begin + t), noted(room, t))
        rows = rows_of_window(x.q, work, room, room.rows, seen)
        keys = padded(x.q.channels, rows)
        collected(n, room, room.second, seen, rows, keys)
        _write(room, to.dk, work, begin, n, get(x.scale, 0))
        rows = rows_of_window(grad, work, room, room.more_rows, seen)
        channels = padded(grad.channels, rows)
        collected(n, room, room.third, seen, rows, channels)
        _write(room, to.dv, work, begin, n, number(room.first, 1))
        _add_pairs(x, work, room, to.pairs, begin, n, seen, cell)
    rows = whole_rows(x.k, room, n, 0)
    keys = padded(x.k.channels, rows)
    spread(n, room, room.second, members, rows, 0, keys, keys, 0)


@helper
def _finish_pool(x: Call, grad: Rows, work: Work, room: Room, to: PoolBackward, row: int) -> None:
    size, kept = x.geometry.groups[1] * x.geometry.groups[2], row % kept_rows(x.geometry)
    width = padded(x.q.channels, room.sums)
    _finish(room, work, kept, row, size, to.dq, get(x.scale, 0), 0, width)
    filled(room.sums, kept * size * width, size * width, 0)


@helper
def _await_pooled(work: Work, to: PoolBackward, token: int) -> None:
    expect(to.values, work, token)
    expect(to.dk, work, token)
    expect(to.dv, work, token)


_walk_pool = walk(_pool_tokens, _finish_pool, _await_pooled)


@kernel
def pool_backward(work: Work, x: Call, grad: Rows, to: PoolBackward, room: Room) -> int:
    """Gradients of :func:`.forward.pool`."""
    _walk_pool(x, grad, work, room, to)
    return 0
