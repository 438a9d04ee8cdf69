"""Products of small matrices, by vectors: of four rows at a time, or of one.

Four rows share every load of the other operand, and their sums are independent, so that a processor need not wait for
one to go on with another.
"""

from __future__ import annotations

from typing import Any

from .bundles import Floats, Room
from .jit import helper
from .simd import add, fma, get, lanes, load, mul, number, put, splat, store, total


@helper
def filled(array: Any, start: int, count: int, value: Any) -> None:
    """Set ``count`` elements, a multiple of a vector's."""
    vector = splat(number(array, value))
    for i in range(start, start + count, lanes(array)):
        store(array, i, vector)


@helper
def copied(source: Any, start: int, count: int, target: Any, place: int) -> None:
    """Copy a row of any length."""
    step = lanes(source)
    whole = count - count % step
    for i in range(0, whole, step):
        store(target, place + i, load(source, start + i))
    for i in range(whole, count):
        put(target, place + i, get(source, start + i))


@helper
def scaled(source: Any, start: int, count: int, factor: Any, target: Any, place: int) -> None:
    """Copy a row of any length, times a number."""
    step = lanes(source)
    whole = count - count % step
    factors = splat(factor)
    for i in range(0, whole, step):
        store(target, place + i, mul(load(source, start + i), factors))
    for i in range(whole, count):
        put(target, place + i, get(source, start + i) * factor)


@helper
def dot(a: Any, start: int, b: Any, place: int, count: int) -> Any:
    """The product of two rows of any length."""
    step = lanes(a)
    whole = count - count % step
    sums = splat(number(a, 0))
    for i in range(0, whole, step):
        sums = fma(load(a, start + i), load(b, place + i), sums)
    result = total(sums)
    for i in range(whole, count):
        result += get(a, start + i) * get(b, place + i)
    return result


@helper
def products(n: int, rows: Any, starts: Any, first: int, count: int, columns: Any, slots: int, result: Any) -> None:
    """``result[t, s] = sum_c rows[t, c] * columns[c, s]`` for ``n`` rows that begin at ``get(starts, first + t)``."""
    nothing = splat(number(rows, 0))
    for s in range(0, slots, lanes(rows)):
        if n == 4:
            a, b = get(starts, first), get(starts, first + 1)
            c, d = get(starts, first + 2), get(starts, first + 3)
            sum_a, sum_b, sum_c, sum_d = nothing, nothing, nothing, nothing
            for i in range(count):
                column = load(columns, i * slots + s)
                sum_a = fma(get(rows, a + i), column, sum_a)
                sum_b = fma(get(rows, b + i), column, sum_b)
                sum_c = fma(get(rows, c + i), column, sum_c)
                sum_d = fma(get(rows, d + i), column, sum_d)
            store(result, s, sum_a)
            store(result, slots + s, sum_b)
            store(result, 2 * slots + s, sum_c)
            store(result, 3 * slots + s, sum_d)
        else:
            for t in range(n):
                start = get(starts, first + t)
                even, odd = nothing, nothing
                for i in range(0, count - 1, 2):
                    even = fma(get(rows, start + i), load(columns, i * slots + s), even)
                    odd = fma(get(rows, start + i + 1), load(columns, (i + 1) * slots + s), odd)
                if count % 2:
                    even = fma(get(rows, start + count - 1), load(columns, (count - 1) * slots + s), even)
                store(result, t * slots + s, add(even, odd))


@helper
def collected(n: int, room: Room, weights: Floats, seen: int, rows: Floats, channels: int) -> None:
    """``room.out[t] = sum_g weights[t, slot[g]] * rows[at[g]]`` over the ``seen`` groups of a window."""
    nothing = splat(number(rows, 0))
    slots, width = room.slots, room.widest
    slot, at, result = room.slot, room.at, room.out
    for c in range(0, channels, lanes(rows)):
        if n == 4:
            sum_a, sum_b, sum_c, sum_d = nothing, nothing, nothing, nothing
            for g in range(seen):
                s = get(slot, g)
                row = load(rows, get(at, g) + c)
                sum_a = fma(get(weights, s), row, sum_a)
                sum_b = fma(get(weights, slots + s), row, sum_b)
                sum_c = fma(get(weights, 2 * slots + s), row, sum_c)
                sum_d = fma(get(weights, 3 * slots + s), row, sum_d)
            store(result, c, sum_a)
            store(result, width + c, sum_b)
            store(result, 2 * width + c, sum_c)
            store(result, 3 * width + c, sum_d)
        else:
            for t in range(n):
                sums = nothing
                for g in range(seen):
                    sums = fma(get(weights, t * slots + get(slot, g)), load(rows, get(at, g) + c), sums)
                store(result, t * width + c, sums)


@helper
def spread(
    n: int, room: Room, weights: Floats, members: int, rows: Floats, first: int, channels: int, width: int, shift: int
) -> None:
    """``room.sums[row[g]] += sum_t weights[t, slot[g]] * rows[t]`` for the groups that an item works for.

    The rows of tokens begin at ``room.whole[first + t]``; sums have ``width`` channels, of which these begin at
    ``shift``.
    """
    slots, sums = room.slots, room.sums
    slot, row, starts = room.member_slot, room.member_row, room.whole
    for c in range(0, channels, lanes(rows)):
        if n == 4:
            row_a = load(rows, get(starts, first) + c)
            row_b = load(rows, get(starts, first + 1) + c)
            row_c = load(rows, get(starts, first + 2) + c)
            row_d = load(rows, get(starts, first + 3) + c)
            for g in range(members):
                s = get(slot, g)
                place = get(row, g) * width + shift + c
                summed = fma(get(weights, s), row_a, load(sums, place))
                summed = fma(get(weights, slots + s), row_b, summed)
                summed = fma(get(weights, 2 * slots + s), row_c, summed)
                store(sums, place, fma(get(weights, 3 * slots + s), row_d, summed))
        else:
            for t in range(n):
                row_a = load(rows, get(starts, first + t) + c)
                for g in range(members):
                    place = get(row, g) * width + shift + c
                    store(sums, place, fma(get(weights, t * slots + get(slot, g)), row_a, load(sums, place)))
