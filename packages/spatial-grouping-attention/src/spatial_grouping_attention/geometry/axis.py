"""One axis of the relation between fine tokens and groups, as pure integers.

Every rule of the geometry is separable over axes, so it is written once for one axis; grids of any number of
dimensions are products of these. With kernel k, stride s and padding p, group j of a strided convolution is
centred on fine index ``j*s + (k-1)/2 - p``, and it owns a block of s fine indices around that centre.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """Fine size, number of groups and the convolution and window along one axis."""

    size: int
    groups: int
    stride: int
    kernel: int
    padding: int
    window: int
    dilation: int

    @property
    def offset(self) -> int:
        """First fine index of block 0 before clamping: ceil((k - s)/2 - p)."""
        return -((self.stride - self.kernel) // 2) - self.padding

    @property
    def centre(self) -> float:
        """Fine index at which group 0 sits, the middle of its receptive field: (k - 1)/2 - p."""
        return (self.kernel - 1) / 2 - self.padding

    @property
    def radius(self) -> int:
        """How many groups a token sees on either side of its own, before clipping."""
        return (self.window - 1) // 2

    @property
    def reach(self) -> int:
        """Distance in groups from a token's own group to the farthest one it sees."""
        return self.radius * self.dilation

    @property
    def covers_all(self) -> bool:
        """Whether every token sees every group."""
        return self.groups == 1 or (self.dilation == 1 and self.radius >= self.groups - 1)

    @property
    def num_pairs(self) -> int:
        """Number of pairs of a fine index and a group that it sees."""
        pairs = 0
        for cell in range(self.groups):
            start, stop = self.block(cell, cell)
            before, after = cell // self.dilation, (self.groups - 1 - cell) // self.dilation
            pairs += (stop - start) * (1 + min(before, self.radius) + min(after, self.radius))
        return pairs

    def cell(self, index: int) -> int:
        """The group whose block owns a fine index; border blocks own what lies beyond them."""
        return min(max((index - self.offset) // self.stride, 0), self.groups - 1)

    def block(self, first: int, last: int) -> tuple[int, int]:
        """Half-open interval of the fine indices owned by the cells ``first .. last`` (inclusive).

        Half-open, and empty where the blocks lie wholly outside the axis. ``cell`` never decreases, which is
        why this is one interval.
        """
        start = 0 if first <= 0 else self.offset + first * self.stride
        stop = self.size if last >= self.groups - 1 else self.offset + (last + 1) * self.stride
        start = min(max(start, 0), self.size)
        return start, min(max(stop, start), self.size)


def output_size(size: int, kernel: int, stride: int, padding: int) -> int:
    """Number of groups of a strided convolution: (n + 2p - k)//s + 1."""
    return (size + 2 * padding - kernel) // stride + 1
