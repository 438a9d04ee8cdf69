"""Memberships kept as points on the grid of groups and their weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..backends import deformable
from ..geometry import Neighbourhood
from .heads import AssignmentOfHeads


class DeformableAssignment(AssignmentOfHeads):
    """Memberships of one deformable grouping.

    Args:
        log_shares: logarithm of the share of every token that goes to each of its points (B, H, N_in, P).
        points: where the points lie, in steps of the grid of groups (B, H, N_in, P, ndim).
        neighbourhood: the grids of tokens and groups.
        valid: (B, N_in) boolean, false for tokens that belong to no group; None for all.
        valid_groups: (B, N_out) boolean, false for groups that nobody sees; None for all.
        backend: ``"auto"``, ``"reference"``, ``"native"`` or ``"triton"``.
    """

    def __init__(
        self,
        log_shares: Tensor,
        points: Tensor,
        neighbourhood: Neighbourhood,
        valid: Tensor | None = None,
        valid_groups: Tensor | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        self.log_shares = log_shares
        self.points = points
        self.neighbourhood = neighbourhood
        self.valid = valid
        self.valid_groups = valid_groups
        self.backend = backend

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
    def num_heads(self) -> int:
        """Number of heads, H."""
        return self.log_shares.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the memberships live."""
        return self.log_shares.device

    @property
    def _dtype(self) -> torch.dtype:
        """Type of the shares."""
        return self.log_shares.dtype

    def assign_heads(self, values: Tensor) -> Tensor:
        """What lies at a token's points, by their weights: (B, H, N_out, C) -> (B, H, N_in, C)."""
        values = _blanked(values, self.valid_groups)
        return deformable.assign(*self._places(values), values, self._groups(), self.backend)

    def group_heads(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Average what tokens (B, H, N_in, C) spread to the groups around their points.

        Returns:
            (B, H, N_out, C), 0 for groups without members; the logarithm of the groups' masses (B, H, N_out).
        """
        values = _blanked(values, self.valid)
        return deformable.pool(*self._places(values), values, self._groups(), self.backend)

    def sum_heads(self, values: Tensor) -> Tensor:
        """Sum what tokens (B, H, N_in, C) spread to the groups around their points: (B, H, N_out, C)."""
        values = _blanked(values, self.valid)
        return deformable.spread(*self._places(values), values, self._groups(), self.backend)

    def _labels(self, nested: bool, per_head: bool) -> Tensor:
        """Most likely group of every fine token."""
        return deformable.labels(self.log_shares, self.points, self._groups(), per_head=per_head)

    def _places(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Shares and points, in the dtype of values where that is the wider one."""
        log_shares, points = (x.to(torch.promote_types(x.dtype, values.dtype)) for x in (self.log_shares, self.points))
        return log_shares, points

    def _groups(self) -> deformable.Lattice:
        return deformable.lattice(self.output_shape, self.valid_groups)


def _blanked(values: Tensor, valid: Tensor | None) -> Tensor:
    """Zero what is not valid: it may be NaN, and 0 times NaN is NaN."""
    return values if valid is None else values.masked_fill(~valid[:, None, :, None], 0.0)


def _flatten(assignment: DeformableAssignment) -> tuple[list[Any], tuple[Neighbourhood, str]]:
    tensors = [assignment.log_shares, assignment.points, assignment.valid, assignment.valid_groups]
    return tensors, (assignment.neighbourhood, assignment.backend)


def _unflatten(tensors: Any, static: tuple[Neighbourhood, str]) -> DeformableAssignment:
    log_shares, points, valid, valid_groups = tensors
    neighbourhood, backend = static
    return DeformableAssignment(log_shares, points, neighbourhood, valid, valid_groups, backend=backend)


pytree.register_pytree_node(
    DeformableAssignment,
    _flatten,
    _unflatten,
    serialized_type_name="spatial_grouping_attention.DeformableAssignment",
    to_dumpable_context=lambda static: [static[0].integers(), static[1]],
    from_dumpable_context=lambda dumped: (Neighbourhood.from_integers(dumped[0]), dumped[1]),
)
