"""The gradient of a bias table: ``dtable_w = sum_ij ds_ij`` over the pairs whose token sees its group at entry w.

The tokens of one cell all see the window's groups at the same entries, so a program walks over a run of cells with the
entries as its columns: a sum over rows is a step towards the gradient, however wide the window is. Every program
stores what its run gives; the host sums over programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bundles import CompactHead, Slots
from .relation import compactness_of, group_index, places_of_groups, places_of_tokens, unravel
from .rows import load_masses, load_qk, load_scalars, load_uv, load_valid
from .sealed import opened_sizes
from .sides import logits, normalised, squares_between


@triton.jit
def stretch_of_cell(cell, sizes, AXIS: tl.constexpr, FORM: tl.constexpr):
    """First fine index and number of the tokens of a cell; border cells own what lies beyond them."""
    start = sizes.offset[AXIS] + cell * FORM.stride[AXIS]
    stop = start + FORM.stride[AXIS]
    start = tl.where(cell == 0, 0, tl.minimum(tl.maximum(start, 0), sizes.size[AXIS]))
    stop = tl.where(cell == sizes.groups[AXIS] - 1, sizes.size[AXIS], tl.minimum(stop, sizes.size[AXIS]))
    return start, tl.maximum(stop - start, 0)


@triton.jit
def group_at(cell, entry, sizes, AXIS: tl.constexpr, FORM: tl.constexpr):
    """The group that a cell sees at entries of an axis' window, and whether it exists."""
    group = cell + FORM.dilation[AXIS] * (entry - FORM.radius[AXIS])
    return group, (group >= 0) & (group < sizes.groups[AXIS])


@triton.jit
def window_of_cell(entry, c0, c1, c2, x, work, sizes, FORM: tl.constexpr):
    """The groups that a cell sees at entries of the window."""
    w0, w1, w2 = unravel(entry, 2 * FORM.radius[1] + 1, 2 * FORM.radius[2] + 1, FORM.axes)
    g0, exists0 = group_at(c0, w0, sizes, 0, FORM)
    g1, exists1 = group_at(c1, w1, sizes, 1, FORM)
    g2, exists2 = group_at(c2, w2, sizes, 2, FORM)
    exists = exists2 & (entry < FORM.window)
    if FORM.axes >= 2:
        exists = exists & exists1
    if FORM.axes == 3:
        exists = exists & exists0
    index = group_index(g0, g1, g2, sizes, FORM)
    takes_part = load_valid(x.valid_groups, work, index, exists)
    return Slots(index, exists, takes_part, (g0, g1, g2), places_of_groups(g0, g1, g2, sizes, FORM))


@triton.jit
def tokens_of_cell(slot, cell, start, extent, x, work, sizes, FORM: tl.constexpr):
    """Some of the tokens of a cell."""
    f0, f1, f2 = unravel(slot, extent[1], extent[2], FORM.axes)
    i0 = start[0] + f0
    i1 = start[1] + f1
    i2 = start[2] + f2
    exists = slot < extent[0] * extent[1] * extent[2]
    index = i2
    if FORM.axes >= 2:
        index += i1 * sizes.size[2]
    if FORM.axes == 3:
        index += i0 * sizes.size[1] * sizes.size[2]
    return Slots(index, exists, load_valid(x.valid, work, index, exists), cell, places_of_tokens(i0, i1, i2))


@triton.jit
def logits_of_cell(tokens, groups, entry, k_tile, q_tile, x, work, sizes, FORM: tl.constexpr):
    """Logits (tokens, entries), -inf where there is no group, or none that takes part."""
    visible = groups.takes_part[None, :]
    squares = squares_between(tokens, groups, x, FORM)
    return logits(k_tile, q_tile, visible, entry[None, :], squares, x, work, sizes, FORM)


@triton.jit
def table_backward(
    x,
    of_tokens,
    of_groups,
    lse,
    log_mass,
    token_delta,
    group_delta,
    dlse,
    dbias,
    sizes,
    CELLS: tl.constexpr,
    TOKENS: tl.constexpr,
    FORM: tl.constexpr,
):
    """Sum of ``D_ij (t_i . g_j - delta_i - delta_j) + A_ij dl_i`` per entry, over the tokens of a run of cells.

    Without ``log_mass`` D is A. A program has ``CELLS`` cells and ``FORM.block`` entries, and takes ``TOKENS`` tokens
    of a cell at a time.
    """
    sizes = opened_sizes(sizes)
    number = sizes.groups[0] * sizes.groups[1] * sizes.groups[2]
    blocks: tl.constexpr = (FORM.window + FORM.block - 1) // FORM.block
    runs = (number + CELLS - 1) // CELLS
    head = tl.program_id(0) % sizes.heads
    run = tl.program_id(0) // sizes.heads // blocks
    work = CompactHead(run // runs, head, compactness_of(x, head, FORM))
    entry = tl.program_id(0) // sizes.heads % blocks * FORM.block + tl.arange(0, FORM.block)
    first = run % runs * CELLS
    total = tl.full((FORM.block,), 0.0, tl.float32)
    for cell in range(first, tl.minimum(first + CELLS, number)):
        c0, c1, c2 = unravel(cell, sizes.groups[1], sizes.groups[2], FORM.axes)
        start0, extent0 = stretch_of_cell(c0, sizes, 0, FORM)
        start1, extent1 = stretch_of_cell(c1, sizes, 1, FORM)
        start2, extent2 = stretch_of_cell(c2, sizes, 2, FORM)
        start = (start0, start1, start2)
        extent = (extent0, extent1, extent2)
        groups = window_of_cell(entry, c0, c1, c2, x, work, sizes, FORM)
        q_tile = load_qk(x.q, work, groups, FORM)
        g_tile = load_uv(of_groups, work, groups, FORM)
        mass = load_masses(log_mass, work, groups)
        delta = load_scalars(group_delta, work, groups)
        for step in range((extent[0] * extent[1] * extent[2] + TOKENS - 1) // TOKENS):
            slot = step * TOKENS + tl.arange(0, TOKENS)
            tokens = tokens_of_cell(slot, (c0, c1, c2), start, extent, x, work, sizes, FORM)
            normaliser, tokens = normalised(tokens, x, lse, work)
            k_tile = load_qk(x.k, work, tokens, FORM)
            t_tile = load_uv(of_tokens, work, tokens, FORM)
            scores = logits_of_cell(tokens, groups, entry, k_tile, q_tile, x, work, sizes, FORM)
            scores -= normaliser[:, None]
            products = tl.dot(t_tile, tl.trans(g_tile), input_precision=FORM.precision)
            products -= delta[None, :] + load_scalars(token_delta, work, tokens)[:, None]
            dscores = tl.exp(scores - mass[None, :]) * products
            if dlse is not None:
                dscores += tl.exp(scores) * load_scalars(dlse, work, tokens)[:, None]
            total += tl.sum(dscores, 0)

    shares = dbias + ((work.batch * runs + run % runs).to(tl.int64) * sizes.heads + head) * FORM.window
    tl.store(shares + entry, total, mask=entry < FORM.window)
