"""The relation of tokens and groups inside kernels: which index a program's slots stand for, and who sees whom.

Every grid is treated as three axes, the leading ones of size 1; ``FORM.axes`` tells how many are real, and arithmetic
on the others is dropped when a kernel is compiled.

A dilation d splits the groups of an axis into d *phases*: tokens whose cell is p modulo d see only groups that are
p modulo d, and within a phase the window is an ordinary undilated one. Programs work on one phase, in its own
coordinates: group j of phase p is group ``p + d*j`` of the axis, and *position* e, which counts the tokens owned by
the phase's cells, belongs to its cell ``e // stride``. Positions before 0 and beyond the last cell are the extra
tokens of the border blocks. Without dilation a position is simply the fine index minus the offset of block 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bundles import Work
from .sealed import opened_sizes


@triton.jit
def unravel(index, extent1, extent2, AXES: tl.constexpr):
    """Row-major coordinates of a flat index in a box of three axes."""
    if AXES == 1:
        return index * 0, index * 0, index
    elif AXES == 2:
        return index * 0, index // extent2, index % extent2
    else:
        return index // (extent1 * extent2), (index // extent2) % extent1, index % extent2


@triton.jit
def split_phase(number, groups, DILATION: tl.constexpr):
    """Phase and tile of a program on one axis, and how many groups the phase has."""
    if DILATION == 1:
        return 0, number, groups
    else:
        phases = tl.minimum(DILATION, groups)
        phase = number % phases
        return phase, number // phases, (groups - phase + DILATION - 1) // DILATION


@triton.jit
def work_of_program(x, sizes, FORM: tl.constexpr):
    """What a program works on, and the sizes opened.

    Heads are fastest because their rows are neighbours in memory. Samples are in the same axis of the launch, because
    only the first may have more than 65,535 programs.
    """
    sizes = opened_sizes(sizes)
    index = tl.program_id(0)
    head = index % sizes.heads
    index = index // sizes.heads
    per_sample = sizes.programs[0] * sizes.programs[1] * sizes.programs[2]
    batch = index // per_sample
    index = index % per_sample
    n0 = index // (sizes.programs[1] * sizes.programs[2])
    n1 = (index // sizes.programs[2]) % sizes.programs[1]
    n2 = index % sizes.programs[2]
    p0, t0, g0 = split_phase(n0, sizes.groups[0], FORM.dilation[0])
    p1, t1, g1 = split_phase(n1, sizes.groups[1], FORM.dilation[1])
    p2, t2, g2 = split_phase(n2, sizes.groups[2], FORM.dilation[2])
    work = Work(batch, head, (t0, t1, t2), (p0, p1, p2), (g0, g1, g2), compactness_of(x, head, FORM))
    return work, sizes


@triton.jit
def compactness_of(x, head, FORM: tl.constexpr):
    """A head's compactness per unit of squared distances; 0 where there is none, and nobody reads it.

    Not None, which the triton that torch 2.11 installs (3.6) cannot return from a function.
    """
    if x.compactness is None:
        return 0.0
    else:
        return tl.load(x.compactness + head) * unit_of_squares(FORM)


@triton.jit
def token_on_axis(position, work, sizes, AXIS: tl.constexpr, FORM: tl.constexpr):
    """Fine index of a position, its cell in the phase, and whether the phase has such a token."""
    stride: tl.constexpr = FORM.stride[AXIS]
    cell = tl.minimum(tl.maximum(position, 0) // stride, work.groups[AXIS] - 1)
    if FORM.dilation[AXIS] == 1:
        index = position + sizes.offset[AXIS]
        exists = (index >= 0) & (index < sizes.size[AXIS])
    else:
        within = position - cell * stride
        block = work.phase[AXIS] + FORM.dilation[AXIS] * cell
        index = sizes.offset[AXIS] + block * stride + within
        # Only the first and the last block of the whole axis own tokens beyond their own stretch.
        owned = ((within >= 0) | (block == 0)) & ((within < stride) | (block == sizes.groups[AXIS] - 1))
        exists = owned & (index >= 0) & (index < sizes.size[AXIS])
    return index, cell, exists


@triton.jit
def tokens_at(e0, e1, e2, work, sizes, FORM: tl.constexpr):
    """Flat token index of positions, whether they exist, their cells and their places per axis."""
    i2, c2, exists = token_on_axis(e2, work, sizes, 2, FORM)
    i1 = e1
    i0 = e0
    c1 = e1
    c0 = e0
    index = i2
    if FORM.axes >= 2:
        i1, c1, x1 = token_on_axis(e1, work, sizes, 1, FORM)
        index += i1 * sizes.size[2]
        exists = exists & x1
    if FORM.axes == 3:
        i0, c0, x0 = token_on_axis(e0, work, sizes, 0, FORM)
        index += i0 * sizes.size[1] * sizes.size[2]
        exists = exists & x0
    return index, exists, (c0, c1, c2), places_of_tokens(i0, i1, i2)


@triton.jit
def groups_at(j0, j1, j2, work, sizes, FORM: tl.constexpr):
    """Flat group index of per-axis groups of a phase, whether they exist, and their places per axis."""
    g0 = work.phase[0] + FORM.dilation[0] * j0
    g1 = work.phase[1] + FORM.dilation[1] * j1
    g2 = work.phase[2] + FORM.dilation[2] * j2
    exists = (j2 >= 0) & (j2 < work.groups[2])
    if FORM.axes >= 2:
        exists = exists & (j1 >= 0) & (j1 < work.groups[1])
    if FORM.axes == 3:
        exists = exists & (j0 >= 0) & (j0 < work.groups[0])
    return group_index(g0, g1, g2, sizes, FORM), exists, places_of_groups(g0, g1, g2, sizes, FORM)


@triton.jit
def group_index(g0, g1, g2, sizes, FORM: tl.constexpr):
    """Flat index of per-axis groups."""
    index = g2
    if FORM.axes >= 2:
        index += g1 * sizes.groups[2]
    if FORM.axes == 3:
        index += g0 * sizes.groups[1] * sizes.groups[2]
    return index


@triton.jit
def places_of_tokens(i0, i1, i2):
    """Twice the fine indices of tokens per axis."""
    return (2 * i0).to(tl.float32), (2 * i1).to(tl.float32), (2 * i2).to(tl.float32)


@triton.jit
def places_of_groups(g0, g1, g2, sizes, FORM: tl.constexpr):
    """Twice the fine indices at which groups sit per axis."""
    return (
        (2 * FORM.stride[0] * g0 + sizes.centre[0]).to(tl.float32),
        (2 * FORM.stride[1] * g1 + sizes.centre[1]).to(tl.float32),
        (2 * FORM.stride[2] * g2 + sizes.centre[2]).to(tl.float32),
    )


@triton.jit
def with_square(squares, a, b, AXIS: tl.constexpr, FORM: tl.constexpr):
    """A sum of squares with that of an axis more, in units of the last axis'."""
    square = (a - b) * (a - b)
    if FORM.stride[AXIS] != FORM.stride[2]:
        square *= (FORM.stride[2] * FORM.stride[2]) / (FORM.stride[AXIS] * FORM.stride[AXIS])
    return squares + square


