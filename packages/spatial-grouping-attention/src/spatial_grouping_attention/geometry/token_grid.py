"""What a caller of a layer says of its tokens, checked once and put into one bundle.

A grid may be given as a :class:`RoSE.Grid`, or as spacing, shape and origin; a mask and a validity may come on the
grid or on the row of tokens. Behind this module there is one form of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from RoSE import Grid
from RoSE.positions import as_grid
from RoSE.validation import require_boolean, require_floating, require_per_axis, require_sizes, require_valid
from torch import Tensor

Spacing = float | Sequence[float] | Tensor
Shape = int | Sequence[int]


class TokenGrid(NamedTuple):
    """Where tokens lie, and which of them to replace or to leave out."""

    grid: Grid
    """The grid as the caller sees it."""
    frame: Grid
    """The same grid with its first token at 0. Positions enter attention by differences only, and near zero they are
    exact in float32, however far away the image lies."""
    mask: Tensor | None
    """(B, N) boolean: true tokens are replaced by the mask embedding."""
    valid: Tensor | None
    """(B, N) boolean: false tokens are padding."""


def place_tokens(
    x: Tensor,
    channels: int,
    spatial_dims: int,
    *,
    spacing: Spacing | None,
    shape: Shape | None,
    grid: Grid | None,
    default_spacing: tuple[float, ...],
    origin: Spacing = 0.0,
    mask: Tensor | None = None,
    valid: Tensor | None = None,
    names: tuple[str, str, str] = ("spacing", "grid_shape", "grid"),
    origin_name: str = "origin",
) -> TokenGrid:
    """Check tokens (B, N, channels) and what is said of them.

    Args:
        x: tokens, row-major over the grid.
        channels: how many they must have.
        spatial_dims: axes that the grid must have.
        spacing: distance between tokens; None for ``default_spacing``.
        shape: tokens along each axis; None where a mask or a validity on the grid shows it, and in 1-D.
        grid: spacing, shape and origin in one, instead of the three.
        default_spacing: spacing where neither it nor a grid is given.
        origin: position of the first token.
        mask: (B, *grid) boolean.
        valid: (B, *grid) or (B, N) boolean.
        names: what the caller calls spacing, shape and grid, for messages.
        origin_name: what the caller calls the origin.

    Raises:
        TypeError: x is not floating, the mask or the validity not boolean, the grid no Grid.
        ValueError: shapes disagree, the grid is said twice or not at all, or a spacing is not positive and finite.
    """
    require_floating("x", x)
    require_sizes("x", x, "B N C", C=channels)
    for name, tensor in (("mask", mask), ("valid", valid)):
        if tensor is not None:
            require_boolean(name, tensor)
            if shape is None and grid is None and spatial_dims > 1 and tensor.ndim == spatial_dims + 1:
                shape = tuple(tensor.shape[1:])
    placed = _placed(x, spatial_dims, spacing, shape, grid, default_spacing, origin, names, origin_name)
    batch, sizes = x.shape[0], placed.shape
    if mask is not None and tuple(mask.shape) != (batch, *sizes):
        raise ValueError(f"mask must have shape {(batch, *sizes)} (B, *grid); got {tuple(mask.shape)}")
    return TokenGrid(
        placed,
        placed if _starts_at_zero(placed) else Grid.derived(sizes, placed.spacing, (0.0,) * len(sizes)),
        None if mask is None else mask.flatten(1),
        None if valid is None else require_valid(valid, batch, sizes),
    )


def _placed(
    x: Tensor,
    spatial_dims: int,
    spacing: Spacing | None,
    shape: Shape | None,
    grid: Grid | None,
    default_spacing: tuple[float, ...],
    origin: Spacing,
    names: tuple[str, str, str],
    origin_name: str,
) -> Grid:
    """The grid, from whichever arguments say it."""
    at_zero = isinstance(origin, (int, float)) and origin == 0.0
    if grid is not None and not at_zero:
        raise ValueError(f"{names[2]} must be the only place that says the grid; got {origin_name} as well")
    if grid is None and spacing is None:
        spacing = default_spacing
    placed = as_grid(spatial_dims, x.shape[1], spacing, shape, grid, names=names)
    if not at_zero:
        start = require_per_axis(origin_name, origin, spatial_dims, positive=False)
        placed = Grid(placed.shape, placed.spacing, start)
    for name, value in ((names[0], placed.spacing), (origin_name, placed.origin)):
        if isinstance(value, Tensor) and value.ndim == 2 and value.shape[0] != x.shape[0]:
            raise ValueError(
                f"{name} must have the batch size {x.shape[0]} where given per sample; got {value.shape[0]}"
            )
    return placed


def _starts_at_zero(grid: Grid) -> bool:
    return not isinstance(grid.origin, Tensor) and not any(grid.origin)
