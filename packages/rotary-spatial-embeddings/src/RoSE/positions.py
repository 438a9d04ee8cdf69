"""From what a caller says about positions to a tensor of coordinates.

A caller may give a grid (shape and spacing), a :class:`RoSE.Grid`, coordinates, or several of these one behind the
other. What was said is bundled once, as :class:`Where`; :func:`resolve` checks that it is complete, agrees with the
tokens, and is not said twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .aliasing import AliasingWatch
from .constants import numbers
from .grid import Grid
from .reading import values_are_at_hand
from .transforms import IdentitySpacing
from .validation import (
    FARTHEST,
    FARTHEST_OF,
    require_int,
    require_per_axis,
    require_position_dtype,
    require_shape,
    require_valid,
)

Spacing: TypeAlias = "float | Iterable[float] | Tensor"
Shape: TypeAlias = "int | Iterable[int]"
Coordinates: TypeAlias = "Tensor | Grid | Sequence[Tensor | Grid]"


class Where(NamedTuple):
    """Where tokens are, in the words of :meth:`RoSE.RotarySpatialEmbedding.forward`, which describes them."""

    spacing: Any = None
    grid_shape: Shape | None = None
    coordinates: Coordinates | None = None
    num_prefix_tokens: int = 0

    @property
    def is_said(self) -> bool:
        """Whether there is a position at all."""
        return self.spacing is not None or self.grid_shape is not None or self.coordinates is not None


def where_of_keys(q: Where, k: Where, k_num_prefix_tokens: int | None) -> Where:
    """What holds for keys, where it is said with ``k_`` arguments; ``q`` itself where nothing differs.

    ``k_spacing`` alone means q's grid shape at another spacing, ``k_grid_shape`` alone another shape at q's spacing;
    ``k_coordinates`` stands for itself.
    """
    prefix = q.num_prefix_tokens if k_num_prefix_tokens is None else k_num_prefix_tokens
    if not k.is_said:
        return q if prefix == q.num_prefix_tokens else q._replace(num_prefix_tokens=prefix)
    if k.coordinates is not None:
        return k._replace(num_prefix_tokens=prefix)
    return Where(
        q.spacing if k.spacing is None else k.spacing,
        q.grid_shape if k.grid_shape is None else k.grid_shape,
        None,
        prefix,
    )


def resolve(
    where: Where,
    tokens: int,
    spatial_dims: int,
    *,
    transform: nn.Module | None = None,
    freqs: Tensor | None = None,
    watch: AliasingWatch | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Coordinates of tokens that have a position.

    Args:
        where: What the caller said.
        tokens: How many tokens have a position.
        spatial_dims: Axes of a position.
        transform: Changes spacings (see :mod:`RoSE.transforms`).
        freqs: Wave vectors that will turn the tokens.
        watch: Looks at the grids with ``freqs``.
        device: Where to make the coordinates of a grid.

    Returns:
        ``(tokens, spatial_dims)``, or ``(batch, tokens, spatial_dims)`` if anything was given per sample.

    Raises:
        TypeError: Arguments of the wrong type.
        ValueError: Arguments that are incomplete, say something twice, or do not fit.
    """
    spacing, grid_shape, coordinates, _ = where
    if isinstance(coordinates, (list, tuple)):
        return _one_behind_the_other(
            where, coordinates, tokens, spatial_dims, transform=transform, freqs=freqs, watch=watch, device=device
        )
    if coordinates is None or isinstance(coordinates, Grid):
        names = ("spacing", "grid_shape", "coordinates")
        grid = as_grid(spatial_dims, tokens, spacing, grid_shape, coordinates, names=names)
        points = grid.coordinates(device=device)
        stretch = None if transform is None else transform(spacing_tensor(grid.spacing, points.device))
        if watch is not None and freqs is not None:
            watch.look(freqs, grid, stretch)
    else:
        points = require_coordinates(coordinates, spatial_dims, tokens)
        stretch = _stretch_of_points(where, spatial_dims, transform, points.device)
    return points if stretch is None else points * stretch.unsqueeze(-2)


def _stretch_of_points(
    where: Where, spatial_dims: int, transform: nn.Module | None, device: torch.device
) -> Tensor | None:
    """Factors of a spacing transform on coordinates, from the spacing that is given beside them."""
    needs_spacing = transform is not None and not isinstance(transform, IdentitySpacing)
    missing = needs_spacing and where.spacing is None
    if where.grid_shape is not None or missing or (where.spacing is not None and transform is None):
        raise ValueError(
            "coordinates must stand alone, except that a module with a spacing_transform needs the spacing they "
            f"were sampled at; got grid_shape={where.grid_shape!r}, spacing={where.spacing!r}, "
            f"spacing_transform={transform}"
        )
    if transform is None or where.spacing is None:
        return None
    steps = require_per_axis("spacing", where.spacing, spatial_dims, positive=True)
    stretch: Tensor = transform(spacing_tensor(steps, device))
    return stretch


