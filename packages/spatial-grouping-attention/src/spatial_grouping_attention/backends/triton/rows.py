"""Rows of a sample and head in memory: loaded where they take part, stored where they exist.

What does not take part may hold anything, and 0 times NaN is NaN, so it is never loaded.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_of(x, work):
    """Pointer to a sample's and head's rows; in 64 bits, because whole batches can be that large."""
    return x.start + work.batch.to(tl.int64) * x.strides[0] + work.head.to(tl.int64) * x.strides[1]


@triton.jit
def row_pointers(x, work, slots, CHANNELS: tl.constexpr, WIDE: tl.constexpr):
    """Pointers to all channels of rows."""
    index = slots.index
    if WIDE:
        index = index.to(tl.int64)
    channel = tl.arange(0, CHANNELS.padded)
    return rows_of(x, work) + index[:, None] * x.strides[2] + channel[None, :] * x.strides[3]


@triton.jit
def row_mask(there, CHANNELS: tl.constexpr):
    """Which elements of a block of rows exist."""
    mask = there[:, None]
    if CHANNELS.number != CHANNELS.padded:
        mask = mask & (tl.arange(0, CHANNELS.padded) < CHANNELS.number)[None, :]
    return mask


@triton.jit
def load_rows(x, work, slots, CHANNELS: tl.constexpr, FORM: tl.constexpr):
    """Rows of tokens or groups, ready for products; zeros where none takes part."""
    pointers = row_pointers(x, work, slots, CHANNELS, FORM.wide)
    return tl.load(pointers, mask=row_mask(slots.takes_part, CHANNELS), other=0.0).to(FORM.product)


@triton.jit
def store_rows(x, work, slots, values, CHANNELS: tl.constexpr, FORM: tl.constexpr):
    """Store rows of tokens or groups in the result's dtype."""
    pointers = row_pointers(x, work, slots, CHANNELS, FORM.wide)
    tl.store(pointers, values.to(x.start.dtype.element_ty), mask=row_mask(slots.exists, CHANNELS))


@triton.jit
def row_scalars(x, work, slots):
    """Pointers to one number per row."""
    return rows_of(x, work) + slots.index * x.strides[2]


@triton.jit
def load_scalars(x, work, slots):
    """One number per row, float32; zero where none takes part, or where there is no such tensor."""
    if x is None:
        return tl.zeros((slots.index.shape[0],), tl.float32)
    else:
        return tl.load(row_scalars(x, work, slots), mask=slots.takes_part, other=0.0).to(tl.float32)


@triton.jit
def store_scalars(x, work, slots, values):
    """Store one number per row."""
    tl.store(row_scalars(x, work, slots), values, mask=slots.exists)


@triton.jit
def load_valid(valid, work, index, exists):
    """Which of the existing tokens or groups take part."""
    if valid is None:
        return exists
    else:
        pointers = valid.start + work.batch.to(tl.int64) * valid.strides[0] + index * valid.strides[1]
        return tl.load(pointers, mask=exists, other=0) != 0
