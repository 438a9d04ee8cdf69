"""What kernels need to know of a neighbourhood, as plain integers for three axes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from ...geometry import Neighbourhood, remembered
from ...geometry.axis import Axis

Triple = tuple[int, int, int]

_TRIVIAL = Axis(size=1, groups=1, stride=1, kernel=1, padding=0, window=1, dilation=1)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Layout:
    """A neighbourhood of at most three axes, padded in front with axes of size 1; see :mod:`.relation`."""

    neighbourhood: Neighbourhood

    @property
    def ndim(self) -> int:
        """Number of real axes."""
        return self.neighbourhood.ndim

    @cached_property
    def axes(self) -> tuple[Axis, Axis, Axis]:
        """The axes, those of size 1 first."""
        first, second, third = ((_TRIVIAL,) * 3 + self.neighbourhood.axes)[-3:]
        return first, second, third

    def _triple(self, values: list[int]) -> Triple:
        first, second, third = values
        return first, second, third

    @cached_property
    def size(self) -> Triple:
        """Fine tokens."""
        return self._triple([a.size for a in self.axes])

    @cached_property
    def groups(self) -> Triple:
        """Groups."""
        return self._triple([a.groups for a in self.axes])

    @cached_property
    def offset(self) -> Triple:
        """First fine index of block 0 before clamping."""
        return self._triple([a.offset for a in self.axes])

    @cached_property
    def stride(self) -> Triple:
        """Tokens per group."""
        return self._triple([a.stride for a in self.axes])

    @cached_property
    def dilation(self) -> Triple:
        """Phases; one where an axis has a single group, which needs none."""
        return self._triple([a.dilation if a.groups > 1 else 1 for a in self.axes])

    @cached_property
    def phases(self) -> Triple:
        """Phases that hold any group."""
        return self._triple([min(d, g) for d, g in zip(self.dilation, self.groups, strict=True)])

    @cached_property
    def longest(self) -> Triple:
        """Groups of the phase with the most."""
        return self._triple([_ceil_div(g, d) for d, g in zip(self.dilation, self.groups, strict=True)])

    @cached_property
    def radius(self) -> Triple:
        """Groups of its phase that a token sees on either side of its own, before clipping."""
        return self._triple([a.radius for a in self.axes])

    @cached_property
    def reach(self) -> Triple:
        """The same, no farther than a phase is long."""
        return self._triple([min(r, n - 1) for r, n in zip(self.radius, self.longest, strict=True)])

    @cached_property
    def lead(self) -> Triple:
        """Tokens before the stretch of block 0, which owns them."""
        return self._triple([max(o, 0) for o in self.offset])

    @cached_property
    def length(self) -> Triple:
        """Positions from 0 to the end of the longest phase, extra tokens of the last block included."""
        lengths = []
        for a, longest, dilation in zip(self.axes, self.longest, self.dilation, strict=True):
            last = a.size - a.offset - (a.groups - 1) * a.stride
            # With several phases the longest need not be the one that ends with the last block.
            last = last if dilation == 1 else max(last, a.stride)
            lengths.append((longest - 1) * a.stride + last)
        return self._triple(lengths)

    @cached_property
    def centre(self) -> Triple:
        """Twice the fine index at which group 0 sits, which may lie between two."""
        return self._triple([a.kernel - 1 - 2 * a.padding for a in self.axes])

    @property
    def window(self) -> int:
        """Entries of a head's bias table."""
        return math.prod(2 * r + 1 for r in self.radius)

    def token_programs(self, tile: Triple) -> Triple:
        """Tiles of tokens per axis, times its phases."""
        return self._triple(
            [
                (_ceil_div(lead, t) + _ceil_div(length, t)) * p
                for lead, length, t, p in zip(self.lead, self.length, tile, self.phases, strict=True)
            ]
        )

    def group_programs(self, tile: Triple) -> Triple:
        """Tiles of groups per axis, times its phases."""
        return self._triple([_ceil_div(n, t) * p for n, t, p in zip(self.longest, tile, self.phases, strict=True)])

    def box(self, tile: Triple) -> Triple:
        """Groups per axis that hold all that any tile of tokens sees."""
        boxes = []
        for t, s, reach, longest in zip(tile, self.stride, self.reach, self.longest, strict=True):
            # Tiles start at multiples of their size, so where one of tile and stride divides the other they
            # cut no cell needlessly.
            cells = max(t // s, 1) if t % s == 0 or s % t == 0 else (t + s - 2) // s + 1
            boxes.append(min(cells + 2 * reach, longest))
        return self._triple(boxes)


@remembered(1024)
def layout_of(neighbourhood: Neighbourhood) -> Layout:
    """The layout of a neighbourhood."""
    return Layout(neighbourhood)
