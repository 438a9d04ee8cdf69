"""Self-attention of tokens with their neighbours on the grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from RoSE import Grid, RotarySpatialEmbedding
from torch import Tensor, nn

from .. import functional, validation
from ..functional import Backend
from ..geometry import Neighbourhood
from .base import Ints, Spacing


class WindowedSelfAttention(nn.Module):
    """Multi-head self-attention over a window of neighbours, with positions in physical units (RoSE).

    This is the operator ``assign`` with equal grids: tokens look at tokens. Windows are clipped at the borders.

    Args:
        dims: channels; divisible by ``num_heads`` into an even head size.
        spatial_dims: axes of the grid, 1 or more.
        num_heads: attention heads.
        window: odd number of tokens in the window; int or one per axis; None for the whole grid.
        dilation: distance between the window's tokens; int or one per axis.
        qkv_bias: whether the projection to queries, keys and values has a bias.
        dropout: probability, in [0, 1), after the output projection.
        spacing: physical distance between tokens when ``forward`` is given none; a number, or one per axis.
        relative_bias: whether to learn a bias per head and window offset; needs a window.
        backend: see :func:`.functional.grouping_attention`.
        **rose: keywords of :class:`RoSE.RotarySpatialEmbedding`; ``reference_spacing`` is ``spacing`` where only
            that is given.

    Raises:
        TypeError: an argument has the wrong type or is unknown.
        ValueError: an argument is out of range, sizes do not divide, or the window is even.
    """

    def __init__(
        self,
        dims: int,
        spatial_dims: int,
        num_heads: int,
        window: Ints | None = 7,
        dilation: Ints = 1,
        *,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        spacing: float | Sequence[float] = 1.0,
        relative_bias: bool = False,
        backend: str = "auto",
        **rose: Any,
    ) -> None:
        super().__init__()
        self.dims = validation.positive_int("dims", dims)
        self.num_heads = validation.positive_int("num_heads", num_heads)
        self.spatial_dims = validation.positive_int("spatial_dims", spatial_dims)
        validation.divides("num_heads", num_heads, "dims", dims)
        self.dilation = validation.per_axis("dilation", dilation, spatial_dims, minimum=1)
        self.window: tuple[int, ...] | None = None
        if window is not None:
            self.window = validation.per_axis("window", window, spatial_dims, minimum=1)
            if any(w % 2 == 0 for w in self.window):
                raise ValueError(f"window must be odd on every axis, got {self.window}")
        elif relative_bias:
            raise ValueError("relative_bias needs a window of fixed size, got window=None")
        validation.one_of("backend", backend, [b.value for b in Backend])
        self.backend = backend
        self.spacing = Grid((1,) * spatial_dims, spacing).spacing
        if "wavelengths" not in rose:  # which are in physical units already
            rose.setdefault("reference_spacing", self.spacing)
        self.to_qkv = nn.Linear(dims, 3 * dims, bias=qkv_bias)
        self.rotary = RotarySpatialEmbedding(dims, num_heads, spatial_dims, **rose)
        self.project = nn.Linear(dims, dims)
        self.dropout = nn.Dropout(validation.probability("dropout", dropout))
        self.bias_table = nn.Parameter(torch.zeros(num_heads, *self.window)) if relative_bias and self.window else None

    def neighbourhood(self, grid_shape: Sequence[int]) -> Neighbourhood:
        """The relation between the tokens of a grid."""
        shape = tuple(grid_shape)
        ones = (1,) * len(shape)
        window = self.window or tuple(2 * n - 1 for n in shape)
        dilation = self.dilation if self.window else ones
        return Neighbourhood(shape, shape, ones, ones, (0,) * len(shape), window, dilation)

    def forward(self, x: Tensor, spacing: Spacing | None = None, grid_shape: Sequence[int] | None = None) -> Tensor:
        """Let every token attend to its window.

        Args:
            x: tokens (B, N, dims), row-major over the grid.
            spacing: physical distance between tokens: a number, one per axis, a tensor (spatial_dims,), or one
                row per sample (B, spatial_dims); None for the constructor's.
            grid_shape: tokens along each axis; may be left out in 1-D.

        Returns:
            (B, N, dims).

        Raises:
            TypeError: x is not floating.
            ValueError: shapes disagree, or the spacing is not positive and finite.
        """
        grid = validation.token_grid(
            x, self.dims, self.spatial_dims, self.spacing if spacing is None else spacing, grid_shape
        )
        q, k, v = self.to_qkv(x).chunk(3, dim=-1)
        q, k = self.rotary.rotate_pair(q, k, coordinates=grid)
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.num_heads) for t in (q, k, v))
        bias = None if self.bias_table is None else self.bias_table.to(q.dtype)
        # assign's fine tokens are the ones that look, its groups the ones that are looked at.
        out, _ = functional.assign(k, q, v, self.neighbourhood(grid.shape), bias=bias, backend=self.backend)
        projected: Tensor = self.dropout(self.project(rearrange(out, "b h n d -> b n (h d)")))
        return projected
