"""The relation of tokens and groups inside kernels: which index a program's slots stand for, and who sees whom.

Every grid is treated as three axes, the leading ones of size 1; ``AXES`` tells how many are real, and arithmetic on
the others is dropped when a kernel is compiled.

A dilation d splits the groups of an axis into d *phases*: tokens whose cell is p modulo d see only groups that are
p modulo d, and within a phase the window is an ordinary undilated one. Programs work on one phase, in its own
coordinates: group j of phase p is group ``p + d*j`` of the axis, and *position* e, which counts the tokens owned by
the phase's cells, belongs to its cell ``e // stride``. Positions before 0 and beyond the last cell are the extra
tokens of the border blocks. Without dilation a position is simply the fine index minus the offset of block 0.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def program(heads, programs):
    """Head and per-axis program numbers; heads are fastest because their rows are neighbours in memory."""
    index = tl.program_id(0)
    head = index % heads
    index = index // heads
    return head, index // (programs[1] * programs[2]), (index // programs[2]) % programs[1], index % programs[2]


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
def token_on_axis(position, phase, count, size, groups, offset, STRIDE: tl.constexpr, DILATION: tl.constexpr):
    """Fine index of a position, its cell in the phase, and whether the phase has such a token."""
    cell = tl.minimum(tl.maximum(position, 0) // STRIDE, count - 1)
    if DILATION == 1:
        index = position + offset
        exists = (index >= 0) & (index < size)
    else:
        within = position - cell * STRIDE
        block = phase + DILATION * cell
        index = offset + block * STRIDE + within
        # Only the first and the last block of the whole axis own tokens beyond their own stretch.
        owned = ((within >= 0) | (block == 0)) & ((within < STRIDE) | (block == groups - 1))
        exists = owned & (index >= 0) & (index < size)
    return index, cell, exists


@triton.jit
def tokens_at(
    e0, e1, e2, phase, count, size, groups, offset, STRIDE: tl.constexpr, DILATION: tl.constexpr, AXES: tl.constexpr
):
    """Flat token index of positions, whether they exist, and their cells per axis."""
    index, c2, exists = token_on_axis(e2, phase[2], count[2], size[2], groups[2], offset[2], STRIDE[2], DILATION[2])
    c1 = e1
    c0 = e0
    if AXES >= 2:
        i1, c1, x1 = token_on_axis(e1, phase[1], count[1], size[1], groups[1], offset[1], STRIDE[1], DILATION[1])
        index += i1 * size[2]
        exists = exists & x1
    if AXES == 3:
        i0, c0, x0 = token_on_axis(e0, phase[0], count[0], size[0], groups[0], offset[0], STRIDE[0], DILATION[0])
        index += i0 * size[1] * size[2]
        exists = exists & x0
    return index, exists, c0, c1, c2


@triton.jit
def groups_at(j0, j1, j2, phase, count, groups, DILATION: tl.constexpr, AXES: tl.constexpr):
    """Flat group index of per-axis groups of a phase, and whether they exist."""
    index = phase[2] + DILATION[2] * j2
    exists = (j2 >= 0) & (j2 < count[2])
    if AXES >= 2:
        index += (phase[1] + DILATION[1] * j1) * groups[2]
        exists = exists & (j1 >= 0) & (j1 < count[1])
    if AXES == 3:
        index += (phase[0] + DILATION[0] * j0) * groups[1] * groups[2]
        exists = exists & (j0 >= 0) & (j0 < count[0])
    return index, exists


@triton.jit
def window_entry(c0, c1, c2, j0, j1, j2, RADIUS: tl.constexpr, AXES: tl.constexpr):
    """Whether cells see groups, and which entry of a flattened window table such a pair reads."""
    entry = j2 - c2 + RADIUS[2]
    visible = (entry >= 0) & (entry <= 2 * RADIUS[2])
    if AXES >= 2:
        e1 = j1 - c1 + RADIUS[1]
        visible = visible & (e1 >= 0) & (e1 <= 2 * RADIUS[1])
        entry += e1 * (2 * RADIUS[2] + 1)
    if AXES == 3:
        e0 = j0 - c0 + RADIUS[0]
        visible = visible & (e0 >= 0) & (e0 <= 2 * RADIUS[0])
        entry += e0 * ((2 * RADIUS[1] + 1) * (2 * RADIUS[2] + 1))
    return visible, entry


@triton.jit
def first_group(position, count, STRIDE: tl.constexpr, REACH: tl.constexpr, BOX: tl.constexpr):
    """First of the ``BOX`` groups of a phase that hold all that a tile of positions sees."""
    cell = tl.minimum(tl.maximum(position, 0) // STRIDE, count - 1)
    return tl.maximum(tl.minimum(cell - REACH, count - BOX), 0)


@triton.jit
def members(first, count, lead, length, STRIDE: tl.constexpr, REACH: tl.constexpr, TILE: tl.constexpr):
    """First position and number of positions that see any of ``TILE`` groups from ``first`` on: one interval."""
    start = tl.where(first <= REACH, -lead, (first - REACH) * STRIDE)
    stop = tl.where(first + TILE + REACH >= count, length, (first + TILE + REACH) * STRIDE)
    return start, tl.maximum(stop - start, 0)


@triton.jit
def row_offsets(base, batch, head, strides):
    """Pointer to a sample's and head's rows; in 64 bits, because whole batches can be that large."""
    return base + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def row_pointers(base, rows, strides, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Pointers to all channels of rows."""
    if WIDE:
        rows = rows.to(tl.int64)
    return base + rows[:, None] * strides[2] + tl.arange(0, BLOCK)[None, :] * strides[3]


@triton.jit
def row_mask(exists, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """Which elements of a block of rows exist."""
    mask = exists[:, None]
    if CHANNELS != BLOCK:
        mask = mask & (tl.arange(0, BLOCK) < CHANNELS)[None, :]
    return mask


@triton.jit
def load_rows(base, rows, strides, exists, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Rows of one sample and head, zeros where none exist."""
    return tl.load(row_pointers(base, rows, strides, BLOCK, WIDE), mask=row_mask(exists, CHANNELS, BLOCK), other=0.0)


@triton.jit
def store_rows(base, rows, strides, exists, values, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Store rows of one sample and head in the result's dtype."""
    tl.store(
        row_pointers(base, rows, strides, BLOCK, WIDE),
        values.to(base.dtype.element_ty),
        mask=row_mask(exists, CHANNELS, BLOCK),
    )


@triton.jit
def load_scalars(base, batch, head, rows, strides, exists):
    """One number per row, float32; zero where none exists."""
    pointers = row_offsets(base, batch, head, strides) + rows * strides[2]
    return tl.load(pointers, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def load_valid(valid, batch, rows, strides, exists):
    """Which of the existing tokens take part."""
    if valid is None:
        return exists
    else:
        return tl.load(valid + batch.to(tl.int64) * strides[0] + rows * strides[1], mask=exists, other=0) != 0


@triton.jit
def add_bias(scores, bias, head, entry, visible, WINDOW: tl.constexpr):
    """Add the entries of a head's table, if there is one."""
    if bias is not None:
        scores += tl.load(bias + head * WINDOW + entry, mask=visible, other=0.0).to(tl.float32)
    return scores
