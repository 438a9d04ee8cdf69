"""A call as the kernels take it: addresses of tensors, the relation on three axes, and the items of work."""

from __future__ import annotations

import itertools
import math
import typing
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...geometry import Neighbourhood, remembered
from ..operands import Operands
from ..semantics import widened
from .bundles import Bytes, Call, Floats, Geometry, Integers, Room, Rows, Work
from .simd import BYTES
from .structures import address, in_memory

# Rows of groups along the first axis whose sums are one number of partial sums: not a matter of threads, so that
# results are not either.
ROWS_PER_SUM = 8

# Items of work for every thread, where the grid is large enough, so that all end at about the same time.
ITEMS_PER_THREAD = 2

# An item looks at cells whose groups are another item's; they should be few beside its own.
ROWS_PER_HALO = 8

# Operations of a pass below which starting a thread costs more than it gains.
WORTH_A_THREAD = 2**19


@remembered(1024)
def geometry_of(neighbourhood: Neighbourhood) -> Geometry:
    """The relation on three axes; windows are cut to what there is of the grid."""
    axes = neighbourhood.axes
    # Where an axis of the kernels comes from; None where there is none.
    places: tuple[int | None, ...] = {1: (0, None, None), 2: (0, None, 1), 3: (0, 1, 2)}[len(axes)]

    def column(of_axis: Any, missing: int) -> tuple[int, int, int]:
        a, b, c = (missing if i is None else int(of_axis(axes[i])) for i in places)
        return a, b, c

    return Geometry(
        column(lambda axis: axis.size, 1),
        column(lambda axis: axis.groups, 1),
        column(lambda axis: axis.stride, 1),
        column(lambda axis: axis.offset, 0),
        column(lambda axis: 2 * axis.centre, 0),
        column(lambda axis: axis.dilation, 1),
        column(lambda axis: min(axis.radius, (axis.groups - 1) // axis.dilation), 0),
        column(lambda axis: axis.radius, 0),
    )


def floats(x: Tensor | None) -> Floats:
    """The address of a tensor's first element."""
    return Floats(0 if x is None or x.numel() == 0 else x.data_ptr())


def rows_of(x: Tensor) -> Rows:
    """Rows (B, H, N, C), whose channels lie one after the other."""
    return Rows(floats(x), x.stride(0), x.stride(1), x.stride(2), x.shape[3])


def readable(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows in a floating type, with channels one after the other: copied only where they are not."""
    x = x.detach().to(dtype)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


class Kept(NamedTuple):
    """Operands as kernels read them; their memory must live as long as the call."""

    q: Tensor
    k: Tensor
    values: Tensor
    scale: Tensor
    bias: Tensor | None
    compactness: Tensor | None
    valid: Tensor | None
    valid_groups: Tensor | None


def kept(x: Operands) -> Kept:
    """Operands in the type that logits are kept in."""
    dtype = widened(x.q.dtype)
    bias, compactness = [None if t is None else t.detach().to(dtype).contiguous() for t in (x.bias, x.compactness)]
    valid, valid_groups = [None if t is None else t.contiguous() for t in (x.valid, x.valid_groups)]
    q, k, values = [readable(t, dtype) for t in (x.q, x.k, x.values)]
    return Kept(q, k, values, torch.full((1,), x.scale, dtype=dtype), bias, compactness, valid, valid_groups)


def call_of(x: Kept, geometry: Geometry) -> Call:
    """What all passes are given."""
    valid, valid_groups = [Bytes(0 if t is None else t.data_ptr()) for t in (x.valid, x.valid_groups)]
    return Call(
        geometry,
        rows_of(x.q),
        rows_of(x.k),
        floats(x.scale),
        floats(x.bias),
        floats(x.compactness),
        valid,
        valid_groups,
    )


class Demand(NamedTuple):
    """What a pass needs room for."""

    channels: int
    """Of queries and keys."""
    more: int = 0
    """Of a second operand of groups."""
    more_columns: bool = False
    rows: bool = False
    """Of the window, for sums over groups."""
    of_tokens: int = 0
    """Channels of a second operand of tokens."""
    sums: tuple[int, ...] = ()
    """Channels that are summed for groups."""


@remembered(256)
def _layout(geometry: Geometry, need: Demand, size: int) -> tuple[tuple[int, int, int], tuple[int, ...], int]:
    """The sizes of a room, where its parts start (in bytes, -1 for those that are not needed), and where it ends."""
    lanes = BYTES // size

    def padded(count: int) -> int:
        return -(-count // lanes) * lanes

    seen = math.prod(2 * radius + 1 for radius in geometry.radius)
    slots, tokens = padded(seen), _largest_block(geometry)
    rows_kept = min(2 * geometry.radius[0] * geometry.dilation[0] + 1, geometry.groups[0])
    groups = rows_kept * geometry.groups[1] * geometry.groups[2] if need.sums else 0
    widest = padded(max(need.channels, need.more, need.of_tokens, 1))

    def copies(channels: int) -> int:
        return slots * padded(channels) if need.rows and channels % lanes else 0

    counts = (
        slots,
        3 * slots,
        4 * slots,
        4 * slots,
        4 * slots,
        5 * lanes,
        3 * slots,
        tokens,
        3 * tokens,
        *(seen,) * 6,
        8 * widest,
        8,
        8,
        4 * widest,
        need.channels * slots,
        need.more * slots if need.more_columns else 0,
        copies(need.channels),
        copies(need.more),
        # One vector at least: by its sums a pass knows that it has some.
        groups * max(lanes, sum(map(padded, need.sums))),
        groups,
    )
    places, end = [], 0
    for count, name in zip(counts, Room._fields[3:], strict=True):
        places.append(end if count else -1)
        end += -(-count * (8 if name in _INTEGERS else size) // BYTES) * BYTES
    return (slots, tokens, widest), tuple(places), end


_INTEGERS = frozenset(name for name, kind in typing.get_type_hints(Room).items() if kind is Integers)


def _largest_block(geometry: Geometry) -> int:
    """Tokens of the largest cell."""
    most = 1
    for size, groups, stride, offset in zip(*geometry[:4], strict=True):
        starts = [0, *(min(max(offset + cell * stride, 0), size) for cell in range(1, groups)), size]
        most *= max(1, *(stop - start for start, stop in itertools.pairwise(starts)))
    return most


def make_room(geometry: Geometry, need: Demand, dtype: torch.dtype, heads: int) -> tuple[list[int], Tensor]:
    """The words of a :class:`Room` for every head, and the memory that they name, zeroed, for one thread.

    The memory must live as long as the call.
    """
    sizes, places, end = _layout(geometry, need, dtype.itemsize)
    of_head = end - min([place for place in places[_OWN:] if place >= 0], default=end)
    memory = torch.zeros(end + (heads - 1) * of_head + BYTES, dtype=torch.uint8)
    start = -(-memory.data_ptr() // BYTES) * BYTES
    shared = [*sizes, *[start + place if place >= 0 else 0 for place in places[:_OWN]]]
    words = []
    for head in range(heads):
        own = start + head * of_head
        words += [*shared, *[own + place if place >= 0 else 0 for place in places[_OWN:]]]
    return words, memory


_OWN = Room._fields[3:].index("columns")
"""From this part on, there is one for every head."""


def blocks_of(neighbourhood: Neighbourhood) -> int:
    """Numbers of partial sums for every sample and head."""
    return -(-neighbourhood.output_shape[0] // ROWS_PER_SUM)


class Items(NamedTuple):
    """Items of work as kernels take them."""

    addresses: tuple[int, ...]
    heads: int
    """Of an item, at most."""
    words: object
    """What lies at the addresses."""


def items_of(x: Operands, threads: int, *, halo: bool = True) -> Items:
    """Items of work: all samples and heads, each in runs of rows of groups.

    Heads that lie side by side in memory are worked on together, as far as there are items enough for the threads.

    Args:
        x: operands.
        threads: how many there will be.
        halo: whether items look at cells beyond their own.
    """
    assert x.neighbourhood is not None
    batch, heads = x.q.shape[:2]
    together = heads if heads > 1 and x.k.stride(1) < x.k.stride(2) else 1
    runs = 1
    if threads > 1:
        wanted = ITEMS_PER_THREAD * threads
        together = max(1, min(together, batch * heads // wanted))
        pairs = batch * -(-heads // together)
        axis = x.neighbourhood.axes[0]
        reach = min(axis.reach, axis.groups) if halo else 0
        least = max(ROWS_PER_SUM, ROWS_PER_HALO * reach if pairs >= threads else reach)
        runs = min(-(-wanted // pairs), -(-axis.groups // least))
    return _items(batch, heads, together, x.neighbourhood.output_shape[0], runs)


@remembered(256)
def _items(batch: int, heads: int, together: int, groups: int, runs: int) -> Items:
    rows = -(-groups // runs)
    rows = -(-rows // ROWS_PER_SUM) * ROWS_PER_SUM
    items = []
    for b in range(batch):
        for h in range(0, heads, together):
            for first in range(0, groups, rows):
                last = min(first + rows, groups)
                those = range(h, min(h + together, heads))
                items.append(in_memory(tuple(Work(len(those), b, i, b * heads + i, first, last) for i in those)))
    return Items(tuple(map(address, items)), together, items)


def threads_for(x: Operands) -> int:
    """As many as torch takes, where there is work for more than one."""
    assert x.neighbourhood is not None
    entries = math.prod([axis.window for axis in x.neighbourhood.axes])
    work = x.k.shape[0] * x.k.shape[1] * x.k.shape[2] * entries * (x.q.shape[3] + x.values.shape[3])
    return torch.get_num_threads() if work > WORTH_A_THREAD else 1
