"""Sparse grouping: every token sees the groups around its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import validation
from .base import Ints, SpatialGroupingAttention


class SparseSpatialGroupingAttention(SpatialGroupingAttention):
    """Grouping in which a token may belong to the groups in a window around its own; for large, early stages.

    Cost grows as N_in * window, memory as N_in. A dilated window costs as much as the undilated one that reaches as
    far.

    Args:
        *args: see :class:`SpatialGroupingAttention`.
        neighborhood_kernel: odd number of groups in the window; int or one per axis. Clipped at borders.
        neighborhood_dilation: distance between the window's groups; int or one per axis.
        **kwargs: see :class:`SpatialGroupingAttention`.

    Raises:
        TypeError: an argument has the wrong type or is unknown.
        ValueError: an argument is out of range, sizes do not divide, or the window is even.
    """

    def __init__(
        self, *args: Any, neighborhood_kernel: Ints = 3, neighborhood_dilation: Ints = 1, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        ndim = self.spatial_dims
        self.neighborhood_kernel = validation.per_axis("neighborhood_kernel", neighborhood_kernel, ndim, minimum=1)
        self.neighborhood_dilation = validation.per_axis(
            "neighborhood_dilation", neighborhood_dilation, ndim, minimum=1
        )
        if any(w % 2 == 0 for w in self.neighborhood_kernel):
            raise ValueError(f"neighborhood_kernel must be odd on every axis, got {self.neighborhood_kernel}")
        if self.relative_bias:
            self.bias_table = nn.Parameter(torch.zeros(self.num_heads, *self.neighborhood_kernel))

    def window(self, output_shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The layer's window, whatever the grid."""
        return self.neighborhood_kernel, self.neighborhood_dilation
