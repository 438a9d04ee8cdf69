"""Forward passes: softmax over the groups of every token, and softmax over the members of every group.

Both keep a running maximum and rescale what they have summed when it grows (Milakov & Gimelshein 2018,
arXiv:1805.02867), so neither ever holds more than one block of logits, in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bundles import Running
from .relation import work_of_program
from .rows import load_qk, load_uv, store_scalars, store_uv
from .sides import (
    logits_by_group,
    logits_by_token,
    members,
    normalised,
    step_of_groups,
    step_of_tokens,
    tile_of_groups,
    tile_of_tokens,
)

# Stands for "nothing seen yet" in running maxima: finite, so that differences with it are never NaN.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def nothing_yet(FORM: tl.constexpr):
    """A softmax per row of the tile to which nothing has been added."""
    return Running(
        tl.full((FORM.tile_rows,), LOWEST, tl.float32),
        tl.full((FORM.tile_rows,), 0.0, tl.float32),
        tl.full((FORM.tile_rows,), 0.0, tl.float32),
        tl.full((FORM.tile_rows, FORM.uv_padded), 0.0, tl.float32),
    )


@triton.jit
def added(running, scores, values, work, slots, FORM: tl.constexpr):
    """The softmax with a block of logits more, and with the values of its columns if there are any."""
    highest = tl.maximum(running.highest, tl.max(scores, 1))
    weights = tl.exp(scores - highest[:, None])
    rescale = tl.exp(running.highest - highest)
    total = running.total * rescale + tl.sum(weights, 1)
    rounded_total = running.rounded_total
    summed = running.summed
    if values is not None:
        value_tile = load_uv(values, work, slots, FORM)
        factors = weights.to(FORM.product)
        rounded_total = rounded_total * rescale + tl.sum(factors.to(tl.float32), 1)
        summed = summed * rescale[:, None]
        summed = tl.dot(factors, value_tile, summed, input_precision=FORM.precision)
    return Running(highest, total, rounded_total, summed)


@triton.jit
def averages(running):
    """What has been summed, divided by its weights; 0 where nothing was."""
    some = running.rounded_total > 0.0
    total = tl.where(some, running.rounded_total, 1.0)
    return tl.where(some[:, None], running.summed / total[:, None], 0.0)


@triton.jit
def token_forward(x, u, lse, out, sizes, FORM: tl.constexpr):
    """Normalisers of a tile of tokens, and with ``u`` the groups' values as the tokens mix them."""
    work, sizes = work_of_program(x, sizes, FORM)
    tokens, box = tile_of_tokens(x, work, sizes, FORM)
    k_tile = load_qk(x.k, work, tokens, FORM)
    running = nothing_yet(FORM)
    for step in range((FORM.box_rows + FORM.block - 1) // FORM.block):
        groups = step_of_groups(step, x, work, box, sizes, FORM)
        q_tile = load_qk(x.q, work, groups, FORM)
        scores = logits_by_token(tokens, groups, k_tile, q_tile, x, work, sizes, FORM)
        running = added(running, scores, u, work, groups, FORM)

    in_some_group = tokens.takes_part & (running.total > 0.0)
    total = tl.where(in_some_group, running.total, 1.0)
    store_scalars(lse, work, tokens, tl.where(in_some_group, running.highest + tl.log(total), float("inf")))
    if u is not None:
        mixed = tl.where(in_some_group[:, None], averages(running), 0.0)
        store_uv(out, work, tokens, mixed, FORM)


@triton.jit
def group_forward(x, v, lse, log_mass, out, sizes, FORM: tl.constexpr):
    """Averages over the members of a tile of groups, and the logarithms of the groups' masses."""
    work, sizes = work_of_program(x, sizes, FORM)
    groups = tile_of_groups(x, work, sizes, FORM)
    start, extent = members(work, sizes, FORM)
    q_tile = load_qk(x.q, work, groups, FORM)
    running = nothing_yet(FORM)
    for step in range((extent[0] * extent[1] * extent[2] + FORM.block - 1) // FORM.block):
        tokens = step_of_tokens(step, x, work, start, extent, sizes, FORM)
        normaliser, tokens = normalised(tokens, x, lse, work)
        k_tile = load_qk(x.k, work, tokens, FORM)
        scores = logits_by_group(tokens, groups, q_tile, k_tile, x, work, sizes, FORM)
        running = added(running, scores - normaliser[None, :], v, work, tokens, FORM)

    empty = running.total == 0.0
    total = tl.where(empty, 1.0, running.total)
    store_scalars(log_mass, work, groups, tl.where(empty, -float("inf"), running.highest + tl.log(total)))
    store_uv(out, work, groups, averages(running), FORM)
