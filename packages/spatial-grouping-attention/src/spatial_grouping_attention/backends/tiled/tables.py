"""Index tables of a grid cut into tiles, remembered for every geometry.

A *run* is a stretch of the first axis' tiles with all tiles of the others. Its tables count from the run's own first
token and group, so all runs inside of the grid share one set, and what is kept is as large as a chunk of work, not as
the grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...geometry import Neighbourhood, remembered
from .axis_tiles import AxisTiles, cut


@dataclass(frozen=True, eq=False)
class Tables:
    """Where the slots of a run's tiles lie, as flat indices; T tiles of P tokens and Q groups."""

    tiles: tuple[int, ...]
    """Tiles along each axis; their product is T."""
    tokens: Tensor
    """Token of every slot, counted from the run's first, (T * P,)."""
    groups: Tensor
    """Group of every slot, counted from the run's first and clamped into the grid, (T * Q,)."""
    padded_groups: Tensor
    """Position of every group slot in the run's rows of padded sums, (T * Q,)."""
    slot_of_token: Tensor
    """Slot of every token of the run, (tokens of the run,)."""
    hidden: Tensor
    """True where a slot's token does not see a slot's group, (T, P, Q)."""
    window_entry: Tensor
    """Entry of a flattened window table that each pair reads, (T, P, Q) int32."""
    squares: Tensor | None
    """Squared distance of each pair in units of the group spacing, (T, P, Q), where it was asked for."""


@dataclass(frozen=True, eq=False)
class Run:
    """A stretch of the first axis' tiles: which tokens and groups it works on, and its tables."""

    tokens: slice
    """The run's tokens are a stretch of all tokens."""
    groups: slice
    """Groups that hold all that any token of the run sees."""
    padded_rows: slice
    """Rows of padded sums that the run's tiles touch."""
    tables: Tables


@dataclass(frozen=True, eq=False)
class Tiling:
    """A grid cut into tiles, axis by axis."""

    axes: tuple[AxisTiles, ...]
    tokens_per_tile: int
    """P, over all axes."""
    groups_per_tile: int
    """Q, over all axes."""
    group_slots: tuple[int, ...]
    """Groups per tile along each axis; their product is Q."""
    padded_shape: tuple[int, ...]
    """Shape of the grid of groups with its halo: where sums over tiles are collected."""
    inner: tuple[slice, ...]
    """The groups themselves within the padded shape."""

    def crop(self, padded: Tensor) -> Tensor:
        """(B, H, *padded_shape, C) collected sums -> a view of them, (B, H, *groups, C)."""
        return padded[(slice(None), slice(None), *self.inner)]


@remembered(256)
def tiling_of(neighbourhood: Neighbourhood, tokens_per_axis: int) -> Tiling:
    """Cut a neighbourhood's grid into tiles of about ``tokens_per_axis`` fine tokens along every axis."""
    axes = tuple(cut(axis, tokens_per_axis) for axis in neighbourhood.axes)
    return Tiling(
        axes,
        tokens_per_tile=math.prod(axis.tokens_per_tile for axis in axes),
        groups_per_tile=math.prod(axis.groups_per_tile for axis in axes),
        group_slots=tuple(axis.groups_per_tile for axis in axes),
        padded_shape=tuple(axis.padded_size for axis in axes),
        inner=tuple(slice(axis.halo, axis.halo + axis.axis.groups) for axis in axes),
    )


