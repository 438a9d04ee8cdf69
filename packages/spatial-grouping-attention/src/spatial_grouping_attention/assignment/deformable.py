"""Memberships kept as points on the grid of groups and their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import repeat
from torch import Tensor
from torch.utils import _pytree as pytree

from ..functional import deformable
from ..geometry import Neighbourhood
from .base import Assignment, labels_by_columns, merge_heads


@dataclass(frozen=True, eq=False)
class DeformableAssignment(Assignment):
    """Memberships of one deformable grouping.

    Args:
        log_shares: logarithm of the share of every token that goes to each of its points (B, H, N_in, P).
        points: where the points lie, in steps of the grid of groups (B, H, N_in, P, ndim).
        neighbourhood: the grids of tokens and groups.
    """

    log_shares: Tensor
    points: Tensor
    neighbourhood: Neighbourhood

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Grid of the fine tokens."""
        return self.neighbourhood.input_shape

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Grid of the groups."""
        return self.neighbourhood.output_shape

    @property
    def batch_size(self) -> int:
        """Number of samples."""
        return self.log_shares.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the memberships live."""
        return self.log_shares.device

    def _upsample(self, values: Tensor) -> Tensor:
        """``A values``: what lies at a token's points, by their weights."""
        return deformable.assign(self.log_shares, self.points, self._per_head(values), self.output_shape).mean(1)

    def _sum(self, values: Tensor) -> Tensor:
        """``A^T values``: what tokens spread to the groups around their points."""
        return deformable.collect(self.log_shares, self.points, self._per_head(values), self.output_shape).mean(1)

    def _pool(self, values: Tensor) -> Tensor:
        """``A^T values / A^T 1``, also where a group's mass is too small for its dtype."""
        return merge_heads(*deformable.pool(self.log_shares, self.points, self._per_head(values), self.output_shape))

    def matrix(self) -> Tensor:
        """A itself, (B, N_in, N_out); for small grids."""
        one_hot = torch.eye(self.num_groups, dtype=self.log_shares.dtype, device=self.device)
        return self.upsample(one_hot.expand(self.batch_size, -1, -1))

    def labels(self) -> Tensor:
        """Most likely group under the mean over heads, a few groups at a time."""
        return labels_by_columns(self)

    def _per_head(self, values: Tensor) -> Tensor:
        return repeat(values, "b n c -> b h n c", h=self.log_shares.shape[1])


def _flatten(assignment: DeformableAssignment) -> tuple[list[Any], Neighbourhood]:
    return [assignment.log_shares, assignment.points], assignment.neighbourhood


def _unflatten(tensors: Any, neighbourhood: Neighbourhood) -> DeformableAssignment:
    log_shares, points = tensors
    return DeformableAssignment(log_shares, points, neighbourhood)


pytree.register_pytree_node(
    DeformableAssignment,
    _flatten,
    _unflatten,
    serialized_type_name="spatial_grouping_attention.DeformableAssignment",
    to_dumpable_context=Neighbourhood.integers,
    from_dumpable_context=Neighbourhood.from_integers,
)
