"""Memberships kept as the queries and keys they come from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..backends import Operands, assign, group, labels
from ..geometry import Neighbourhood
from .heads import AssignmentOfHeads


class AttentionAssignment(AssignmentOfHeads):
    """Memberships of one grouping by attention, recomputed from queries and keys whenever they are used.

    Args:
        q: rotated group queries (B, H, N_out, D).
        k: rotated fine keys (B, H, N_in, D).
        neighbourhood: which groups a token sees.
        scale: factor of the logits.
        bias: table (H, *window) added to the logits, or None.
        valid: (B, N_in) boolean, false for tokens that belong to no group; None for all.
        valid_groups: (B, N_out) boolean, false for groups that nobody sees; None for all.
        compactness: (H,) in float32 at least, what logits lose per squared distance, or None.
        backend: see :func:`.functional.grouping_attention`.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        neighbourhood: Neighbourhood,
        scale: float,
        bias: Tensor | None = None,
        valid: Tensor | None = None,
        valid_groups: Tensor | None = None,
        compactness: Tensor | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        self.q = q
        self.k = k
        self.neighbourhood = neighbourhood
        self.scale = scale
        self.bias = bias
        self.valid = valid
        self.valid_groups = valid_groups
        self.compactness = compactness
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
        return self.q.shape[0]

    @property
    def num_heads(self) -> int:
        """Number of heads, H."""
        return self.q.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the memberships live."""
        return self.q.device

    @property
    def _dtype(self) -> torch.dtype:
        """Type of the queries and keys."""
        return self.q.dtype

    def assign_heads(self, values: Tensor) -> Tensor:
        """Carry values of the groups (B, H, N_out, C) to the tokens, head by head: (B, H, N_in, C)."""
        return assign(self._operands(values), self.backend)[0]

    def group_heads(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Average values of the tokens (B, H, N_in, C) over every group's members, head by head.

        Returns:
            (B, H, N_out, C), 0 for groups without members; the logarithm of the groups' masses (B, H, N_out).
        """
        grouped = group(self._operands(values), self.backend)
        return grouped.out, grouped.log_mass

    def _labels(self, nested: bool, per_head: bool) -> Tensor:
        """Most likely group of every fine token, tile by tile."""
        return labels(self._operands(self.q), per_head=per_head)  # whose values do not matter here

    def _operands(self, values: Tensor) -> Operands:
        """The call in the wider of the two dtypes."""
        dtype = torch.promote_types(self._dtype, values.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        return Operands(
            self.q.to(dtype),
            self.k.to(dtype),
            values.to(dtype),
            self.neighbourhood,
            self.scale,
            None if self.bias is None else self.bias.to(dtype),
            self.valid,
            self.valid_groups,
            compactness=None if self.compactness is None else self.compactness.to(wide),
        )


def _flatten(assignment: AttentionAssignment) -> tuple[list[Any], tuple[Any, ...]]:
    masks = [assignment.valid, assignment.valid_groups]
    tensors = [assignment.q, assignment.k, assignment.bias, *masks, assignment.compactness]
    return tensors, (assignment.neighbourhood, assignment.scale, assignment.backend)


def _unflatten(tensors: Any, static: tuple[Any, ...]) -> AttentionAssignment:
    q, k, *rest = tensors
    neighbourhood, scale, backend = static
    return AttentionAssignment(q, k, neighbourhood, scale, *rest, backend=backend)


pytree.register_pytree_node(
    AttentionAssignment,
    _flatten,
    _unflatten,
    serialized_type_name="spatial_grouping_attention.AttentionAssignment",
    to_dumpable_context=lambda static: [static[0].integers(), *static[1:]],
    from_dumpable_context=lambda dumped: (Neighbourhood.from_integers(dumped[0]), *dumped[1:]),
)
