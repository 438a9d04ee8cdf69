"""What all adapters share: being told where tokens are, and the table of the angles they turn by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..embedding import RotarySpatialEmbedding
from ..grid import Grid
from ..keywords import spell_out_rotary_keywords
from ..positions import Spacing, Where
from ..validation import require_int, require_numbers, require_per_axis, require_position_dtype

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from ..keywords import RotaryKeywords


# Which channels make a pair is the library's choice, and made when a table is.
spell_out_keywords = partial(spell_out_rotary_keywords, without=("interleaved",))


@spell_out_keywords
class RopeSlot(nn.Module):
    """Wave vectors and positions, made into the tables that a library rotates by itself.

    A library's model calls its embedding without saying where tokens are. So they are placed beforehand: by the
    ``spacing`` of the constructor, and for some calls by :meth:`at`. Tables are made anew at every call, so that wave
    vectors learn, and move with the model.

    Args:
        dim: Channels over all heads.
        num_heads: Heads that get wave vectors of their own. With one, a table serves all heads of the library's
            attention, and ``dim`` is their size.
        spatial_dims: Axes of a position.
        depth: Blocks that get wave vectors of their own; None for one table that all blocks share.
        spacing: Distance between tokens in physical units (for an image cut into patches: pixel size times patch
            size) where nothing else is said; a number or one per axis.
        device: Where to put the wave vectors.
        dtype: Of the wave vectors.
        **rotary: Keywords of :class:`RoSE.RotarySpatialEmbedding` but ``interleaved``, which the library decides; of
            its pairs of channels the first ones rotate where ``rotary_ratio`` is below 1.

    Raises:
        TypeError: Arguments of the wrong type.
        ValueError: Arguments that break a rule.
    """

    rotary: nn.Module

    def __init__(
        self,
        dim: int,
        num_heads: int,
        spatial_dims: int,
        *,
        depth: int | None = None,
        spacing: float | Iterable[float] = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **rotary: Unpack[RotaryKeywords],
    ) -> None:
        """Check the arguments and set up; see the class."""
        super().__init__()
        blocks = 1 if depth is None else require_int("depth", depth, minimum=1)
        embeddings = [
            RotarySpatialEmbedding(dim, num_heads, spatial_dims, device=device, dtype=dtype, **rotary)
            for _ in range(blocks)
        ]
        self.rotary = embeddings[0] if depth is None else nn.ModuleList(embeddings)
        self.num_heads, self.planes, self.spatial_dims = num_heads, dim // num_heads // 2, spatial_dims
        self.transforms_spacing = rotary.get("spacing_transform") is not None
        self.spacing = require_numbers("spacing", spacing, spatial_dims, positive=True)
        self._where = Where(self.spacing)

    @contextmanager
    def at(self, spacing: Spacing | None = None, *, coordinates: Tensor | Grid | None = None) -> Iterator[Self]:
        """Say where tokens are in all calls of the model while this context lasts.

        Args:
            spacing: Distance between tokens in physical units: a number, one per axis, a tensor ``(spatial_dims,)``,
                or per sample ``(batch, spatial_dims)``.
            coordinates: Positions of tokens instead, ``(tokens, spatial_dims)`` or ``(batch, tokens, spatial_dims)``,
                without those of class tokens and registers, or a :class:`RoSE.Grid`. Gradients flow to tensors. With
                a ``spacing_transform``, give ``spacing`` beside a tensor too.

        Yields:
            This module.

        Raises:
            TypeError: Arguments of the wrong type.
            ValueError: Neither of the two; a spacing that is not positive or not of ``spatial_dims`` axes.
        """
        if spacing is None and coordinates is None:
            raise ValueError("spacing or coordinates must be given; got neither")
        if coordinates is not None and not isinstance(coordinates, Grid):
            require_position_dtype("coordinates", coordinates)
        if spacing is not None:
            spacing = require_per_axis("spacing", spacing, self.spatial_dims, positive=True)
            if not isinstance(spacing, Tensor):  # for every other number a compiled model would be compiled anew
                spacing = torch.tensor(spacing, dtype=torch.float64, device="cpu")
            home = _some_of(self).device
            # Or every block would fetch it, and wait, at every call. (Meta is where no weights are; Apple's GPUs have
            # no float64.)
            spacing = spacing if home.type in ("meta", "mps") else spacing.to(home)
        before, self._where = self._where, Where(spacing, None, coordinates)
        try:
            yield self
        finally:
            self._where = before

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that decay would spoil: of all, because it pulls wavelengths towards infinity."""
        return {name for name, _ in self.named_parameters()}

    def _placed(self, grid_shape: Sequence[int]) -> Where:
        """Where tokens are that lie on a grid of this shape."""
        where = self._where
        if where.coordinates is None:
            return where._replace(grid_shape=tuple(grid_shape))
        if isinstance(where.coordinates, Grid) and where.coordinates.shape != tuple(grid_shape):
            raise ValueError(
                f"coordinates must be a grid of the model's tokens, {tuple(grid_shape)}; got {where.coordinates}"
            )
        return where

    def _turned(self, rotary: nn.Module, where: Where, tokens: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of all pairs of channels, ``(batch or 1, heads, tokens, planes)``; of idle ones, 1 and 0.

        They are what becomes of (1, 0) when it is rotated: the embedding is called as any module is, so that what
        hooks, moves or wraps modules works.
        """
        some = _some_of(rotary)
        ones = torch.ones(
            _samples(where) or 1, self.num_heads, tokens, self.planes,
            device=some.device, dtype=torch.promote_types(some.dtype, torch.float32),
        )  # fmt: skip
        units = torch.stack((ones, torch.zeros_like(ones)), dim=-1).flatten(-2)
        spacing, grid_shape, coordinates, _ = where
        turned = rotary(units, spacing, grid_shape, coordinates=coordinates, layout="bhnd")
        cos, sin = torch.unflatten(turned, -1, (self.planes, 2)).unbind(-1)
        return cos, sin


def _some_of(module: nn.Module) -> Tensor:
    """A parameter or a buffer."""
    return next(chain(module.parameters(), module.buffers()))


def _samples(where: Where) -> int | None:
    """How many samples have a place of their own; None where all share one."""
    for value, shared in ((where.spacing, 1), (where.coordinates, 2)):
        if isinstance(value, Tensor) and value.dim() > shared:
            return value.shape[0]
    return where.coordinates.batch if isinstance(where.coordinates, Grid) else None


def of_channels(planes: Tensor, *, interleaved: bool) -> Tensor:
    """Values of pairs as values of channels: each twice, next to one another or half of the channels apart."""
    return planes.repeat_interleave(2, dim=-1) if interleaved else torch.cat((planes, planes), dim=-1)


def without_batch(table: Tensor, where: Where) -> Tensor:
    """A table without its first dimension, unless samples have places of their own."""
    return table.squeeze(0) if _samples(where) is None else table
