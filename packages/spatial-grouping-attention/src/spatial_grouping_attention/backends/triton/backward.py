"""Backward passes: everything that reaches a token is summed by its program, everything that reaches a group by its.

With T_ij = s_ij - l_i, A = exp(T), D_ij = exp(T_ij - log_mass_j) and g the gradient of the result:

    pool    dT_ij = D_ij (v_i . g_j - delta_j)     delta_j = g_j . out_j - dlog_mass_j
            dl_i  = -sum_j dT_ij (+ the gradient of l, where l is these logits' own normaliser)
            ds    = dT (+ A dl, likewise)          dv_i = sum_j D_ij g_j
    assign  ds_ij = A_ij (g_i . u_j - delta_i)     delta_i = g_i . out_i - dl_i      du_j = sum_i A_ij g_i
    both    dk_i  = scale sum_j ds_ij q_j          dq_j = scale sum_i ds_ij k_i
            dcompactness = -sum_ij ds_ij |p_i - p_j|^2

Token passes run first and store one number per token for the group passes: dl_i for pool, delta_i for assign. The
gradient of a bias table is a pass of its own (:mod:`.table`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bundles import Head, Listed
from .relation import unit_of_squares, work_of_program
from .rows import load_averages, load_masses, load_qk, load_scalars, load_uv, store_qk, store_scalars, store_uv
from .sides import (
    logits_by_group,
    logits_by_token,
    members,
    normalised,
    squares_between,
    step_of_groups,
    step_of_tokens,
    tile_of_groups,
    tile_of_tokens,
)


@triton.jit
def products_of_rows(a_tile, b_tile):
    """a . b of rows, summed in float32."""
    return tl.sum(a_tile.to(tl.float32) * b_tile.to(tl.float32), 1)


@triton.jit
def with_farness(farness, dscores, groups, tokens, x, FORM: tl.constexpr):
    """What reaches the compactness through the rows of a tile of groups, with that of a block of pairs more."""
    if x.compactness is None:
        return farness
    else:
        return farness - tl.sum(dscores * squares_between(groups, tokens, x, FORM), 1)


@triton.jit
def store_share(dcompactness, farness, FORM: tl.constexpr):
    """Store what a program adds to its head's compactness; heads are the fastest axis of the launch."""
    if dcompactness is not None:
        tl.store(dcompactness + tl.program_id(0), tl.sum(farness) * unit_of_squares(FORM))


