"""How a volume is cut: into tiles that a network sees, and blocks of tiles that a process works on.

Tiles of an axis stand at regular places, ``stride = tile - 2 * halo`` apart, and overlap by ``2 * halo``, a quarter of
a tile. Tile k answers for its middle, the voxels from ``k * stride`` to ``(k + 1) * stride``, and is blended with its
neighbours as far as a halo beyond it. Where it would leave the volume it is pushed back into it, so a network never
sees a voxel that is not there; what is taken from it stays the same.

A block owns the middles of a whole number of tiles. Blocks share neither voxels nor tiles, so they can be worked on
anywhere and in any order, and nothing is computed twice. Tiles of different blocks are not blended with each other:
within a halo of a border between blocks a voxel has its label from one side only. Everywhere else it has, to the last
bit, what it would have in a volume of one block.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Window = tuple[slice, ...]

ALIGNED = 8  # voxels: tiles of 16 and more are multiples, so that strides of a network divide them


class Tile(NamedTuple):
    """What a network sees at once."""

    window: Window
    """Its voxels, within the volume."""
    used: Window
    """Those of them that count."""


class Block(NamedTuple):
    """What a process works on at once."""

    owned: Window
    """Voxels whose labels it finds."""
    window: Window
    """Voxels that it looks at: those of all of its tiles."""
    tiles: list[Tile]


class Span(NamedTuple):
    """A tile along one axis."""

    start: int
    low: int
    high: int


@dataclass(frozen=True)
class Row:
    """Tiles along one axis."""

    length: int
    tile: int
    per_block: int

    @property
    def halo(self) -> int:
        """As far as a tile is blended beyond its middle; a tile as long as the axis has no neighbours."""
        return 0 if self.tile >= self.length else (self.tile + 3) // 8

    @property
    def stride(self) -> int:
        """From tile to tile."""
        return self.tile - 2 * self.halo

    @property
    def tiles(self) -> int:
        """How many there are."""
        return -(-self.length // self.stride)

    @property
    def blocks(self) -> int:
        """How many there are."""
        return -(-self.tiles // self.per_block)

    def owned(self, block: int) -> slice:
        """The voxels of a block."""
        extent = self.per_block * self.stride
        return slice(block * extent, min((block + 1) * extent, self.length))

    def spans(self, block: int) -> list[Span]:
        """The tiles of a block; where two are pushed to the same place, one."""
        spans: list[Span] = []
        for k in range(block * self.per_block, min((block + 1) * self.per_block, self.tiles)):
            low, high = k * self.stride - self.halo, (k + 1) * self.stride + self.halo
            span = Span(min(max(low, 0), self.length - self.tile), max(low, 0), min(high, self.length))
            if spans and spans[-1].start == span.start:
                span = spans.pop()._replace(high=span.high)
            spans.append(span)
        return spans


@dataclass(frozen=True)
class Blocks:
    """All blocks of a volume.

    Args:
        size: voxels of the volume, per axis.
        tile: voxels that the network sees at once, per axis; not more than there are.
        per_block: tiles of a block, per axis.
    """

    size: tuple[int, ...]
    tile: tuple[int, ...]
    per_block: tuple[int, ...]

    @classmethod
    def single(cls, size: Sequence[int], tile: Sequence[int]) -> Blocks:
        """The volume as one block."""
        return cls(tuple(size), tuple(tile), tuple(size))

    @property
    def rows(self) -> tuple[Row, ...]:
        """Axis by axis."""
        return tuple(Row(*row) for row in zip(self.size, self.tile, self.per_block, strict=True))

    @property
    def grid(self) -> tuple[int, ...]:
        """Numbers of blocks, per axis."""
        return tuple(row.blocks for row in self.rows)

    @property
    def stride(self) -> tuple[int, ...]:
        """From tile to tile, per axis."""
        return tuple(row.stride for row in self.rows)

    @property
    def extent(self) -> tuple[int, ...]:
        """Voxels that a block owns, per axis, where it does not end with the volume."""
        return tuple(row.per_block * row.stride for row in self.rows)

    @property
    def looked_at(self) -> tuple[int, ...]:
        """Voxels that a block looks at, per axis, at most."""
        return tuple(min(row.per_block * row.stride + 2 * row.halo, row.length) for row in self.rows)

    def __len__(self) -> int:
        return math.prod(self.grid)

    def place(self, number: int) -> tuple[int, ...]:
        """Where a block is in the grid of blocks; the last axis counts fastest."""
        places = []
        for n in reversed(self.grid):
            number, place = divmod(number, n)
            places.append(place)
        return tuple(reversed(places))

    def __getitem__(self, number: int) -> Block:
        if not 0 <= number < len(self):
            raise IndexError(f"number must be from 0 to {len(self) - 1}; got {number}")
        rows, place = self.rows, self.place(number)
        owned = tuple(row.owned(at) for row, at in zip(rows, place, strict=True))
        spans = [row.spans(at) for row, at in zip(rows, place, strict=True)]
        tiles = []
        for combination in itertools.product(*spans):
            window = tuple(slice(s.start, s.start + row.tile) for s, row in zip(combination, rows, strict=True))
            used = tuple(
                slice(max(s.low, own.start), min(s.high, own.stop)) for s, own in zip(combination, owned, strict=True)
            )
            tiles.append(Tile(window, used))
        window = tuple(slice(axis[0].start, axis[-1].start + row.tile) for axis, row in zip(spans, rows, strict=True))
        return Block(owned, window, tiles)


def tile_shape(size: Sequence[int], spacing: Sequence[float], largest: int) -> tuple[int, ...]:
    """A tile of at most ``largest`` voxels that is about as long in all directions, in physical units.

    Where the volume is shorter than that the tile has its length, and is longer along other axes. Where as many smaller
    tiles do, they are smaller.
    """
    if math.prod(size) <= largest:
        return tuple(size)

    def lengths(edge: float) -> list[float]:
        return [min(max(edge / step, 1.0), float(n)) for step, n in zip(spacing, size, strict=True)]

    # The longest edge, in physical units, with which there are not too many: they never become fewer as it grows.
    low, high = min(spacing), max(n * step for n, step in zip(size, spacing, strict=True))
    for _ in range(64):
        edge = math.sqrt(low * high)
        low, high = (edge, high) if math.prod(lengths(edge)) <= largest else (low, edge)
    tile = [math.floor(length + 1e-9) for length in lengths(low)]
    for axis, length in enumerate(tile):
        if length < size[axis] and length >= 2 * ALIGNED:
            tile[axis] = length // ALIGNED * ALIGNED
        number = Row(size[axis], tile[axis], 1).tiles
        while 2 * ALIGNED < tile[axis] < size[axis] and Row(size[axis], tile[axis] - ALIGNED, 1).tiles == number:
            tile[axis] -= ALIGNED
    return tuple(tile)


def grow(
    size: Sequence[int], tile: Sequence[int], spacing: Sequence[float], fits: Callable[[Blocks], bool]
) -> Blocks | None:
    """The largest blocks that fit: tile by tile, along the axis where a block is shortest in physical units.

    Args:
        fits: told blocks; says whether one of them can be worked on.

    Returns:
        None where not even one tile fits.
    """
    blocks = Blocks(tuple(size), tuple(tile), (1,) * len(size))
    if not fits(blocks):
        return None
    while True:
        short = [axis for axis, n in enumerate(blocks.grid) if n > 1]
        extent = blocks.extent
        for axis in sorted(short, key=lambda axis: extent[axis] * spacing[axis]):
            more = tuple(n + (i == axis) for i, n in enumerate(blocks.per_block))
            if fits(larger := Blocks(blocks.size, blocks.tile, more)):
                blocks = larger
                break
        else:
            return blocks
