"""Forward passes: softmax over the groups of every token, and softmax over the members of every group.

Both keep a running maximum and rescale what they have summed when it grows (Milakov & Gimelshein 2018,
arXiv:1805.02867), so neither ever holds more than one block of logits, in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .relation import (
    add_bias,
    first_group,
    groups_at,
    load_rows,
    load_scalars,
    load_valid,
    members,
    program,
    row_offsets,
    split_phase,
    store_rows,
    tokens_at,
    unravel,
    window_entry,
)

# Stands for "nothing seen yet" in running maxima: finite, so that differences with it are never NaN.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def token_forward(
    q,
    k,
    u,
    bias,
    valid,
    lse,
    out,
    q_strides,
    k_strides,
    u_strides,
    valid_strides,
    lse_strides,
    out_strides,
    scale,
    heads,
    programs,
    size,
    groups,
    offset,
    lead,
    STRIDE: tl.constexpr,
    RADIUS: tl.constexpr,
    REACH: tl.constexpr,
    DILATION: tl.constexpr,
    AXES: tl.constexpr,
    TILE: tl.constexpr,
    BOX: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WINDOW: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Normalisers of a tile of tokens, and with ``u`` the groups' values as the tokens mix them."""
    head, n0, n1, n2 = program(heads, programs)
    batch = tl.program_id(1)
    p0, t0, m0 = split_phase(n0, groups[0], DILATION[0])
    p1, t1, m1 = split_phase(n1, groups[1], DILATION[1])
    p2, t2, m2 = split_phase(n2, groups[2], DILATION[2])
    phase = (p0, p1, p2)
    count = (m0, m1, m2)
    # Tiles are aligned with position 0, so that they hold whole cells.
    first0 = (t0 - (lead[0] + TILE[0] - 1) // TILE[0]) * TILE[0]
    first1 = (t1 - (lead[1] + TILE[1] - 1) // TILE[1]) * TILE[1]
    first2 = (t2 - (lead[2] + TILE[2] - 1) // TILE[2]) * TILE[2]
    f0, f1, f2 = unravel(tl.arange(0, TILE[0] * TILE[1] * TILE[2]), TILE[1], TILE[2], AXES)
    token, exists, c0, c1, c2 = tokens_at(
        first0 + f0, first1 + f1, first2 + f2, phase, count, size, groups, offset, STRIDE, DILATION, AXES
    )
    box0 = first_group(first0, count[0], STRIDE[0], REACH[0], BOX[0])
    box1 = first_group(first1, count[1], STRIDE[1], REACH[1], BOX[1])
    box2 = first_group(first2, count[2], STRIDE[2], REACH[2], BOX[2])

    q_rows = row_offsets(q, batch, head, q_strides)
    k_tile = load_rows(row_offsets(k, batch, head, k_strides), token, k_strides, exists, D, BLOCK_D, WIDE)
    k_tile = k_tile.to(PRODUCT)
    highest = tl.full((TILE[0] * TILE[1] * TILE[2],), LOWEST, tl.float32)
    total = tl.zeros((TILE[0] * TILE[1] * TILE[2],), tl.float32)
    mixed = tl.zeros((TILE[0] * TILE[1] * TILE[2], BLOCK_C), tl.float32)
    for chunk in range((BOX[0] * BOX[1] * BOX[2] + BLOCK - 1) // BLOCK):
        slot = chunk * BLOCK + tl.arange(0, BLOCK)
        b0, b1, b2 = unravel(slot, BOX[1], BOX[2], AXES)
        j0 = box0 + b0
        j1 = box1 + b1
        j2 = box2 + b2
        group, there = groups_at(j0, j1, j2, phase, count, groups, DILATION, AXES)
        there = there & (slot < BOX[0] * BOX[1] * BOX[2])
        q_tile = load_rows(q_rows, group, q_strides, there, D, BLOCK_D, WIDE).to(PRODUCT)
        visible, entry = window_entry(
            c0[:, None], c1[:, None], c2[:, None], j0[None, :], j1[None, :], j2[None, :], RADIUS, AXES
        )
        visible = visible & there[None, :]
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * scale
        scores = add_bias(scores, bias, head, entry, visible, WINDOW)
        scores = tl.where(visible, scores, -float("inf"))
        now = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp(scores - now[:, None])
        rescale = tl.exp(highest - now)
        total = total * rescale + tl.sum(weights, 1)
        highest = now
        if u is not None:
            u_rows = row_offsets(u, batch, head, u_strides)
            u_tile = load_rows(u_rows, group, u_strides, there, C, BLOCK_C, WIDE).to(PRODUCT)
            mixed = mixed * rescale[:, None]
            mixed = tl.dot(weights.to(PRODUCT), u_tile, mixed, input_precision=PRECISION)

    # Slots without a token see nothing; whatever is computed for them is not stored.
    total = tl.where(total == 0.0, 1.0, total)
    takes_part = load_valid(valid, batch, token, valid_strides, exists)
    normaliser = tl.where(takes_part, highest + tl.log(total), float("inf"))
    tl.store(row_offsets(lse, batch, head, lse_strides) + token * lse_strides[2], normaliser, mask=exists)
    if u is not None:
        mixed = tl.where(takes_part[:, None], mixed / total[:, None], 0.0)
        store_rows(row_offsets(out, batch, head, out_strides), token, out_strides, exists, mixed, C, BLOCK_C, WIDE)


@triton.jit
def group_forward(
    q,
    k,
    v,
    bias,
    valid,
    lse,
    log_mass,
    out,
    q_strides,
    k_strides,
    v_strides,
    valid_strides,
    lse_strides,
    log_mass_strides,
    out_strides,
    scale,
    heads,
    programs,
    size,
    groups,
    offset,
    lead,
    length,
    STRIDE: tl.constexpr,
    RADIUS: tl.constexpr,
    REACH: tl.constexpr,
    DILATION: tl.constexpr,
    AXES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WINDOW: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Averages over the members of a tile of groups, and the logarithms of the groups' masses."""
    head, n0, n1, n2 = program(heads, programs)
    batch = tl.program_id(1)
    p0, t0, m0 = split_phase(n0, groups[0], DILATION[0])
    p1, t1, m1 = split_phase(n1, groups[1], DILATION[1])
    p2, t2, m2 = split_phase(n2, groups[2], DILATION[2])
    phase = (p0, p1, p2)
    count = (m0, m1, m2)
    f0, f1, f2 = unravel(tl.arange(0, TILE[0] * TILE[1] * TILE[2]), TILE[1], TILE[2], AXES)
    j0 = t0 * TILE[0] + f0
    j1 = t1 * TILE[1] + f1
    j2 = t2 * TILE[2] + f2
    group, there = groups_at(j0, j1, j2, phase, count, groups, DILATION, AXES)
    start0, extent0 = members(t0 * TILE[0], count[0], lead[0], length[0], STRIDE[0], REACH[0], TILE[0])
    start1, extent1 = members(t1 * TILE[1], count[1], lead[1], length[1], STRIDE[1], REACH[1], TILE[1])
    start2, extent2 = members(t2 * TILE[2], count[2], lead[2], length[2], STRIDE[2], REACH[2], TILE[2])

    k_rows = row_offsets(k, batch, head, k_strides)
    v_rows = row_offsets(v, batch, head, v_strides)
    q_tile = load_rows(row_offsets(q, batch, head, q_strides), group, q_strides, there, D, BLOCK_D, WIDE)
    q_tile = q_tile.to(PRODUCT)
    highest = tl.full((TILE[0] * TILE[1] * TILE[2],), LOWEST, tl.float32)
    total = tl.zeros((TILE[0] * TILE[1] * TILE[2],), tl.float32)
    summed = tl.zeros((TILE[0] * TILE[1] * TILE[2], BLOCK_C), tl.float32)
    for chunk in range((extent0 * extent1 * extent2 + BLOCK - 1) // BLOCK):
        slot = chunk * BLOCK + tl.arange(0, BLOCK)
        b0, b1, b2 = unravel(slot, extent1, extent2, AXES)
        token, exists, c0, c1, c2 = tokens_at(
            start0 + b0, start1 + b1, start2 + b2, phase, count, size, groups, offset, STRIDE, DILATION, AXES
        )
        exists = exists & (slot < extent0 * extent1 * extent2)
        takes_part = load_valid(valid, batch, token, valid_strides, exists)
        k_tile = load_rows(k_rows, token, k_strides, exists, D, BLOCK_D, WIDE).to(PRODUCT)
        v_tile = load_rows(v_rows, token, v_strides, exists, C, BLOCK_C, WIDE).to(PRODUCT)
        normaliser = load_scalars(lse, batch, head, token, lse_strides, exists)
        visible, entry = window_entry(
            c0[None, :], c1[None, :], c2[None, :], j0[:, None], j1[:, None], j2[:, None], RADIUS, AXES
        )
        visible = visible & there[:, None] & takes_part[None, :]
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
        scores = add_bias(scores, bias, head, entry, visible, WINDOW)
        scores = tl.where(visible, scores - normaliser[None, :], -float("inf"))
        now = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp(scores - now[:, None])
        rescale = tl.exp(highest - now)
        total = total * rescale + tl.sum(weights, 1)
        highest = now
        summed = tl.dot(weights.to(PRODUCT), v_tile, summed * rescale[:, None], input_precision=PRECISION)

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    mass = tl.where(empty, -float("inf"), highest + tl.log(total))
    tl.store(row_offsets(log_mass, batch, head, log_mass_strides) + group * log_mass_strides[2], mass, mask=there)
    store_rows(
        row_offsets(out, batch, head, out_strides),
        group,
        out_strides,
        there,
        summed / total[:, None],
        C,
        BLOCK_C,
        WIDE,
    )
