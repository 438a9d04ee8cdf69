"""What kernels take: named tuples of addresses and integers, which numba sees through.

Addresses have types of their own here, by which :mod:`.jit` tells numba what lies there; 0 stands for nothing. So all
operands, however they lie in memory, are of one type, and a kernel is compiled once for float32 and once for float64.
"""

from __future__ import annotations

from typing import NamedTuple

Triple = tuple[int, int, int]


class Floats(int):
    """The address of numbers in the type of the operands."""


class Integers(int):
    """The address of int64."""


class Bytes(int):
    """The address of bytes that are 0 or 1."""


class Geometry(NamedTuple):
    """The relation of tokens and groups on three axes, of which a grid of fewer leaves some with one token and group.

    Axis 0 is cut into the items of work, and windows slide along axis 2, so a grid of two axes leaves axis 1 out, one
    of one axis the last two.
    """

    tokens: Triple
    groups: Triple
    stride: Triple
    offset: Triple
    """First token of block 0 before clamping."""
    twice_centre: Triple
    """Twice the token index at which group 0 sits."""
    dilation: Triple
    radius: Triple
    """Groups that a token sees on either side, as far as there are so many."""
    table_radius: Triple
    """The same as the bias table has it."""


class Rows(NamedTuple):
    """Rows of channels (B, H, N, C) in memory: elements from one sample, head and row to the next."""

    data: Floats
    batch: int
    head: int
    row: int
    channels: int


class Call(NamedTuple):
    """What all passes are given."""

    geometry: Geometry
    q: Rows
    k: Rows
    scale: Floats
    """(1,)."""
    bias: Floats
    """(H * window,)."""
    compactness: Floats
    """(H,)."""
    valid: Bytes
    """(B * N_in,)."""
    valid_groups: Bytes
    """(B * N_out,)."""


class Work(NamedTuple):
    """An item of work: the groups ``first <= j < last`` of axis 0, of one sample and some heads.

    There is one of these for every head, one after the other, as there is a :class:`Room`.
    """

    heads: int
    """Heads of the item."""
    sample: int
    head: int
    pair: int
    """``sample * H + head``, where numbers of single tokens and groups start."""
    first: int
    last: int


class Room(NamedTuple):
    """What an item of work needs besides: numbers of the cell at hand. S slots of a window, padded to whole vectors.

    Heads share all but ``columns`` and what follows.
    """

    slots: int
    """S."""
    most_tokens: int
    """Of any cell."""
    widest: int
    """Channels of any operand, padded."""
    base: Floats
    """Bias of every slot, -inf where nothing is seen, (S,)."""
    offsets: Floats
    """Where the window's groups lie, from the cell's, (3, S)."""
    first: Floats
    """Logits of four tokens, and what becomes of them, (4, S)."""
    second: Floats
    third: Floats
    of_tokens: Floats
    """A vector and a number of each of four tokens, (5, lanes)."""
    of_groups: Floats
    """Three numbers of the group in every slot, (3, S)."""
    tokens: Integers
    """The cell's tokens."""
    places: Floats
    """Where they lie, from the cell's group, (3, tokens)."""
    slot: Integers
    """Of every group that is seen: its slot,"""
    entry: Integers
    """the entry of a head's bias table,"""
    group: Integers
    """its index in the grid,"""
    member_slot: Integers
    """and of those that the item works for: its slot"""
    member_row: Integers
    """and the row where its sums are collected."""
    at: Integers
    """Where the rows of the groups that are seen start, one after the other."""
    padded: Floats
    """Rows of four tokens, padded to whole vectors: two operands."""
    starts: Integers
    """Where the rows of four tokens start, (2, 4),"""
    whole: Integers
    """and where as whole vectors."""
    out: Floats
    """Results of four tokens, padded likewise."""
    columns: Floats
    """Queries of the window, (D, S): column by column the groups of the window."""
    more_columns: Floats
    """The same of a second operand of groups."""
    rows: Floats
    """Queries of the window (S, D padded), where they cannot be used where they lie."""
    more_rows: Floats
    sums: Floats
    """Sums of groups, (rows, channels padded), of the groups that the cells at hand see."""
    masses: Floats
    """One more number of each."""
