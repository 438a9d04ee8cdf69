"""What travels together through the kernels: tuples with names, which the compiler takes apart again.

The host makes :class:`Inputs`, :class:`Rows`, :class:`Sizes` and :class:`Form`, kernels make the rest. Fields are
pointers, numbers or blocks of numbers in registers, for which there are no types.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Rows(NamedTuple):
    """A tensor of rows, or of one number per row: where it starts, and its strides from one to the next.

    Kernels are compiled for ``unit`` and ``step``, but for no other stride, most of which change with the grid.
    """

    start: Any
    strides: Any
    """All but the last, sealed (:mod:`RoSE.kernels.sealed`); counted in ``unit``."""
    unit: Any
    """16 elements where all of these are multiples of that, so that rows can be read in wide vectors, else 1."""
    step: Any
    """The last: from channel to channel, or from number to number."""


class Inputs(NamedTuple):
    """The operands that all passes read; None for those that there are not."""

    q: Any
    k: Any
    bias: Any
    """Pointer to the table (H, window entries), contiguous."""
    compactness: Any
    """Pointer to one float32 per head, contiguous."""
    valid: Any
    valid_groups: Any
    end: None = None
    """The triton of torch 2.11 (3.6) loses what it knows of numbers in a tuple in a tuple, here the steps of rows,
    unless the outer one ends with something that is known."""


class Sizes(NamedTuple):
    """What a kernel learns at its launch, integers sealed (:mod:`RoSE.kernels.sealed`); triples are one per axis."""

    scale: Any
    heads: Any
    programs: Any
    """Tiles times phases."""
    size: Any
    """Fine tokens."""
    groups: Any
    offset: Any
    """First fine index of block 0 before clamping."""
    lead: Any
    """Tokens before the stretch of block 0."""
    length: Any
    """Positions from 0 to the end of the longest phase."""
    centre: Any
    """Twice the fine index at which group 0 sits."""


class Form(NamedTuple):
    """What a kernel is compiled for; triples are one per axis."""

    stride: tuple[int, int, int]
    radius: tuple[int, int, int]
    reach: tuple[int, int, int]
    dilation: tuple[int, int, int]
    axes: int
    """How many axes are real."""
    window: int
    """Entries of a head's bias table, and with those that pad it."""
    window_padded: int
    tile: tuple[int, int, int]
    tile_rows: int
    """Product of ``tile``."""
    box: tuple[int, int, int]
    """Groups that hold all that a tile of tokens sees."""
    box_rows: int
    """Product of ``box``."""
    block: int
    """Rows of the other side per step."""
    qk: int
    """Channels of queries and keys, and with those that pad them for products."""
    qk_padded: int
    uv: int
    """Channels of values, likewise."""
    uv_padded: int
    product: Any
    """What products are computed in."""
    precision: str
    wide: bool
    """Whether offsets within one sample and head need 64 bits."""


class Head(NamedTuple):
    """The sample and head that a program works for."""

    batch: Any
    head: Any


class CompactHead(NamedTuple):
    """The same where logits are formed."""

    batch: Any
    head: Any
    compactness: Any
    """The head's per unit of squared distances; 0 where there is none."""


class Work(NamedTuple):
    """What a program works on: a tile of one phase, in one head; triples are one per axis."""

    batch: Any
    head: Any
    tile: Any
    """Number of the tile."""
    phase: Any
    groups: Any
    """How many groups the phase has."""
    compactness: Any
    """The head's per unit of squared distances; 0 where there is none."""


class Listed(NamedTuple):
    """Groups of a program by their numbers alone, one a slot."""

    index: Any
    exists: Any
    takes_part: Any


class Slots(NamedTuple):
    """Tokens or groups of a program, one a slot."""

    index: Any
    """Flat index."""
    exists: Any
    takes_part: Any
    """Exists and is valid."""
    cell: Any
    """Per axis, the cell that owns a token, or the group itself, in the phase's own coordinates."""
    place: Any
    """Per axis, twice the fine index at which a token or group lies: a whole number, in float32."""


class Running(NamedTuple):
    """A softmax that is still being summed: largest logit so far, sums of exponentials, and of what they weigh.

    Products round the exponentials. What is divided by the sum of the rounded ones is an average of the values, so its
    error is as small as the values' spread; by the sum of the others, it would be as large as the values.
    """

    highest: Any
    total: Any
    rounded_total: Any
    summed: Any
