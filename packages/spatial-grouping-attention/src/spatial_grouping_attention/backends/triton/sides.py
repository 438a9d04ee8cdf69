"""The two sides of a pass: the tile that a program owns, and the other side, which it walks over in steps.

A *token pass* owns a tile of tokens and walks over the box of groups that they see; a *group pass* owns a tile of
groups and walks over their members.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bundles import Slots
from .relation import (
    first_group,
    first_position,
    groups_at,
    members_on_axis,
    squared_distances,
    tokens_at,
    unravel,
    window_entry,
)
from .rows import load_valid, row_scalars


@triton.jit
def tile_of_tokens(x, work, sizes, FORM: tl.constexpr):
    """The tokens that a program owns, and the first group per axis of the box that they see."""
    e0 = first_position(work, sizes, 0, FORM)
    e1 = first_position(work, sizes, 1, FORM)
    e2 = first_position(work, sizes, 2, FORM)
    f0, f1, f2 = unravel(tl.arange(0, FORM.tile_rows), FORM.tile[1], FORM.tile[2], FORM.axes)
    index, exists, cell, place = tokens_at(e0 + f0, e1 + f1, e2 + f2, work, sizes, FORM)
    tokens = Slots(index, exists, load_valid(x.valid, work, index, exists), cell, place)
    box = (first_group(e0, work, 0, FORM), first_group(e1, work, 1, FORM), first_group(e2, work, 2, FORM))
    return tokens, box


@triton.jit
def step_of_groups(step, x, work, box, sizes, FORM: tl.constexpr):
    """The next groups of the box."""
    slot = step * FORM.block + tl.arange(0, FORM.block)
    b0, b1, b2 = unravel(slot, FORM.box[1], FORM.box[2], FORM.axes)
    cell = (box[0] + b0, box[1] + b1, box[2] + b2)
    index, exists, place = groups_at(cell[0], cell[1], cell[2], work, sizes, FORM)
    exists = exists & (slot < FORM.box_rows)
    return Slots(index, exists, load_valid(x.valid_groups, work, index, exists), cell, place)


@triton.jit
def tile_of_groups(x, work, sizes, FORM: tl.constexpr):
    """The groups that a program owns."""
    f0, f1, f2 = unravel(tl.arange(0, FORM.tile_rows), FORM.tile[1], FORM.tile[2], FORM.axes)
    j0 = work.tile[0] * FORM.tile[0] + f0
    j1 = work.tile[1] * FORM.tile[1] + f1
    j2 = work.tile[2] * FORM.tile[2] + f2
    index, exists, place = groups_at(j0, j1, j2, work, sizes, FORM)
    return Slots(index, exists, load_valid(x.valid_groups, work, index, exists), (j0, j1, j2), place)


@triton.jit
def members(work, sizes, FORM: tl.constexpr):
    """Per axis the first position that sees any group of the tile, and the number of such positions."""
    start0, extent0 = members_on_axis(work, sizes, 0, FORM)
    start1, extent1 = members_on_axis(work, sizes, 1, FORM)
    start2, extent2 = members_on_axis(work, sizes, 2, FORM)
    return (start0, start1, start2), (extent0, extent1, extent2)


@triton.jit
def step_of_tokens(step, x, work, start, extent, sizes, FORM: tl.constexpr):
    """The next members."""
    slot = step * FORM.block + tl.arange(0, FORM.block)
    b0, b1, b2 = unravel(slot, extent[1], extent[2], FORM.axes)
    index, exists, cell, place = tokens_at(start[0] + b0, start[1] + b1, start[2] + b2, work, sizes, FORM)
    exists = exists & (slot < extent[0] * extent[1] * extent[2])
    return Slots(index, exists, load_valid(x.valid, work, index, exists), cell, place)


@triton.jit
def normalised(tokens, x, lse, work):
    """Normalisers of tokens, +inf where they belong to no group, and the tokens that do belong to some.

    One that sees no valid group is like an invalid one.
    """
    normaliser = tl.load(row_scalars(lse, work, tokens), mask=tokens.takes_part, other=float("inf")).to(tl.float32)
    if x.valid_groups is None:
        return normaliser, tokens
    else:
        return normaliser, Slots(tokens.index, tokens.exists, normaliser < float("inf"), tokens.cell, tokens.place)


@triton.jit
def squares_between(rows, columns, x, FORM: tl.constexpr):
    """Squared distances of tokens and groups, or of groups and tokens; 0 where nothing depends on them."""
    if x.compactness is None:
        return 0.0
    else:
        a = rows.place
        b = columns.place
        return squared_distances(
            a[0][:, None], a[1][:, None], a[2][:, None], b[0][None, :], b[1][None, :], b[2][None, :], FORM
        )


@triton.jit
def logits_by_token(tokens, groups, k_tile, q_tile, x, work, sizes, FORM: tl.constexpr):
    """Logits (tokens, groups), -inf where a token does not see a group.

    Tokens that take no part have logits too; their normalisers are +inf, which leaves nothing of them.
    """
    c = tokens.cell
    j = groups.cell
    visible, entry = window_entry(
        c[0][:, None], c[1][:, None], c[2][:, None], j[0][None, :], j[1][None, :], j[2][None, :], FORM
    )
    visible = visible & groups.takes_part[None, :]
    return logits(k_tile, q_tile, visible, entry, squares_between(tokens, groups, x, FORM), x, work, sizes, FORM)


@triton.jit
def logits_by_group(tokens, groups, q_tile, k_tile, x, work, sizes, FORM: tl.constexpr):
    """The same with groups first."""
    c = tokens.cell
    j = groups.cell
    visible, entry = window_entry(
        c[0][None, :], c[1][None, :], c[2][None, :], j[0][:, None], j[1][:, None], j[2][:, None], FORM
    )
    visible = visible & groups.takes_part[:, None]
    return logits(q_tile, k_tile, visible, entry, squares_between(groups, tokens, x, FORM), x, work, sizes, FORM)


@triton.jit
def logits(rows, columns, visible, entry, squares, x, work, sizes, FORM: tl.constexpr):
    """Scaled products of rows and columns, with what the bias table adds and compactness takes off."""
    scores = tl.dot(rows, tl.trans(columns), input_precision=FORM.precision) * sizes.scale
    if x.bias is not None:
        scores += tl.load(x.bias + work.head * FORM.window + entry, mask=visible, other=0.0).to(tl.float32)
    if x.compactness is not None:
        scores -= work.compactness * squares
    return tl.where(visible, scores, -float("inf"))
