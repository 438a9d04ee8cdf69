"""Backward passes: everything that reaches a token is summed by its program, everything that reaches a group by its.

With T_ij = s_ij - l_i, A = exp(T), D_ij = exp(T_ij - log_mass_j) and g the gradient of the result:

    pool    dT_ij = D_ij (v_i . g_j - delta_j)     delta_j = g_j . out_j - dlog_mass_j
            dl_i  = -sum_j dT_ij (+ the gradient of l, where l is these logits' own normaliser)
            ds    = dT (+ A dl, likewise)          dv_i = sum_j D_ij g_j
    assign  ds_ij = A_ij (g_i . u_j - delta_i)     delta_i = g_i . out_i - dl_i      du_j = sum_i A_ij g_i
    both    dk_i  = scale sum_j ds_ij q_j          dq_j = scale sum_i ds_ij k_i

The token passes store one number per token for the group passes: dl_i for pool, delta_i for assign. The kernels for
both operators are the same, because the operators are each other's transpose: ``x`` stands for what a token brings
(v, or the gradient of what it received) and ``y`` for what a group brings (the gradient of its average, or u).
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


@triton.jit
def group_products(
    grad,
    out,
    grad_mass,
    delta,
    grad_strides,
    out_strides,
    grad_mass_strides,
    delta_strides,
    heads,
    rows,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    """delta_j = g_j . out_j - dlog_mass_j for a block of groups."""
    head = tl.program_id(0) % heads
    batch = tl.program_id(1)
    row = tl.program_id(0) // heads * BLOCK + tl.arange(0, BLOCK)
    there = row < rows
    g = load_rows(row_offsets(grad, batch, head, grad_strides), row, grad_strides, there, C, BLOCK_C, WIDE)
    o = load_rows(row_offsets(out, batch, head, out_strides), row, out_strides, there, C, BLOCK_C, WIDE)
    product = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    product -= load_scalars(grad_mass, batch, head, row, grad_mass_strides, there)
    tl.store(row_offsets(delta, batch, head, delta_strides) + row * delta_strides[2], product, mask=there)


@triton.jit
def token_backward(
    q,
    k,
    x,
    y,
    bias,
    valid,
    lse,
    log_mass,
    delta,
    out,
    grad_lse,
    dk,
    dx,
    per_token,
    q_strides,
    k_strides,
    x_strides,
    y_strides,
    valid_strides,
    lse_strides,
    log_mass_strides,
    delta_strides,
    out_strides,
    grad_lse_strides,
    dk_strides,
    dx_strides,
    per_token_strides,
    scale,
    heads,
    programs,
    size,
    groups,
    offset,
    lead,
    POOL: tl.constexpr,
    OWN_LSE: tl.constexpr,
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
    """Gradients of the keys (and, for pool, values and normalisers) of a tile of tokens."""
    head, n0, n1, n2 = program(heads, programs)
    batch = tl.program_id(1)
    p0, t0, m0 = split_phase(n0, groups[0], DILATION[0])
    p1, t1, m1 = split_phase(n1, groups[1], DILATION[1])
    p2, t2, m2 = split_phase(n2, groups[2], DILATION[2])
    phase = (p0, p1, p2)
    count = (m0, m1, m2)
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

    takes_part = load_valid(valid, batch, token, valid_strides, exists)
    q_rows = row_offsets(q, batch, head, q_strides)
    y_rows = row_offsets(y, batch, head, y_strides)
    k_tile = load_rows(row_offsets(k, batch, head, k_strides), token, k_strides, exists, D, BLOCK_D, WIDE)
    k_tile = k_tile.to(PRODUCT)
    x_tile = load_rows(row_offsets(x, batch, head, x_strides), token, x_strides, exists, C, BLOCK_C, WIDE)
    normaliser = load_scalars(lse, batch, head, token, lse_strides, exists)
    token_delta = tl.zeros((TILE[0] * TILE[1] * TILE[2],), tl.float32)
    if not POOL:
        out_tile = load_rows(row_offsets(out, batch, head, out_strides), token, out_strides, exists, C, BLOCK_C, WIDE)
        token_delta = tl.sum(x_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
        token_delta -= load_scalars(grad_lse, batch, head, token, grad_lse_strides, exists)
    x_tile = x_tile.to(PRODUCT)
    dk_tile = tl.zeros((TILE[0] * TILE[1] * TILE[2], BLOCK_D), tl.float32)
    # sum_j A_ij q_j and sum_j dT_ij: what the gradient of the normaliser multiplies and what it is made of.
    expected_q = tl.zeros((TILE[0] * TILE[1] * TILE[2], BLOCK_D), tl.float32)
    dx_tile = tl.zeros((TILE[0] * TILE[1] * TILE[2], BLOCK_C), tl.float32)
    received = tl.zeros((TILE[0] * TILE[1] * TILE[2],), tl.float32)
    for chunk in range((BOX[0] * BOX[1] * BOX[2] + BLOCK - 1) // BLOCK):
        slot = chunk * BLOCK + tl.arange(0, BLOCK)
        b0, b1, b2 = unravel(slot, BOX[1], BOX[2], AXES)
        j0 = box0 + b0
        j1 = box1 + b1
        j2 = box2 + b2
        group, there = groups_at(j0, j1, j2, phase, count, groups, DILATION, AXES)
        there = there & (slot < BOX[0] * BOX[1] * BOX[2])
        q_tile = load_rows(q_rows, group, q_strides, there, D, BLOCK_D, WIDE).to(PRODUCT)
        y_tile = load_rows(y_rows, group, y_strides, there, C, BLOCK_C, WIDE).to(PRODUCT)
        visible, entry = window_entry(
            c0[:, None], c1[:, None], c2[:, None], j0[None, :], j1[None, :], j2[None, :], RADIUS, AXES
        )
        visible = visible & there[None, :] & takes_part[:, None]
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * scale
        scores = add_bias(scores, bias, head, entry, visible, WINDOW)
        scores = tl.where(visible, scores - normaliser[:, None], -float("inf"))
        products = tl.dot(x_tile, tl.trans(y_tile), input_precision=PRECISION)
        if POOL:
            mass = load_scalars(log_mass, batch, head, group, log_mass_strides, there)
            # An empty group has no members to send anything to.
            mass = tl.where(mass == -float("inf"), float("inf"), mass)
            weights = tl.exp(scores - mass[None, :])
            group_delta = load_scalars(delta, batch, head, group, delta_strides, there)
            dscores = weights * (products - group_delta[None, :])
            received += tl.sum(dscores, 1)
            dx_tile = tl.dot(weights.to(PRODUCT), y_tile, dx_tile, input_precision=PRECISION)
            if OWN_LSE:
                expected_q = tl.dot(tl.exp(scores).to(PRODUCT), q_tile, expected_q, input_precision=PRECISION)
        else:
            dscores = tl.exp(scores) * (products - token_delta[:, None])
        dk_tile = tl.dot(dscores.to(PRODUCT), q_tile, dk_tile, input_precision=PRECISION)

    if POOL:
        token_delta = -received
        if OWN_LSE:
            token_delta += load_scalars(grad_lse, batch, head, token, grad_lse_strides, exists)
            dk_tile += token_delta[:, None] * expected_q
        store_rows(row_offsets(dx, batch, head, dx_strides), token, dx_strides, exists, dx_tile, C, BLOCK_C, WIDE)
    tl.store(
        row_offsets(per_token, batch, head, per_token_strides) + token * per_token_strides[2],
        token_delta,
        mask=exists,
    )
    store_rows(row_offsets(dk, batch, head, dk_strides), token, dk_strides, exists, dk_tile * scale, D, BLOCK_D, WIDE)


@triton.jit
def group_backward(
    q,
    k,
    x,
    y,
    bias,
    valid,
    lse,
    log_mass,
    delta,
    per_token,
    dq,
    dy,
    dbias,
    q_strides,
    k_strides,
    x_strides,
    y_strides,
    valid_strides,
    lse_strides,
    log_mass_strides,
    delta_strides,
    per_token_strides,
    dq_strides,
    dy_strides,
    scale,
    heads,
    programs,
    size,
    groups,
    offset,
    lead,
    length,
    POOL: tl.constexpr,
    OWN_LSE: tl.constexpr,
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
    BLOCK_W: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Gradients of the queries (and, for assign, values) of a tile of groups, and its share of the bias table's."""
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
    x_rows = row_offsets(x, batch, head, x_strides)
    q_tile = load_rows(row_offsets(q, batch, head, q_strides), group, q_strides, there, D, BLOCK_D, WIDE)
    q_tile = q_tile.to(PRODUCT)
    y_tile = load_rows(row_offsets(y, batch, head, y_strides), group, y_strides, there, C, BLOCK_C, WIDE)
    y_tile = y_tile.to(PRODUCT)
    mass = tl.zeros((TILE[0] * TILE[1] * TILE[2],), tl.float32)
    group_delta = tl.zeros((TILE[0] * TILE[1] * TILE[2],), tl.float32)
    if POOL:
        mass = load_scalars(log_mass, batch, head, group, log_mass_strides, there)
        mass = tl.where(mass == -float("inf"), float("inf"), mass)
        group_delta = load_scalars(delta, batch, head, group, delta_strides, there)
    dq_tile = tl.zeros((TILE[0] * TILE[1] * TILE[2], BLOCK_D), tl.float32)
    dy_tile = tl.zeros((TILE[0] * TILE[1] * TILE[2], BLOCK_C), tl.float32)
    table = tl.zeros((BLOCK_W,), tl.float32)
    for chunk in range((extent0 * extent1 * extent2 + BLOCK - 1) // BLOCK):
        slot = chunk * BLOCK + tl.arange(0, BLOCK)
        b0, b1, b2 = unravel(slot, extent1, extent2, AXES)
        token, exists, c0, c1, c2 = tokens_at(
            start0 + b0, start1 + b1, start2 + b2, phase, count, size, groups, offset, STRIDE, DILATION, AXES
        )
        exists = exists & (slot < extent0 * extent1 * extent2)
        takes_part = load_valid(valid, batch, token, valid_strides, exists)
        k_tile = load_rows(k_rows, token, k_strides, exists, D, BLOCK_D, WIDE).to(PRODUCT)
        x_tile = load_rows(x_rows, token, x_strides, exists, C, BLOCK_C, WIDE).to(PRODUCT)
        normaliser = load_scalars(lse, batch, head, token, lse_strides, exists)
        visible, entry = window_entry(
            c0[None, :], c1[None, :], c2[None, :], j0[:, None], j1[:, None], j2[:, None], RADIUS, AXES
        )
        visible = visible & there[:, None] & takes_part[None, :]
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
        scores = add_bias(scores, bias, head, entry, visible, WINDOW)
        scores = tl.where(visible, scores - normaliser[None, :], -float("inf"))
        products = tl.dot(y_tile, tl.trans(x_tile), input_precision=PRECISION)
        if POOL:
            dscores = tl.exp(scores - mass[:, None]) * (products - group_delta[:, None])
            if OWN_LSE:
                dlse = load_scalars(per_token, batch, head, token, per_token_strides, exists)
                dscores += tl.exp(scores) * dlse[None, :]
        else:
            weights = tl.exp(scores)
            token_delta = load_scalars(per_token, batch, head, token, per_token_strides, exists)
            dscores = weights * (products - token_delta[None, :])
            dy_tile = tl.dot(weights.to(PRODUCT), x_tile, dy_tile, input_precision=PRECISION)
        dq_tile = tl.dot(dscores.to(PRODUCT), k_tile, dq_tile, input_precision=PRECISION)
        if bias is not None:
            # Pairs that are not visible have dscores 0, so it does not matter which entry they name.
            for w in range(WINDOW):
                share = tl.sum(tl.where(entry == w, dscores, 0.0))
                table += tl.where(tl.arange(0, BLOCK_W) == w, share, 0.0)

    store_rows(row_offsets(dq, batch, head, dq_strides), group, dq_strides, there, dq_tile * scale, D, BLOCK_D, WIDE)
    if not POOL:
        store_rows(row_offsets(dy, batch, head, dy_strides), group, dy_strides, there, dy_tile, C, BLOCK_C, WIDE)
    if bias is not None:
        entries = tl.arange(0, BLOCK_W)
        row = batch.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        tl.store(dbias + row * WINDOW + entries, table, mask=entries < WINDOW)
