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
from .validation import require_floating, require_per_axis, require_shape, values_are_readable

Spacing: TypeAlias = "float | Iterable[float] | Tensor"
Shape: TypeAlias = "int | Iterable[int]"


def as_grid(
    spatial_dims: int,
    tokens: int,
    spacing: Spacing | None,
    grid_shape: Shape | None,
    grid: Grid | None,
    *,
    names: tuple[str, str, str] = ("spacing", "grid_shape", "grid"),
) -> Grid:
    """The grid that the arguments describe, checked against the number of tokens.

    Args:
        spatial_dims: Axes it must have.
        tokens: Points it must have.
        spacing: Distance between points; None means 1.
        grid_shape: Points along each axis; in one dimension None means all tokens.
        grid: A grid instead of the two.
        names: What the caller calls the last three, for messages.

    Raises:
        TypeError: Arguments of the wrong type.
        ValueError: A grid given twice or not at all, or one that does not fit.
    """
    spacing_name, shape_name, grid_name = names
    if grid is not None:
        if not isinstance(grid, Grid):
            raise TypeError(f"{grid_name} must be a RoSE.Grid; got {type(grid).__name__}")
        if spacing is not None or grid_shape is not None:
            raise ValueError(
                f"{grid_name} must be the only place that says the grid; got {shape_name} or {spacing_name} as well"
            )
        if grid.ndim != spatial_dims:
            raise ValueError(f"{grid_name} must have {spatial_dims} axes; got shape {grid.shape}")
    else:
        if grid_shape is None:
            if spatial_dims > 1:
                raise ValueError(f"{shape_name} must be given for {spatial_dims}-D tokens; got None")
            grid_shape = (tokens,)
        shape = require_shape(shape_name, grid_shape, spatial_dims)
        per_axis = require_per_axis(spacing_name, 1.0 if spacing is None else spacing, spatial_dims, positive=True)
        grid = Grid(shape, per_axis)
    if grid.size != tokens:
        raise ValueError(
            f"{shape_name} must have one point for each of the {tokens} tokens; "
            f"got {grid.shape} with {grid.size} points"
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
