"""The relation between a fine grid and a grid of groups, on any number of axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from RoSE.memo import remembered
from RoSE.validation import require_ints, require_odd, require_shape

from .axis import Axis, output_size

Ints = int | Sequence[int]

# Entries per axis, the fields of a relation. (Counted here: a compiler does not know the fields of a class.)
_COLUMNS = 7

# Places are products of two entries, and must fit 64 bits.
_LARGEST = 2**31 - 1

# Smallest value of every entry besides the shapes; the order is that of the fields.
_MINIMA = {"stride": 1, "kernel_size": 1, "padding": 0, "window": 1, "dilation": 1}


@dataclass(frozen=True)
class Neighbourhood:
    """Which groups each fine token sees: pure integers, one entry per axis.

    A fine token i sees group j when ``cell(i) - j`` is in ``dilation * {-r, ..., r}``, ``r = (window - 1)/2``,
    and ``0 <= j < G``, on every axis. Windows are clipped at the borders, never shifted, so the relation read
    from the groups' side is exactly its transpose.

    Args:
        input_shape: sizes of the fine grid, one per axis (1 to any number of axes).
        output_shape: number of groups per axis, ``(n + 2*padding - kernel_size)//stride + 1``.
        stride: fine tokens per group; int or one per axis.
        kernel_size: size of the convolution that makes the groups; int or one per axis.
        padding: its zero padding; int or one per axis.
        window: odd number of groups that a token sees per axis, before clipping.
        dilation: distance between neighbouring groups of the window.

    Raises:
        TypeError: an entry is not an integer.
        ValueError: an entry is out of range (2**31 - 1 is the largest), ``window`` is even, or ``output_shape`` is not
            the convolution's.
    """

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    stride: Ints
    kernel_size: Ints
    padding: Ints
    window: Ints
    dilation: Ints = 1

    def __post_init__(self) -> None:
        """Broadcast every entry to one per axis and check it."""
        input_shape = require_shape("input_shape", self.input_shape)
        ndim = len(input_shape)
        object.__setattr__(self, "input_shape", input_shape)
        object.__setattr__(self, "output_shape", require_shape("output_shape", self.output_shape, ndim))
        for name, minimum in _MINIMA.items():
            entries = require_ints(name, getattr(self, name), ndim, minimum=minimum)
            # A compiler's entries are symbols, which must not be compared.
            if not torch.compiler.is_compiling() and max(entries) > _LARGEST:
                raise ValueError(f"{name} must be at most {_LARGEST}; got {max(entries)}")
            object.__setattr__(self, name, require_odd(name, entries) if name == "window" else entries)
        for axis in self.axes:
            expected = output_size(axis.size, axis.kernel, axis.stride, axis.padding)
            if axis.groups != expected:
                raise ValueError(
                    "output_shape must be (n + 2*padding - kernel_size)//stride + 1 on every axis: "
                    f"n={axis.size}, kernel_size={axis.kernel}, stride={axis.stride}, padding={axis.padding} "
                    f"give {expected}; got {axis.groups}"
                )

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The relation of each axis on its own."""
        return _axes(self)

    def integers(self) -> list[int]:
        """Every entry in one flat list, field by field: how operators registered with torch carry it."""
        return [value for field in fields(self) for value in getattr(self, field.name)]

    @staticmethod
    def from_integers(integers: Sequence[int]) -> Neighbourhood:
        """Rebuild from :meth:`integers`."""
        return _rebuild(tuple(integers))

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.input_shape)

    @property
    def num_inputs(self) -> int:
        """Number of fine tokens."""
        return math.prod(self.input_shape)

    @property
    def num_groups(self) -> int:
        """Number of groups."""
        return math.prod(self.output_shape)

    @property
    def num_pairs(self) -> int:
        """Number of pairs of a token and a group that it sees."""
        return math.prod(axis.num_pairs for axis in self.axes)

    @property
    def covers_all(self) -> bool:
        """Whether the window is so wide that every token sees every group."""
        return all(axis.covers_all for axis in self.axes)

    def mask(self, device: torch.device | str | None = None) -> torch.Tensor:
        """The relation as a matrix, for the oracle and for small grids.

        Returns:
            Boolean (num_inputs, num_groups), true where the token sees the group.
        """
        mask = torch.ones(1, 1, dtype=torch.bool, device=device)
        for distance, axis in zip(self._distances(device), self.axes, strict=True):
            sees = (distance.abs() <= axis.reach) & (distance % axis.dilation == 0)
            mask = (mask[:, None, :, None] & sees[None, :, None, :]).flatten(0, 1).flatten(1, 2)
        return mask

    def window_index(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Which entry of a window-shaped table each visible pair reads.

        Entry ``(group - cell) / dilation + r`` per axis, row-major over the window; 0 where nothing is seen.

        Returns:
            Integer (num_inputs, num_groups).
        """
        index = torch.zeros(1, 1, dtype=torch.long, device=device)
        for distance, axis in zip(self._distances(device), self.axes, strict=True):
            entry = (-distance).div(axis.dilation, rounding_mode="floor") + axis.radius
            index = (index[:, None, :, None] * axis.window + entry[None, :, None, :]).flatten(0, 1).flatten(1, 2)
        return index.masked_fill(~self.mask(device), 0)

    def places(self, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Where the tokens lie as seen from group 0, in steps of the fine grid: i - centre; group j is at j * stride.

        Not in units of the group spacing, which would round: what lies far from the origin, but near to each other,
        must be subtracted first.

        Returns:
            Floating (num_inputs, ndim), whole or half numbers.
        """
        return _product([torch.arange(axis.size, device=device, dtype=dtype) - axis.centre for axis in self.axes])

    def squared_distances(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        tokens: slice = slice(None),
    ) -> torch.Tensor:
        """Squared distance between tokens and groups, every axis in units of its group spacing.

        Args:
            device: where to put them.
            dtype: floating.
            tokens: which tokens' rows; by default all.

        Returns:
            Floating (tokens, num_groups).
        """
        axes = self.axes
        groups = _product([torch.arange(axis.groups, device=device, dtype=dtype) * axis.stride for axis in axes])
        squares = torch.zeros((), dtype=dtype, device=device)
        columns = zip(self.places(device, dtype)[tokens].unbind(-1), groups.unbind(-1), axes, strict=True)
        for place, group, axis in columns:
            squares = squares + ((place[:, None] - group) / axis.stride).square()
        return squares

    def cells(self, device: torch.device | str | None = None) -> torch.Tensor:
        """The group whose block owns each fine token: integer (num_inputs, ndim), one coordinate per axis."""
        return _product(self._cells(device))

    def _cells(self, device: torch.device | str | None) -> list[torch.Tensor]:
        """Per axis, cell(i) for every fine index i."""
        return [
            torch.arange(axis.size, device=device)
            .sub(axis.offset)
            .div(axis.stride, rounding_mode="floor")
            .clamp(0, axis.groups - 1)
            for axis in self.axes
        ]

    def _distances(self, device: torch.device | str | None) -> list[torch.Tensor]:
        """Per axis, cell(i) - j for every fine index i and group j."""
        return [
            cells[:, None] - torch.arange(axis.groups, device=device)[None, :]
            for cells, axis in zip(self._cells(device), self.axes, strict=True)
        ]


def _product(columns: Sequence[torch.Tensor]) -> torch.Tensor:
    """One coordinate along every axis -> all points of their grid, row-major: (points, ndim)."""
    grids = torch.meshgrid(*columns, indexing="ij")
    return torch.stack([grid.flatten() for grid in grids], dim=-1)


def relate(
    input_shape: tuple[int, ...],
    output_shape: tuple[int, ...],
    stride: tuple[int, ...],
    kernel_size: tuple[int, ...],
    padding: tuple[int, ...],
    window: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Neighbourhood:
    """The :class:`Neighbourhood` of these entries, checked once for all calls that name the same."""
    return _rebuild((*input_shape, *output_shape, *stride, *kernel_size, *padding, *window, *dilation))


@remembered(1024)
def _axes(neighbourhood: Neighbourhood) -> tuple[Axis, ...]:
    # Not kept on the object: a compiler that returns one must be able to rebuild all that it holds.
    columns = [getattr(neighbourhood, field.name) for field in fields(neighbourhood)]
    return tuple(Axis(*column) for column in zip(*columns, strict=True))


@remembered(1024)
def _rebuild(integers: tuple[int, ...]) -> Neighbourhood:
    ndim = len(integers) // _COLUMNS
    return Neighbourhood(*(integers[i * ndim : (i + 1) * ndim] for i in range(_COLUMNS)))