@remembered(32)
def runs_of(
    neighbourhood: Neighbourhood,
    tokens_per_axis: int,
    rows: int,
    device: torch.device,
    squares: torch.dtype | None = None,
) -> tuple[Run, ...]:
    """The runs of ``rows`` tiles along the first axis that make up a grid, with tables on a device.

    ``squares`` is the type in which squared distances are wanted, None where they are not.
    """
    first_axis, *others = tiling_of(neighbourhood, tokens_per_axis).axes
    row_of_tokens = math.prod(axis.axis.size for axis in others)
    row_of_groups = math.prod(axis.axis.groups for axis in others)
    shared: dict[tuple[tuple[float, ...], ...], Tables] = {}
    runs = []
    for first in range(0, first_axis.num, rows):
        stretch = first_axis.stretch(first, min(first + rows, first_axis.num))
        if stretch.num_tokens == 0:  # all its cells lie outside of the grid of tokens
            continue
        key = _fingerprint(stretch)
        if key not in shared:
            shared[key] = _tables((stretch, *others), device, squares)
        token, group = int(first_axis.starts[first]), int(first_axis.groups[first].min())
        runs.append(
            Run(
                slice(token * row_of_tokens, (token + stretch.num_tokens) * row_of_tokens),
                slice(group * row_of_groups, (group + stretch.num_groups) * row_of_groups),
                slice(first * first_axis.cells, first * first_axis.cells + stretch.padded_size),
                shared[key],
            )
        )
    return tuple(runs)


def _fingerprint(axis: AxisTiles) -> tuple[tuple[float, ...], ...]:
    """Equal where all tables are."""
    tables = (axis.starts, axis.tokens, axis.groups, axis.visible, axis.window_entry, axis.squares)
    return tuple([tuple(table.flatten().tolist()) for table in tables])


def _tables(axes: Sequence[AxisTiles], device: torch.device, squares: torch.dtype | None) -> Tables:
    tiles = tuple(axis.num for axis in axes)
    visible = torch.ones((), dtype=torch.bool, device="cpu")
    entry = torch.zeros((), dtype=torch.int32, device="cpu")
    for number, axis in enumerate(axes):
        visible = visible & _along(axis.visible, number, len(axes))
        entry = entry * axis.axis.window + _along(axis.window_entry, number, len(axes))
    pairs = (-1, math.prod(a.tokens_per_tile for a in axes), math.prod(a.groups_per_tile for a in axes))
    return Tables(
        tiles,
        _flat_index([a.tokens for a in axes], [a.num_tokens for a in axes]).to(device),
        _flat_index([a.groups for a in axes], [a.num_groups for a in axes]).to(device),
        _flat_index([a.padded_groups for a in axes], [a.padded_size for a in axes]).to(device),
        _slot_of_token(axes).to(device),
        visible.logical_not().reshape(pairs).to(device),
        entry.to(torch.int32).reshape(pairs).to(device),
        None if squares is None else _squares(axes).reshape(pairs).to(squares).to(device),
    )


def _squares(axes: Sequence[AxisTiles]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    for number, axis in enumerate(axes):
        total = total + _along(axis.squares, number, len(axes))
    return total


def _along(table: Tensor, axis: int, ndim: int) -> Tensor:
    """An axis' (num, slots, ...) table, shaped to broadcast to (*tiles, *slots, ...) of all axes."""
    shape = [1] * (table.ndim * ndim)
    for kind, size in enumerate(table.shape):
        shape[kind * ndim + axis] = size
    return table.view(shape)


def _flat_index(tables: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Row-major flat index from the axes' (num, slots) tables, tile by tile: (tiles * slots,)."""
    flat = torch.zeros((), dtype=torch.long, device="cpu")
    for axis, (table, size) in enumerate(zip(tables, sizes, strict=True)):
        flat = flat * size + _along(table, axis, len(tables))
    return flat.flatten()


def _slot_of_token(axes: Sequence[AxisTiles]) -> Tensor:
    tile = slot = torch.zeros((), dtype=torch.long, device="cpu")
    for number, axis in enumerate(axes):
        index = torch.arange(axis.num_tokens, device="cpu")
        tiles = torch.searchsorted(axis.starts[1:].contiguous(), index, right=True)
        tile = tile * axis.num + _along(tiles, number, len(axes))
        slot = slot * axis.tokens_per_tile + _along(index - axis.starts[tiles], number, len(axes))
    return (tile * math.prod(axis.tokens_per_tile for axis in axes) + slot).flatten()
