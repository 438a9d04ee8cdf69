"""The kernels: derivatives of the form by its operands, and what relative sums and visibility need besides."""

from __future__ import annotations

import triton
import triton.language as tl
from RoSE.kernels.sealed import opened

from ..rows import rows_of
from .corners import at_groups, look, number_of, relative_shares, tokens_of_program


@triton.jit
def derivatives(
    x,
    factors,
    of_tokens,
    of_groups,
    highest,
    largest,
    grad_masses,
    to_factors,
    to_places,
    to_tokens,
    to_groups,
    to_masses,
    NDIM: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Derivatives of ``sum_ip c_ip <z(x_ip), r_i>`` by all that there is a place for.

    Numbers of points, groups and masses are pointers, rows of vectors :class:`..bundles.Rows`; None is what a pass does
    without. Where there is ``highest``, factors are logarithms of shares, which are taken relative to it at every
    corner, and count in the gradient of places for ``largest`` at most.
    """
    here = tokens_of_program(x, BLOCK)
    channel = tl.arange(0, PADDED)
    if of_tokens is not None:
        row = tl.load(token_rows(of_tokens, here, channel), mask=token_mask(here, channel, CHANNELS, PADDED), other=0.0)
    if to_tokens is not None:
        received = tl.zeros((BLOCK, PADDED), to_tokens.start.dtype.element_ty)
    for point in range(PER_TOKEN):
        number = number_of(x, here, point, PER_TOKEN)
        corners = look(x, here, number, NDIM)
        weight, bounded = corners.weight, corners.weight * 0.0 + 1.0
        exists = here.exists[:, None] & (corners.index >= 0)
        factor = here.exists.to(weight.dtype)
        if factors is not None:
            factor = tl.load(factors + number, mask=here.exists, other=0.0)
        if highest is not None:
            tops = tl.load(highest + at_groups(here, corners), mask=exists, other=0.0)
            share = relative_shares(factor, tops)
            weight = weight * share
            if largest is not None:
                most = tl.load(largest + at_groups(here, corners), mask=exists, other=0.0)
                bounded = tl.where(share > most, most, share)
            factor = here.exists.to(weight.dtype)
        there = exists[:, :, None]
        if CHANNELS != PADDED:
            there = there & (channel < CHANNELS)[None, None, :]
        if of_groups is not None:
            seen = tl.load(group_rows(of_groups, here, corners, channel), mask=there, other=0.0)
            if to_tokens is not None:
                received += factor[:, None] * tl.sum(weight[:, :, None] * seen, 1)
            if (to_factors is not None) or (to_places is not None):
                value = tl.sum(seen * row[:, None, :], 2)
                if grad_masses is not None:
                    value += tl.load(grad_masses + at_groups(here, corners), mask=exists, other=0.0)
                if to_factors is not None:
                    tl.store(to_factors + number, tl.sum(weight * value, 1), mask=here.exists)
                if to_places is not None:
                    value = value * bounded * factor[:, None]
                    for axis in tl.static_range(3 - NDIM, 3):
                        move = tl.sum(corners.slopes[axis] * value, 1)
                        place = to_places + number * NDIM + axis - (3 - NDIM)
                        tl.store(place, tl.where(corners.moves[axis], move, 0.0), mask=here.exists)
        given = weight * factor[:, None]
        if to_groups is not None:
            tl.atomic_add(
                group_rows(to_groups, here, corners, channel),
                given[:, :, None] * row[:, None, :],
                mask=there,
                sem="relaxed",
            )
        if to_masses is not None:
            tl.atomic_add(to_masses + at_groups(here, corners), given, mask=exists, sem="relaxed")
    if to_tokens is not None:
        tl.store(token_rows(to_tokens, here, channel), received, mask=token_mask(here, channel, CHANNELS, PADDED))


@triton.jit
def highest(x, log_shares, tops, NDIM: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr):
    """Logarithm of every group's largest membership, where it is more than what is there."""
    here = tokens_of_program(x, BLOCK)
    for point in range(PER_TOKEN):
        number = number_of(x, here, point, PER_TOKEN)
        corners = look(x, here, number, NDIM)
        log_share = tl.load(log_shares + number, mask=here.exists, other=0.0)
        some = corners.weight > 0.0
        membership = log_share[:, None] + tl.log(tl.where(some, corners.weight, 1.0))
        # NaN is larger than nothing: it shows in the sums.
        some = some & here.exists[:, None] & (membership == membership)
        tl.atomic_max(tops + at_groups(here, corners), membership, mask=some, sem="relaxed")


@triton.jit
def touched(x, result, NDIM: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr):
    """1 for points that touch something, else 0."""
    here = tokens_of_program(x, BLOCK)
    for point in range(PER_TOKEN):
        number = number_of(x, here, point, PER_TOKEN)
        corners = look(x, here, number, NDIM)
        nothing = corners.weight <= 0.0  # a weight may be NaN
        some = tl.max((nothing == 0).to(tl.int8), 1)
        tl.store(result + number, some, mask=here.exists)


@triton.jit
def token_rows(rows, here, channel):
    """Pointers to all channels of the tokens' rows."""
    offset = here.index.to(tl.int64) * opened(rows.strides[2]) * rows.unit
    return rows_of(rows, here) + offset[:, None] + channel[None, :] * rows.step


@triton.jit
def token_mask(here, channel, CHANNELS: tl.constexpr, PADDED: tl.constexpr):
    """Which of them exist."""
    mask = here.exists[:, None]
    if CHANNELS != PADDED:
        mask = mask & (channel < CHANNELS)[None, :]
    return mask


@triton.jit
def group_rows(rows, here, corners, channel):
    """Pointers to all channels of the rows of the groups around."""
    offset = corners.index.to(tl.int64) * opened(rows.strides[2]) * rows.unit
    return rows_of(rows, here) + offset[:, :, None] + channel[None, None, :] * rows.step
