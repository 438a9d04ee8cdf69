"""Regular grids in physical space.

A feature map knows its shape; a measurement also knows how far apart its samples are and where the first one
lies. ``Grid`` holds the three together, checked once, so that nothing downstream has to ask what a spacing
means.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import FrozenInstanceError

import torch
from torch import Tensor

from .validation import POSITION_DTYPES, require_per_axis, require_shape


class Grid:
    """A regular grid of points: point ``index`` lies at ``origin + index * spacing``, axis by axis. Immutable.

    Tensors are kept in float64, so that whatever is computed from a grid is.

    Args:
        shape: Points along each axis. A bare int is a one-dimensional grid.
        spacing: Distance between neighbouring points, in the physical unit of your choice (mm, um, ...),
            greater than 0: a number for all axes, one number per axis, a tensor ``(ndim,)``, or a tensor
            ``(batch, ndim)`` when every sample has its own.
        origin: Position of the point with index 0, in the same unit and of the same forms; any finite value.

    Raises:
        TypeError: A size that is not an int, a spacing that is not a real number, a tensor that is not float32 or
            float64 (half types would round positions by up to 0.4 %).
        ValueError: A size below 1, a spacing that is not finite and positive, or lengths that disagree. Values on an
            accelerator are not read, which would stall it, nor are they under compilers, function transforms and
            exporters: there NaN takes the place of a spacing that is not positive.
    """

    # Not a dataclass: code that walks through containers (to move or to cast a batch) writes to the fields of those.
    shape: tuple[int, ...]
    spacing: tuple[float, ...] | Tensor
    origin: tuple[float, ...] | Tensor

    def __init__(
        self,
        shape: int | Iterable[int],
        spacing: float | Iterable[float] | Tensor = 1.0,
        origin: float | Iterable[float] | Tensor = 0.0,
    ) -> None:
        """Check the arguments and set up; see the class."""
        checked_shape = require_shape("shape", shape)
        ndim = len(checked_shape)
        checked_spacing = require_per_axis("spacing", spacing, ndim, positive=True)
        checked_origin = require_per_axis("origin", origin, ndim, positive=False)
        batches = [v.shape[0] for v in (checked_spacing, checked_origin) if isinstance(v, Tensor) and v.dim() == 2]
        if len(batches) == 2 and batches[0] != batches[1]:
            raise ValueError(
                "spacing and origin must agree on the batch size when both are given per sample; "
                f"got {batches[0]} and {batches[1]}"
            )
        object.__setattr__(self, "shape", checked_shape)
        object.__setattr__(self, "spacing", checked_spacing)
        object.__setattr__(self, "origin", checked_origin)

    @classmethod
    def derived(
        cls, shape: tuple[int, ...], spacing: tuple[float, ...] | Tensor, origin: tuple[float, ...] | Tensor
    ) -> Grid:
        """A grid computed from a checked one: its parts, in the forms they are kept in, are not checked again."""
        grid = object.__new__(cls)
        object.__setattr__(grid, "shape", shape)
        object.__setattr__(grid, "spacing", spacing)
        object.__setattr__(grid, "origin", origin)
        return grid

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse: grids are shared."""
        raise FrozenInstanceError(f"a Grid is immutable; make a new one instead of setting {name!r}")

    def __delattr__(self, name: str) -> None:
        """Refuse likewise."""
        raise FrozenInstanceError(f"a Grid is immutable; {name!r} cannot be deleted")

    def __repr__(self) -> str:
        """The call that makes it."""
        return f"Grid(shape={self.shape!r}, spacing={self.spacing!r}, origin={self.origin!r})"

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of points, the product of ``shape``."""
        return math.prod(self.shape)

    @property
    def batch(self) -> int | None:
        """Samples that have a spacing or origin of their own; None where all share one."""
        for value in (self.spacing, self.origin):
            if isinstance(value, Tensor) and value.dim() == 2:
                return value.shape[0]
        return None

    def to(self, device: torch.device | str | None = None, *, non_blocking: bool = False) -> Grid:
        """The grid with tensor spacing and origin on another device; what is plain numbers stays."""
        spacing, origin = (
            v.to(device=device, non_blocking=non_blocking) if isinstance(v, Tensor) else v
            for v in (self.spacing, self.origin)
        )
        return Grid.derived(self.shape, spacing, origin)

    def coordinates(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Physical positions of all points, row-major (the last axis runs fastest).

        Args:
            device: Where to build them; default: where ``spacing`` or ``origin`` lies if one is a tensor,
                else torch's default device.
            dtype: What the positions, computed in float64, are rounded to; float64 (the default) or float32, which at
                1e5 units from zero steps by 0.008.

        Returns:
            ``(size, ndim)``, or ``(batch, size, ndim)`` when spacing or origin is given per sample. Gradients
            flow to tensor spacing and origin.

        Raises:
            TypeError: Another dtype.
        """
        if dtype not in (None, *POSITION_DTYPES):
            raise TypeError(f"dtype must be torch.float64 or torch.float32; got {dtype}")
        if device is None:
            tensors = [v for v in (self.spacing, self.origin) if isinstance(v, Tensor)]
            device = tensors[0].device if tensors else None
        shape, ndim = self.shape, self.ndim
        batch = () if self.batch is None else (self.batch,)
        spread = []
        for axis, n in enumerate(shape):
            steps = torch.arange(n, device=device, dtype=torch.float64) * _column(self.spacing, axis, device)
            points = _column(self.origin, axis, device) + steps
            along = (1,) * axis + (n,) + (1,) * (ndim - axis - 1)
            spread.append(points.reshape(*points.shape[:-1], *along).expand(*batch, *shape))
        exact = torch.stack(spread, dim=-1).flatten(-1 - ndim, -2)
        return exact if dtype is None else exact.to(dtype)

    def __eq__(self, other: object) -> bool:
        """Equal when shape, spacing and origin are; tensors compare by value."""
        if not isinstance(other, Grid):
            return NotImplemented
        pairs = ((self.spacing, other.spacing), (self.origin, other.origin))
        return self.shape == other.shape and all(_same(a, b) for a, b in pairs)

    def __hash__(self) -> int:
        """Hash of a grid whose spacing and origin are plain numbers."""
        if isinstance(self.spacing, Tensor) or isinstance(self.origin, Tensor):
            raise TypeError("a Grid with tensor spacing or origin is not hashable; use plain numbers")
        return hash((self.shape, self.spacing, self.origin))


def _column(value: tuple[float, ...] | Tensor, axis: int, device: torch.device | str | None) -> float | Tensor:
    """One axis of a per-axis value, shaped to broadcast against that axis' points."""
    if not isinstance(value, Tensor):
        return value[axis]
    return value[..., axis, None].to(device=device, dtype=torch.float64)


def _same(a: tuple[float, ...] | Tensor, b: tuple[float, ...] | Tensor) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b
