"""Tiles of cells with their halo of groups: the data movement under the windowed operators.

Along each axis the groups are cut into tiles of ``T`` cells. A tile holds ``P`` fine tokens (those its cells own)
and the ``Q`` groups that any of them sees: its own cells and a halo of ``reach`` cells on both sides. Because a
token's whole window lies in its tile, its softmax is finished there; what a group receives is the sum over the
few tiles whose halos overlap it. In N dimensions a tile is the product of its axes.

Tiles are worked through in chunks small enough to stay in the processor's cache, which on a CPU is worth more
than any arithmetic trick: freshly mapped pages cost more than the two small matrix products.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..geometry import Neighbourhood
from ..geometry.axis import Axis

# A tile wants at least this many fine tokens per axis, or its matrix products are too small to be efficient;
# larger tiles spend more on groups that most of their tokens cannot see. Of 1 to 32, this was the best or close to it
# in 1-D, 2-D and 3-D, with strides 1 to 4 and windows 3 to 9.
TOKENS_PER_AXIS = 4

# Elements of one chunk's logits and operands together: about 4 MB in float32 on a CPU; on a GPU enough to fill it.
CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}


@dataclass(frozen=True)
class AxisTiles:
    """The tiles of one axis: their number, extent, and index tables of (num, P) tokens and (num, Q) groups."""

    axis: Axis
    device: torch.device

    @property
    def cells(self) -> int:
        """Cells per tile, T; the whole axis where the halo would cover it anyway."""
        cells = -(-TOKENS_PER_AXIS // self.axis.stride)
        return self.axis.groups if cells + self.axis.reach >= self.axis.groups else cells

    @property
    def num(self) -> int:
        """Number of tiles."""
        return -(-self.axis.groups // self.cells)

    @property
    def halo(self) -> int:
        """Groups added on either side of a tile's own cells."""
        return 0 if self.num == 1 else self.axis.reach

    @property
    def groups_per_tile(self) -> int:
        """Q."""
        return self.cells + 2 * self.halo

    def block(self, first: int, last: int) -> tuple[int, int]:
        """Half-open interval of the fine indices of the tiles ``first .. last - 1``."""
        return self.axis.block(first * self.cells, last * self.cells - 1)

    @cached_property
    def tokens_per_tile(self) -> int:
        """P; border tiles can own a few more tokens than the others."""
        inner = min(self.cells * self.axis.stride, self.axis.size)
        return max(inner, *(stop - start for start, stop in (self.block(t, t + 1) for t in (0, self.num - 1))))

    @cached_property
    def starts(self) -> Tensor:
        """First fine index of every tile, (num,)."""
        cells = torch.arange(self.num, device=self.device) * self.cells
        starts = (self.axis.offset + cells * self.axis.stride).clamp(0, self.axis.size)
        starts[0] = 0
        return starts

    @cached_property
    def stops(self) -> Tensor:
        """Fine index behind every tile, (num,)."""
        return torch.cat((self.starts[1:], self.starts.new_tensor([self.axis.size])))

    @cached_property
    def tokens(self) -> Tensor:
        """Fine index of every slot, clamped into the axis, (num, P)."""
        slots = torch.arange(self.tokens_per_tile, device=self.device)
        return (self.starts[:, None] + slots).clamp(max=self.axis.size - 1)

    @cached_property
    def groups(self) -> Tensor:
        """Group of every slot, clamped into the axis, (num, Q)."""
        return (self.padded_groups - self.halo).clamp(0, self.axis.groups - 1)

    @cached_property
    def padded_groups(self) -> Tensor:
        """Position of every group slot on the axis with its halo, (num, Q)."""
        tiles = torch.arange(self.num, device=self.device) * self.cells
        return tiles[:, None] + torch.arange(self.groups_per_tile, device=self.device)

    @property
    def padded_size(self) -> int:
        """Length of the axis of groups with its halo, rounded up to whole tiles as :func:`fold` makes it."""
        return (self.num - 1 - (-self.groups_per_tile // self.cells)) * self.cells

    @cached_property
    def distance(self) -> Tensor:
        """Group minus the token's own cell, (num, P, Q)."""
        axis = self.axis
        cells = ((self.tokens - axis.offset).div(axis.stride, rounding_mode="floor")).clamp(0, axis.groups - 1)
        return (self.padded_groups - self.halo)[:, None, :] - cells[:, :, None]

    @cached_property
    def visible(self) -> Tensor:
        """Whether the slot's token exists and sees the slot's group, (num, P, Q)."""
        axis = self.axis
        slots = self.starts[:, None] + torch.arange(self.tokens_per_tile, device=self.device)
        group = self.padded_groups - self.halo
        within = (self.distance.abs() <= axis.reach) & (self.distance % axis.dilation == 0)
        exists = (group >= 0) & (group < axis.groups)
        return within & exists[:, None, :] & (slots < self.stops[:, None])[:, :, None]

    @cached_property
    def window_entry(self) -> Tensor:
        """Entry of a window-long table that each pair reads, (num, P, Q)."""
        entry = self.distance.div(self.axis.dilation, rounding_mode="floor") + self.axis.radius
        return entry.clamp(0, self.axis.window - 1)

    @cached_property
    def slot_of_token(self) -> tuple[Tensor, Tensor]:
        """Tile and slot of every fine index, (size,) each."""
        index = torch.arange(self.axis.size, device=self.device)
        tile = torch.searchsorted(self.stops, index, right=True)
        return tile, index - self.starts[tile]


@dataclass(frozen=True)
class Tiling:
    """All tiles of a neighbourhood, and the chunks they are worked through in."""

    neighbourhood: Neighbourhood
    device: torch.device

    @cached_property
    def axes(self) -> tuple[AxisTiles, ...]:
        """The tiles of each axis on its own."""
        return tuple(AxisTiles(axis, self.device) for axis in self.neighbourhood.axes)

    @property
    def padded_shape(self) -> tuple[int, ...]:
        """Shape of the grid of groups with its halo: where sums over tiles are collected."""
        return tuple(axis.padded_size for axis in self.axes)

    def crop(self, padded: Tensor) -> Tensor:
        """(B, H, *padded_shape, C) collected sums -> (B, H, N_out, C)."""
        inner = tuple(slice(a.halo, a.halo + a.axis.groups) for a in self.axes)
        return padded[(slice(None), slice(None), *inner)].flatten(2, -2).contiguous()

    def chunks(self, batch: int, heads: int, channels: int, *, split_heads: bool = True) -> Iterator[Chunk]:
        """Cut the work along the first axis' tiles, heads and batch into cache-sized chunks."""
        tokens = math.prod(a.tokens_per_tile for a in self.axes)
        groups = math.prod(a.groups_per_tile for a in self.axes)
        row = math.prod(a.num for a in self.axes[1:]) * (tokens * groups + (tokens + groups) * channels)
        budget = CHUNK_ELEMENTS.get(self.device.type, CHUNK_ELEMENTS["cpu"])
        # All heads and all samples share a chunk's index tables, so those are merged before rows are.
        per_head = max(1, min(heads, budget // row)) if split_heads else heads
        per_batch = max(1, min(batch, budget // (row * heads))) if per_head == heads else 1
        rows = max(1, budget // (row * per_head * per_batch))
        for first in range(0, self.axes[0].num, rows):
            tables = ChunkTables(self, first, min(first + rows, self.axes[0].num))
            for b in range(0, batch, per_batch):
                for h in range(0, heads, per_head):
                    yield Chunk(tables, slice(b, min(b + per_batch, batch)), slice(h, min(h + per_head, heads)))


class ChunkTables:
    """Flat index tables of a run of the first axis' tiles, shared by all samples and heads."""

    def __init__(self, tiling: Tiling, first: int, last: int) -> None:
        """Tiles ``first .. last - 1`` of the first axis, all tiles of the others."""
        self.tiling, self.first, self.last = tiling, first, last
        self.axes = tiling.axes
        self.num = tuple(last - first if a == 0 else axis.num for a, axis in enumerate(self.axes))
        self.tokens_per_tile = math.prod(axis.tokens_per_tile for axis in self.axes)
        self.groups_per_tile = math.prod(axis.groups_per_tile for axis in self.axes)
        # A run of tiles of the first axis owns a run of its fine indices, so a whole slab of fine tokens.
        start, stop = self.axes[0].block(first, last)
        row = math.prod(axis.axis.size for axis in self.axes[1:])
        self.slab = slice(start * row, stop * row)
        self.token_rows = slice(start, stop)

    def _rows(self, axis: int, table: Tensor) -> Tensor:
        return table[self.first : self.last] if axis == 0 else table

    def _product(self, name: str, sizes: tuple[int, ...]) -> Tensor:
        """Row-major flat index from the axes' (num, slots) tables: (tiles * slots,)."""
        n = len(self.axes)
        flat = torch.zeros((), dtype=torch.long, device=self.tiling.device)
        for a, axis in enumerate(self.axes):
            table = self._rows(a, getattr(axis, name))
            shape = [1] * (2 * n)
            shape[a], shape[n + a] = table.shape
            flat = flat * sizes[a] + table.view(shape)
        return flat.flatten()

    @cached_property
    def tokens(self) -> Tensor:
        """Fine token of every slot, (tiles * P,)."""
        return self._product("tokens", self.tiling.neighbourhood.input_shape)

    @cached_property
    def groups(self) -> Tensor:
        """Group of every slot, (tiles * Q,)."""
        return self._product("groups", self.tiling.neighbourhood.output_shape)

    @cached_property
    def padded_groups(self) -> Tensor:
        """Position of every group slot in the padded grid, (tiles * Q,)."""
        return self._product("padded_groups", self.tiling.padded_shape)

    def _pairs(self, name: str) -> Iterator[Tensor]:
        """The axes' (num, P, Q) tables, each shaped to broadcast to (*num, *P, *Q)."""
        n = len(self.axes)
        for a, axis in enumerate(self.axes):
            table = self._rows(a, getattr(axis, name))
            shape = [1] * (3 * n)
            shape[a], shape[n + a], shape[2 * n + a] = table.shape
            yield table.view(shape)

    @cached_property
    def hidden(self) -> Tensor:
        """True where a pair is not visible, (tiles, P, Q)."""
        visible = torch.ones((), dtype=torch.bool, device=self.tiling.device)
        for table in self._pairs("visible"):
            visible = visible & table
        return ~visible.reshape(-1, self.tokens_per_tile, self.groups_per_tile)

    @cached_property
    def window_entry(self) -> Tensor:
        """Entry of a flattened window table that each pair reads, (tiles, P, Q)."""
        entry = torch.zeros((), dtype=torch.long, device=self.tiling.device)
        for axis, table in zip(self.axes, self._pairs("window_entry"), strict=True):
            entry = entry * axis.axis.window + table
        return entry.reshape(-1, self.tokens_per_tile, self.groups_per_tile)

    @cached_property
    def slot_of_token(self) -> Tensor:
        """Where every fine token of the slab lies in the chunk, (slab size,)."""
        n = len(self.axes)
        tile = slot = torch.zeros((), dtype=torch.long, device=self.tiling.device)
        for a, axis in enumerate(self.axes):
            tiles, slots = axis.slot_of_token
            if a == 0:
                tiles, slots = tiles[self.token_rows] - self.first, slots[self.token_rows]
            shape = [1] * n
            shape[a] = -1
            tile = tile * self.num[a] + tiles.view(shape)
            slot = slot * axis.tokens_per_tile + slots.view(shape)
        return (tile * self.tokens_per_tile + slot).flatten()


@dataclass(frozen=True)
class Chunk:
    """A run of tiles for some samples and heads: loads operands tile by tile and puts results back."""

    tables: ChunkTables
    batch: slice
    heads: slice

    def load_tokens(self, x: Tensor) -> Tensor:
        """(B, H, N_in, C) -> (b, h, tiles, P, C); without C -> (b, h, tiles, P)."""
        x = x[self.batch, self.heads][:, :, self.tables.tokens]
        return _split(x, 2, -1, self.tables.tokens_per_tile)

    def load_groups(self, x: Tensor) -> Tensor:
        """(B, H, N_out, C) -> (b, h, tiles, Q, C); without C -> (b, h, tiles, Q)."""
        x = x[self.batch, self.heads][:, :, self.tables.groups]
        return _split(x, 2, -1, self.tables.groups_per_tile)

    def store_tokens(self, out: Tensor, tiles: Tensor) -> None:
        """Write (b, h, tiles, P[, C]) to its tokens of ``out`` (B, H, N_in[, C]; H may be 1 for all heads)."""
        heads = slice(None) if out.shape[1] == 1 else self.heads
        out[self.batch, heads, self.tables.slab] = tiles.flatten(2, 3)[:, :, self.tables.slot_of_token]

    def collect(self, sums: Tensor, tiles: Tensor) -> None:
        """Add (b, h, tiles, Q, C) to the padded sums (B, H, *padded_shape, C)."""
        folded = self.fold(tiles)
        self.slab_of_groups(sums, folded.shape[2]).add_(folded)

    def slab_of_groups(self, sums: Tensor, rows: int) -> Tensor:
        """The rows of padded sums that this chunk's tiles touch, as a view."""
        start = self.tables.first * self.tables.axes[0].cells
        return sums[self.batch, self.heads, start : start + rows]

    def load_padded(self, sums: Tensor) -> Tensor:
        """(B, H, *padded_shape) -> (b, h, tiles, Q)."""
        flat = sums[self.batch, self.heads].flatten(2)[:, :, self.tables.padded_groups]
        return _split(flat, 2, -1, self.tables.groups_per_tile)

    def fold(self, tiles: Tensor, *, maximum: bool = False) -> Tensor:
        """Overlap-add (or overlap-max) tiles (b, h, tiles, Q, C) to (b, h, *padded rows, C)."""
        axes = self.tables.axes
        sizes = [axis.groups_per_tile for axis in axes]
        x = tiles.reshape(*tiles.shape[:2], *self.tables.num, *sizes, tiles.shape[-1])
        for a in reversed(range(len(axes))):
            x = _fold_axis(x, 2 + a, 2 + len(axes) + a, axes[a].cells, maximum)
        return x


def _fold_axis(x: Tensor, tile_dim: int, slot_dim: int, cells: int, maximum: bool) -> Tensor:
    """Merge an axis of tiles with its axis of slots: tile t's slot q lands on ``t * cells + q``.

    The slots are cut into stretches of ``cells``; each stretch of all tiles lands on disjoint positions, so a
    handful of shifted additions does it all, deterministically.
    """
    tiles, slots = x.shape[tile_dim], x.shape[slot_dim]
    stretches = -(-slots // cells)
    x = x.movedim(slot_dim, tile_dim + 1)
    shape = [*x.shape[:tile_dim], (tiles + stretches - 1) * cells, *x.shape[tile_dim + 2 :]]
    folded = x.new_full(shape, -torch.inf) if maximum else x.new_zeros(shape)
    for i in range(stretches):
        part = x.narrow(tile_dim + 1, i * cells, min(cells, slots - i * cells))
        target = _split(folded.narrow(tile_dim, i * cells, tiles * cells), tile_dim, tiles, cells)
        target = target.narrow(tile_dim + 1, 0, part.shape[tile_dim + 1])
        if maximum:
            torch.maximum(target, part, out=target)
        else:
            target.add_(part)
    return folded


def _split(x: Tensor, dim: int, *sizes: int) -> Tensor:
    """``x.unflatten(dim, sizes)``: a view with one axis cut into several."""
    parts: Tensor = torch.unflatten(x, dim, sizes)
    return parts
