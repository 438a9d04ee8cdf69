"""Rows of a sample and head in memory: loaded where they take part, stored where they exist.

What does not take part may hold anything, and 0 times NaN is NaN, so it is never loaded.
"""

from __future__ import annotations

import triton
import triton.language as tl
from RoSE.kernels.sealed import opened


@triton.jit
def rows_of(x, work):
    """Pointer to a sample's and head's rows; in 64 bits, because whole batches can be that large."""
    offset = work.batch.to(tl.int64) * opened(x.strides[0]) + work.head.to(tl.int64) * opened(x.strides[1])
    return x.start + offset * x.unit


@triton.jit
def row_pointers(x, work, slots, PADDED: tl.constexpr, WIDE: tl.constexpr):
    """Pointers to all channels of rows."""
    index = slots.index
    if WIDE:
        index = index.to(tl.int64)
    offset = index * opened(x.strides[2]) * x.unit
    return rows_of(x, work) + offset[:, None] + tl.arange(0, PADDED)[None, :] * x.step


@triton.jit
def row_mask(there, CHANNELS: tl.constexpr, PADDED: tl.constexpr):
    """Which elements of a block of rows exist."""
    mask = there[:, None]
    if CHANNELS != PADDED:
        mask = mask & (tl.arange(0, PADDED) < CHANNELS)[None, :]
    return mask


@triton.jit
def load_qk(x, work, slots, FORM: tl.constexpr):
    """Rows of queries or keys, ready for products; zeros where none takes part."""
    pointers = row_pointers(x, work, slots, FORM.qk_padded, FORM.wide)
    return tl.load(pointers, mask=row_mask(slots.takes_part, FORM.qk, FORM.qk_padded), other=0.0).to(FORM.product)


@triton.jit
def load_uv(x, work, slots, FORM: tl.constexpr):
    """The same of values, or of what has their channels."""
    pointers = row_pointers(x, work, slots, FORM.uv_padded, FORM.wide)
    return tl.load(pointers, mask=row_mask(slots.takes_part, FORM.uv, FORM.uv_padded), other=0.0).to(FORM.product)


@triton.jit
def load_averages(x, work, slots, FORM: tl.constexpr):
    """Rows of a result of the forward passes as they are, float32: products with them nearly cancel others."""
    pointers = row_pointers(x, work, slots, FORM.uv_padded, FORM.wide)
    return tl.load(pointers, mask=row_mask(slots.takes_part, FORM.uv, FORM.uv_padded), other=0.0).to(tl.float32)


@triton.jit
def store_qk(x, work, slots, rows, FORM: tl.constexpr):
    """Store rows of a gradient of queries or keys, in its dtype."""
    pointers = row_pointers(x, work, slots, FORM.qk_padded, FORM.wide)
    tl.store(pointers, rows.to(x.start.dtype.element_ty), mask=row_mask(slots.exists, FORM.qk, FORM.qk_padded))


@triton.jit
def store_uv(x, work, slots, rows, FORM: tl.constexpr):
    """The same of what has the values' channels."""
    pointers = row_pointers(x, work, slots, FORM.uv_padded, FORM.wide)
    tl.store(pointers, rows.to(x.start.dtype.element_ty), mask=row_mask(slots.exists, FORM.uv, FORM.uv_padded))


@triton.jit
def row_scalars(x, work, slots):
    """Pointers to one number per row."""
    return rows_of(x, work) + slots.index * x.step


@triton.jit
def load_scalars(x, work, slots):
    """One number per row, float32; zero where none takes part, or where there is no such tensor."""
    if x is None:
        return tl.zeros((slots.index.shape[0],), tl.float32)
    else:
        return tl.load(row_scalars(x, work, slots), mask=slots.takes_part, other=0.0).to(tl.float32)


@triton.jit
def load_masses(log_mass, work, groups):
    """Logarithms of the groups' masses; +inf for empty groups, which have no members to send anything to."""
    mass = load_scalars(log_mass, work, groups)
    return tl.where(mass == -float("inf"), float("inf"), mass)


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
        pointers = valid.start + work.batch.to(tl.int64) * opened(valid.strides[0]) + index * valid.step
        return tl.load(pointers, mask=exists, other=0) != 0