@triton.jit
def squared_distances(a0, a1, a2, b0, b1, b2, FORM: tl.constexpr):
    """Squared distances of places, every axis in units of its group spacing, times 4 stride**2 of the last axis.

    Places are whole numbers, so their differences are exact; far from the origin no digit is lost. The factor is left
    out because it is cheaper once per head (:func:`unit_of_squares`) than once per pair.
    """
    squares = (a2 - b2) * (a2 - b2)
    if FORM.axes >= 2:
        squares = with_square(squares, a1, b1, 1, FORM)
    if FORM.axes == 3:
        squares = with_square(squares, a0, b0, 0, FORM)
    return squares


@triton.jit
def unit_of_squares(FORM: tl.constexpr):
    """What squared distances are to be multiplied with."""
    return 0.25 / (FORM.stride[2] * FORM.stride[2])


@triton.jit
def window_entry(c0, c1, c2, j0, j1, j2, FORM: tl.constexpr):
    """Whether cells see groups, and which entry of a flattened window table such a pair reads."""
    entry = j2 - c2 + FORM.radius[2]
    visible = (entry >= 0) & (entry <= 2 * FORM.radius[2])
    if FORM.axes >= 2:
        e1 = j1 - c1 + FORM.radius[1]
        visible = visible & (e1 >= 0) & (e1 <= 2 * FORM.radius[1])
        entry += e1 * (2 * FORM.radius[2] + 1)
    if FORM.axes == 3:
        e0 = j0 - c0 + FORM.radius[0]
        visible = visible & (e0 >= 0) & (e0 <= 2 * FORM.radius[0])
        entry += e0 * ((2 * FORM.radius[1] + 1) * (2 * FORM.radius[2] + 1))
    return visible, entry


@triton.jit
def first_position(work, sizes, AXIS: tl.constexpr, FORM: tl.constexpr):
    """Where a tile of tokens starts; tiles are aligned with position 0, so that they hold whole cells."""
    tile: tl.constexpr = FORM.tile[AXIS]
    return (work.tile[AXIS] - (sizes.lead[AXIS] + tile - 1) // tile) * tile


@triton.jit
def first_group(position, work, AXIS: tl.constexpr, FORM: tl.constexpr):
    """First of the ``FORM.box`` groups of a phase that hold all that a tile of positions sees."""
    cell = tl.minimum(tl.maximum(position, 0) // FORM.stride[AXIS], work.groups[AXIS] - 1)
    return tl.maximum(tl.minimum(cell - FORM.reach[AXIS], work.groups[AXIS] - FORM.box[AXIS]), 0)


@triton.jit
def members_on_axis(work, sizes, AXIS: tl.constexpr, FORM: tl.constexpr):
    """First position and number of positions that see any group of a tile: one interval."""
    first = work.tile[AXIS] * FORM.tile[AXIS]
    beyond = first + FORM.tile[AXIS] + FORM.reach[AXIS]
    start = tl.where(first <= FORM.reach[AXIS], -sizes.lead[AXIS], (first - FORM.reach[AXIS]) * FORM.stride[AXIS])
    stop = tl.where(beyond >= work.groups[AXIS], sizes.length[AXIS], beyond * FORM.stride[AXIS])
    return start, tl.maximum(stop - start, 0)
