"""Deformable grouping: every token looks where its content tells it to."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from .. import validation
from ..assignment import Assignment, DeformableAssignment
from ..functional import Backend, deformable
from ..geometry import Neighbourhood
from .base import SpatialGroupingAttention


class Points(NamedTuple):
    """Where the tokens of one input look."""

    positions: Tensor
    """In steps of the grid of groups, (B, H, N_in, P, ndim)."""
    visible: Tensor
    """False for points whose place in the window lies outside the grid, (N_in, P)."""
    neighbourhood: Neighbourhood


class DeformableSpatialGroupingAttention(SpatialGroupingAttention):
    """Grouping over points at learned, content-dependent, fractional offsets around every token's own cell.

    The points start on a window of whole steps, where the layer equals the sparse one, and every token moves its
    points by offsets that a linear layer reads from its features (after Deformable DETR, arXiv:2010.04159). Queries,
    and values on the way up, are interpolated linearly between groups. Points whose place in the window lies
    outside the grid are not looked at; points that wander outside are held at its border.

    Args:
        *args: see :class:`SpatialGroupingAttention`.
        num_points: points per token and head; None for 3 to the power of ``spatial_dims``. They start on the
            nearest places of the smallest odd window that holds them.
        **kwargs: see :class:`SpatialGroupingAttention`. ``relative_bias`` learns a bias per head and point.
            ``backend`` must be ``"auto"`` or ``"reference"``: there is one implementation.

    Raises:
        TypeError: an argument has the wrong type or is unknown.
        ValueError: an argument is out of range, or sizes do not divide.
    """

    def __init__(self, *args: Any, num_points: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        validation.one_of("backend of a deformable layer", self.backend, [Backend.AUTO.value, Backend.REFERENCE.value])
        if num_points is None:
            num_points = 3**self.spatial_dims
        self.num_points = validation.positive_int("num_points", num_points)
        self.places = starting_places(self.num_points, self.spatial_dims)
        self.to_offsets = nn.Linear(self.feature_dims, self.num_heads * self.num_points * self.spatial_dims)
        if self.relative_bias:
            self.bias_table = nn.Parameter(torch.zeros(self.num_heads, self.num_points))
        self.reset_offsets()

    def reset_offsets(self) -> None:
        """Put all points back on their places in the window."""
        nn.init.zeros_(self.to_offsets.weight)
        nn.init.zeros_(self.to_offsets.bias)

    def window(self, output_shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The smallest odd window that holds the points' starting places."""
        side = 2 * max(abs(step) for place in self.places for step in place) + 1
        return (side,) * self.spatial_dims, (1,) * self.spatial_dims

    def relate(self, x: Tensor, neighbourhood: Neighbourhood) -> Points:
        """Predict where every token looks."""
        cells = neighbourhood.cells(x.device)
        places = cells[:, None, :] + torch.tensor(self.places, device=x.device)
        sizes = torch.tensor(neighbourhood.output_shape, device=x.device)
        visible = ((places >= 0) & (places < sizes)).all(-1)
        # Half types cannot tell positions on a large grid apart.
        offsets = self.to_offsets(x).to(torch.promote_types(x.dtype, torch.float32))
        offsets = rearrange(
            offsets, "b n (h p d) -> b h n p d", h=self.num_heads, p=self.num_points, d=self.spatial_dims
        )
        return Points(places + offsets, visible, neighbourhood)

    def group(self, q: Tensor, k: Tensor, v: Tensor, relation: Any) -> Tensor:
        """Average what tokens spread to the groups around their points."""
        shape = relation.neighbourhood.output_shape
        return deformable.pool(self._log_shares(q, k, relation), relation.positions, v, shape)[0]

    def assignment(self, q: Tensor, k: Tensor, relation: Any) -> Assignment:
        """The points and their weights."""
        return DeformableAssignment(self._log_shares(q, k, relation), relation.positions, relation.neighbourhood)

    def _log_shares(self, q: Tensor, k: Tensor, points: Points) -> Tensor:
        scale = 1.0 / math.sqrt(q.shape[-1])
        shape = points.neighbourhood.output_shape
        return deformable.point_log_shares(
            q, k, points.positions, points.visible, shape, scale=scale, bias=self._bias(q)
        )


def starting_places(num_points: int, ndim: int) -> list[tuple[int, ...]]:
    """The ``num_points`` places of the smallest odd window that are nearest to its centre.

    A number of points that fills its window gives the window in row-major order.
    """
    radius = 0
    while (2 * radius + 1) ** ndim < num_points:
        radius += 1
    places = list(itertools.product(range(-radius, radius + 1), repeat=ndim))
    if num_points < len(places):
        places = sorted(places, key=lambda place: sum(step * step for step in place))[:num_points]
    return places
