"""The tiles of one axis: how many, how large, and which token and group every slot of them stands for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...geometry.axis import Axis


@dataclass(frozen=True, eq=False)
class AxisTiles:
    """Tiles of one axis as numbers, and as index tables with a row for every tile (on the CPU).

    A stretch of an axis' tiles (:meth:`stretch`) is one again, with indices that count from its own first token, group
    and padded position.
    """

    axis: Axis
    cells: int
    """Cells per tile, T."""
    num: int
    """Number of tiles."""
    halo: int
    """Groups added on either side of a tile's own cells; 0 where one tile has them all."""
    tokens_per_tile: int
    """P; border tiles can own a few more tokens than the others."""
    groups_per_tile: int
    """Q."""
    padded_size: int
    """Length of the axis of groups with its halo, rounded up to whole tiles: where sums over tiles are collected."""
    starts: Tensor
    """First fine index of every tile, and the one behind the last tile's, (num + 1,)."""
    tokens: Tensor
    """Fine index of every slot, clamped into the axis, (num, P)."""
    groups: Tensor
    """Group of every slot, clamped into the axis, (num, Q)."""
    padded_groups: Tensor
    """Position of every group slot on the padded axis, (num, Q)."""
    visible: Tensor
    """Whether the slot's token exists and sees the slot's group, (num, P, Q)."""
    window_entry: Tensor
    """Entry of a window-long table that each pair reads, (num, P, Q)."""
    squares: Tensor
    """Squared distance of each pair in units of the group spacing, (num, P, Q) in float64."""

    @property
    def num_tokens(self) -> int:
        """Fine tokens of all tiles."""
        return int(self.starts[-1])

    @property
    def num_groups(self) -> int:
        """Groups that the tiles see: an interval, because their cells are one."""
        return int(self.groups.max()) + 1

    def stretch(self, first: int, last: int) -> AxisTiles:
        """The tiles ``first .. last - 1``."""
        token, group = self.starts[first], self.groups[first:last].min()
        starts = self.starts[first : last + 1] - token
        return replace(
            self,
            num=last - first,
            padded_size=_padded_size(last - first, self.cells, self.groups_per_tile),
            starts=starts,
            # Slots without a token, behind a tile's own, may name any token of the stretch.
            tokens=(self.tokens[first:last] - token).clamp(max=max(int(starts[-1]) - 1, 0)),
            groups=self.groups[first:last] - group,
            padded_groups=self.padded_groups[first:last] - self.padded_groups[first, 0],
            visible=self.visible[first:last],
            window_entry=self.window_entry[first:last],
            squares=self.squares[first:last],
        )


def cut(axis: Axis, tokens_per_axis: int) -> AxisTiles:
    """Cut an axis into tiles of at least ``tokens_per_axis`` tokens; into one where its halo would reach everywhere."""
    cells = -(-tokens_per_axis // axis.stride)
    if cells + axis.reach >= axis.groups:
        cells = axis.groups
    num = -(-axis.groups // cells)
    halo = 0 if num == 1 else axis.reach
    groups_per_tile = cells + 2 * halo

    first_cells = torch.arange(num + 1, device="cpu") * cells
    starts = (axis.offset + first_cells * axis.stride).clamp(0, axis.size)
    starts[0], starts[-1] = 0, axis.size
    tokens_per_tile = int(starts.diff().max())
    slots = starts[:-1, None] + torch.arange(tokens_per_tile, device="cpu")
    tokens = slots.clamp(max=axis.size - 1)
    padded_groups = first_cells[:-1, None] + torch.arange(groups_per_tile, device="cpu")
    groups = padded_groups - halo

    cell_of_token = (tokens - axis.offset).div(axis.stride, rounding_mode="floor").clamp(0, axis.groups - 1)
    distance = groups[:, None, :] - cell_of_token[:, :, None]
    within = (distance.abs() <= axis.reach) & (distance % axis.dilation == 0)
    there = (groups >= 0) & (groups < axis.groups)
    exists = slots < starts[1:, None]
    apart = (tokens[:, :, None].double() - axis.centre - axis.stride * groups[:, None, :]) / axis.stride
    entry = distance.div(axis.dilation, rounding_mode="floor") + axis.radius
    return AxisTiles(
        axis,
        cells,
        num,
        halo,
        tokens_per_tile,
        groups_per_tile,
        padded_size=_padded_size(num, cells, groups_per_tile),
        starts=starts,
        tokens=tokens,
        groups=groups.clamp(0, axis.groups - 1),
        padded_groups=padded_groups,
        visible=within & there[:, None, :] & exists[:, :, None],
        window_entry=entry.clamp(0, axis.window - 1),
        squares=apart.square(),
    )


def _padded_size(num: int, cells: int, groups_per_tile: int) -> int:
    return (num - 1 - (-groups_per_tile // cells)) * cells