def _one_behind_the_other(where: Where, pieces: Sequence[Any], tokens: int, spatial_dims: int, **more: Any) -> Tensor:
    """Coordinates of several grids or sets of points in the order of their tokens."""
    if where.grid_shape is not None:
        raise ValueError(f"grid_shape must be left out beside a list of coordinates; got {where.grid_shape!r}")
    spacings = where.spacing if where.spacing is not None else [None] * len(pieces)
    if not isinstance(spacings, (list, tuple)) or len(spacings) != len(pieces):
        raise ValueError(
            f"spacing must be a list with one entry for each of the {len(pieces)} coordinates; got {spacings!r}"
        )
    placed = []
    for index, (piece, spacing) in enumerate(zip(pieces, spacings, strict=True)):
        if not isinstance(piece, (Tensor, Grid)) or (isinstance(piece, Tensor) and piece.dim() < 2):
            raise TypeError(f"coordinates[{index}] must be a RoSE.Grid or a tensor of positions; got {piece!r}")
        count = piece.size if isinstance(piece, Grid) else piece.shape[-2]
        placed.append(resolve(Where(spacing, None, piece), count, spatial_dims, **more))
    count = sum(points.shape[-2] for points in placed)
    if count != tokens:
        raise ValueError(f"coordinates must hold one position for each of the {tokens} tokens; got {count}")
    batches = [points.shape[0] for points in placed if points.dim() == 3]
    if batches:
        placed = [require_batch(points, batches[0]).expand(batches[0], -1, -1) for points in placed]
    return torch.cat(placed, dim=-2)


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
    said_by = shape_name if grid is None else grid_name
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
        steps = require_per_axis(spacing_name, 1.0 if spacing is None else spacing, spatial_dims, positive=True)
        grid = Grid.derived(shape, steps, (0.0,) * spatial_dims)
    if grid.size != tokens:
        raise ValueError(
            f"{said_by} must have one point for each of the {tokens} tokens; got {grid.shape} with {grid.size} points"
        )
    return grid


def require_coordinates(coordinates: Any, spatial_dims: int, tokens: int) -> Tensor:
    """Return coordinates if they hold one finite position per token."""
    points = require_position_dtype("coordinates", coordinates)
    shape = tuple(points.shape)
    if points.dim() not in (2, 3) or shape[-2:] != (tokens, spatial_dims):
        raise ValueError(
            f"coordinates must have shape ({tokens}, {spatial_dims}) or (batch, {tokens}, {spatial_dims}): "
            f"tokens without the prefix, then spatial_dims; got {shape}"
        )
    if values_are_at_hand(points) and not bool((points.abs() <= FARTHEST_OF[points.dtype]).all()):
        raise ValueError(f"coordinates must be finite, at most {FARTHEST:g} in size; got NaN or larger values")
    return points


def require_batch(positions: Tensor, batch: int) -> Tensor:
    """Return positions if their batch size, when they have one, is the features'."""
    if positions.dim() == 3 and positions.shape[0] != batch:
        raise ValueError(
            f"positions given per sample (spacing, origin or coordinates) must have the batch size {batch}; "
            f"got {positions.shape[0]}"
        )
    return positions


def valid_tokens(name: str, valid: Tensor, where: Where, batch: int, tokens: int) -> Tensor:
    """Which of all tokens are real, ``(batch, tokens)``; prefix tokens are, unless the caller speaks of them too.

    Args:
        name: What the caller calls it.
        valid: ``(batch, *grid)`` or ``(batch, tokens)``, without the prefix tokens or with them.
        where: Where the tokens are.
        batch: Samples.
        tokens: All tokens, the prefix included.

    Raises:
        ValueError: Another shape, or a grid of another number of tokens: one token would be repeated for all of it.
    """
    prefix = require_int("num_prefix_tokens", where.num_prefix_tokens, minimum=0)
    if isinstance(valid, Tensor) and valid.dim() == 2 and valid.shape[1] == tokens:
        return require_valid(valid, batch, (tokens,), name=name)
    shape: tuple[int, ...] = (tokens - prefix,)
    if isinstance(where.coordinates, Grid):
        shape = where.coordinates.shape
    elif where.grid_shape is not None:
        shape = require_shape("grid_shape", where.grid_shape)
    on_grid = require_valid(valid, batch, shape, name=name)
    if on_grid.shape[1] != tokens - prefix:
        raise ValueError(
            f"{name} must have one entry for each of the {tokens - prefix} tokens; got {on_grid.shape[1]}, on a grid "
            f"of shape {shape}"
        )
    return F.pad(on_grid, (prefix, 0), value=True)


def spacing_tensor(spacing: tuple[float, ...] | Tensor, device: torch.device) -> Tensor:
    """A per-axis spacing as a float64 tensor ``(ndim,)`` or ``(batch, ndim)``."""
    if isinstance(spacing, Tensor):
        return spacing.to(device=device, dtype=torch.float64)
    return numbers(spacing, device)