@triton.jit(do_not_specialize=["heads", "number"])
def group_deltas(grad, out, grad_mass, delta, heads, number, FORM: tl.constexpr):
    """delta_j = g_j . out_j - dlog_mass_j for a block of groups."""
    blocks = (number + FORM.block - 1) // FORM.block
    of_heads = tl.program_id(0) // heads
    work = Head(of_heads // blocks, tl.program_id(0) % heads)
    index = of_heads % blocks * FORM.block + tl.arange(0, FORM.block)
    groups = Listed(index, index < number, index < number)
    g_tile = load_uv(grad, work, groups, FORM)
    out_tile = load_averages(out, work, groups, FORM)
    group_delta = products_of_rows(g_tile, out_tile) - load_scalars(grad_mass, work, groups)
    store_scalars(delta, work, groups, group_delta)


@triton.jit
def pool_backward_tokens(
    x, v, grad, lse, log_mass, delta, grad_lse, dk, dv, dlse, sizes, OWN_LSE: tl.constexpr, FORM: tl.constexpr
):
    """Gradients of the keys, values and normalisers of a tile of tokens; ``OWN_LSE``: l depends on the logits."""
    work, sizes = work_of_program(x, sizes, FORM)
    tokens, box = tile_of_tokens(x, work, sizes, FORM)
    normaliser, tokens = normalised(tokens, x, lse, work)
    k_tile = load_qk(x.k, work, tokens, FORM)
    v_tile = load_uv(v, work, tokens, FORM)
    dk_tile = tl.full((FORM.tile_rows, FORM.qk_padded), 0.0, tl.float32)
    dv_tile = tl.full((FORM.tile_rows, FORM.uv_padded), 0.0, tl.float32)
    # sum_j A_ij q_j and sum_j dT_ij: what the gradient of the normaliser multiplies and what it is made of.
    expected_q = tl.full((FORM.tile_rows, FORM.qk_padded), 0.0, tl.float32)
    received = tl.full((FORM.tile_rows,), 0.0, tl.float32)
    for step in range((FORM.box_rows + FORM.block - 1) // FORM.block):
        groups = step_of_groups(step, x, work, box, sizes, FORM)
        q_tile = load_qk(x.q, work, groups, FORM)
        g_tile = load_uv(grad, work, groups, FORM)
        scores = logits_by_token(tokens, groups, k_tile, q_tile, x, work, sizes, FORM) - normaliser[:, None]
        products = tl.dot(v_tile, tl.trans(g_tile), input_precision=FORM.precision)
        shares = tl.exp(scores - load_masses(log_mass, work, groups)[None, :])
        dscores = shares * (products - load_scalars(delta, work, groups)[None, :])
        received += tl.sum(dscores, 1)
        dv_tile = tl.dot(shares.to(FORM.product), g_tile, dv_tile, input_precision=FORM.precision)
        if OWN_LSE:
            weights = tl.exp(scores).to(FORM.product)
            expected_q = tl.dot(weights, q_tile, expected_q, input_precision=FORM.precision)
        dk_tile = tl.dot(dscores.to(FORM.product), q_tile, dk_tile, input_precision=FORM.precision)

    gradient = -received
    if OWN_LSE:
        gradient += load_scalars(grad_lse, work, tokens)
        dk_tile += gradient[:, None] * expected_q
    store_uv(dv, work, tokens, dv_tile, FORM)
    store_scalars(dlse, work, tokens, gradient)
    store_qk(dk, work, tokens, dk_tile * sizes.scale, FORM)


@triton.jit
def pool_backward_groups(
    x, v, grad, lse, log_mass, delta, dlse, dq, dcompactness, sizes, OWN_LSE: tl.constexpr, FORM: tl.constexpr
):
    """Gradients of the queries of a tile of groups, and its share of the compactness's."""
    work, sizes = work_of_program(x, sizes, FORM)
    groups = tile_of_groups(x, work, sizes, FORM)
    start, extent = members(work, sizes, FORM)
    q_tile = load_qk(x.q, work, groups, FORM)
    g_tile = load_uv(grad, work, groups, FORM)
    mass = load_masses(log_mass, work, groups)
    group_delta = load_scalars(delta, work, groups)
    dq_tile = tl.full((FORM.tile_rows, FORM.qk_padded), 0.0, tl.float32)
    farness = tl.full((FORM.tile_rows,), 0.0, tl.float32)
    for step in range((extent[0] * extent[1] * extent[2] + FORM.block - 1) // FORM.block):
        tokens = step_of_tokens(step, x, work, start, extent, sizes, FORM)
        normaliser, tokens = normalised(tokens, x, lse, work)
        k_tile = load_qk(x.k, work, tokens, FORM)
        v_tile = load_uv(v, work, tokens, FORM)
        scores = logits_by_group(tokens, groups, q_tile, k_tile, x, work, sizes, FORM)
        scores -= normaliser[None, :]
        products = tl.dot(g_tile, tl.trans(v_tile), input_precision=FORM.precision)
        dscores = tl.exp(scores - mass[:, None]) * (products - group_delta[:, None])
        if OWN_LSE:
            dscores += tl.exp(scores) * load_scalars(dlse, work, tokens)[None, :]
        dq_tile = tl.dot(dscores.to(FORM.product), k_tile, dq_tile, input_precision=FORM.precision)
        farness = with_farness(farness, dscores, groups, tokens, x, FORM)

    store_qk(dq, work, groups, dq_tile * sizes.scale, FORM)
    store_share(dcompactness, farness, FORM)


@triton.jit
def assign_backward_tokens(x, u, grad, out, lse, grad_lse, dk, delta, sizes, FORM: tl.constexpr):
    """Gradients of the keys of a tile of tokens, and their delta_i."""
    work, sizes = work_of_program(x, sizes, FORM)
    tokens, box = tile_of_tokens(x, work, sizes, FORM)
    normaliser, tokens = normalised(tokens, x, lse, work)
    k_tile = load_qk(x.k, work, tokens, FORM)
    g_tile = load_uv(grad, work, tokens, FORM)
    out_tile = load_averages(out, work, tokens, FORM)
    token_delta = products_of_rows(g_tile, out_tile) - load_scalars(grad_lse, work, tokens)
    dk_tile = tl.full((FORM.tile_rows, FORM.qk_padded), 0.0, tl.float32)
    for step in range((FORM.box_rows + FORM.block - 1) // FORM.block):
        groups = step_of_groups(step, x, work, box, sizes, FORM)
        q_tile = load_qk(x.q, work, groups, FORM)
        u_tile = load_uv(u, work, groups, FORM)
        scores = logits_by_token(tokens, groups, k_tile, q_tile, x, work, sizes, FORM) - normaliser[:, None]
        products = tl.dot(g_tile, tl.trans(u_tile), input_precision=FORM.precision)
        dscores = tl.exp(scores) * (products - token_delta[:, None])
        dk_tile = tl.dot(dscores.to(FORM.product), q_tile, dk_tile, input_precision=FORM.precision)

    store_scalars(delta, work, tokens, token_delta)
    store_qk(dk, work, tokens, dk_tile * sizes.scale, FORM)


@triton.jit
def assign_backward_groups(x, u, grad, lse, delta, dq, du, dcompactness, sizes, FORM: tl.constexpr):
    """Gradients of the queries and values of a tile of groups, and its share of the compactness's."""
    work, sizes = work_of_program(x, sizes, FORM)
    groups = tile_of_groups(x, work, sizes, FORM)
    start, extent = members(work, sizes, FORM)
    q_tile = load_qk(x.q, work, groups, FORM)
    u_tile = load_uv(u, work, groups, FORM)
    dq_tile = tl.full((FORM.tile_rows, FORM.qk_padded), 0.0, tl.float32)
    du_tile = tl.full((FORM.tile_rows, FORM.uv_padded), 0.0, tl.float32)
    farness = tl.full((FORM.tile_rows,), 0.0, tl.float32)
    for step in range((extent[0] * extent[1] * extent[2] + FORM.block - 1) // FORM.block):
        tokens = step_of_tokens(step, x, work, start, extent, sizes, FORM)
        normaliser, tokens = normalised(tokens, x, lse, work)
        k_tile = load_qk(x.k, work, tokens, FORM)
        g_tile = load_uv(grad, work, tokens, FORM)
        scores = logits_by_group(tokens, groups, q_tile, k_tile, x, work, sizes, FORM)
        weights = tl.exp(scores - normaliser[None, :])
        products = tl.dot(u_tile, tl.trans(g_tile), input_precision=FORM.precision)
        dscores = weights * (products - load_scalars(delta, work, tokens)[None, :])
        du_tile = tl.dot(weights.to(FORM.product), g_tile, du_tile, input_precision=FORM.precision)
        dq_tile = tl.dot(dscores.to(FORM.product), k_tile, dq_tile, input_precision=FORM.precision)
        farness = with_farness(farness, dscores, groups, tokens, x, FORM)

    store_qk(dq, work, groups, dq_tile * sizes.scale, FORM)
    store_uv(du, work, groups, du_tile, FORM)
    store_share(dcompactness, farness, FORM)
