"""From what a caller says about positions to a tensor of coordinates.

A caller may give a grid (shape and spacing), a :class:`RoSE.Grid`, or coordinates. These functions check that
what was given is complete, agrees with the tokens, and is not said twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import torch
from torch import Tensor

from .grid import Grid
from .validation import require_floating, require_shape, values_are_readable

Spacing: TypeAlias = "float | Iterable[float] | Tensor"
Shape: TypeAlias = "int | Iterable[int]"


def as_grid(
    spatial_dims: int, tokens: int, spacing: Spacing | None, grid_shape: Shape | None, grid: Grid | None
) -> Grid:
    """The grid that the arguments describe, checked against the number of tokens."""
    if grid is None:
        if grid_shape is None and spatial_dims > 1:
            raise ValueError(f"{spatial_dims}-D tokens need grid_shape (and spacing) or coordinates; got neither")
        shape = (tokens,) if grid_shape is None else require_shape("grid_shape", grid_shape)
        if len(shape) != spatial_dims:
            raise ValueError(
                f"grid_shape must have one size for each of {spatial_dims} spatial_dims; got {tuple(shape)}"
            )
        grid = Grid(shape, 1.0 if spacing is None else spacing)
    elif grid.ndim != spatial_dims:
        raise ValueError(f"a grid must have {spatial_dims} axes, the module's spatial_dims; got shape {grid.shape}")
    if grid.size != tokens:
        raise ValueError(
            f"grid_shape must have as many points as there are tokens to place; got {grid.shape} with "
            f"{grid.size} points for {tokens} tokens"
        )
    return grid


def require_coordinates(coordinates: Tensor, spatial_dims: int, tokens: int) -> Tensor:
    """Return coordinates if they hold one finite position per token."""
    require_floating("coordinates", coordinates)
    shape = tuple(coordinates.shape)
    if coordinates.dim() not in (2, 3) or shape[-2:] != (tokens, spatial_dims):
        raise ValueError(
            f"coordinates must have shape ({tokens}, {spatial_dims}) or (batch, {tokens}, {spatial_dims}): "
            f"tokens without the prefix, then spatial_dims; got {shape}"
        )
    # On an accelerator, reading the values would stall its queue at every call.
    readable = coordinates.device.type == "cpu" and values_are_readable(coordinates)
    if readable and not bool(coordinates.isfinite().all()):
        raise ValueError("coordinates must be finite; got NaN or infinite values")
    return coordinates


def require_batch(positions: Tensor, batch: int) -> Tensor:
    """Return positions if their batch size, when they have one, is 1 or the features'."""
    # Not `in (1, batch)`: while compiling with dynamic sizes, membership is not decided by equality.
    if positions.dim() == 3 and positions.shape[0] != 1 and positions.shape[0] != batch:
        raise ValueError(
            f"positions given per sample (spacing, origin or coordinates) must have the batch size {batch}; "
            f"got {positions.shape[0]}"
        )
    return positions


def spacing_tensor(spacing: tuple[float, ...] | Tensor, device: torch.device) -> Tensor:
    """A per-axis spacing as a float64 tensor ``(ndim,)`` or ``(batch, ndim)``."""
    if isinstance(spacing, Tensor):
        return spacing.to(device=device, dtype=torch.float64)
    return torch.tensor(spacing, device=device, dtype=torch.float64)
