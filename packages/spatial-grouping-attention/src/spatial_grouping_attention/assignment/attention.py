"""Memberships kept as the queries and keys they come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import repeat
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import functional
from ..functional.labels import most_likely_groups
from ..functional.reference import logits
from ..geometry import Neighbourhood
from .base import Assignment, merge_heads


@dataclass(frozen=True, eq=False)
class AttentionAssignment(Assignment):
    """Memberships of one grouping by attention, recomputed from queries and keys whenever they are used.

    Args:
        q: rotated group queries (B, H, N_out, D).
        k: rotated fine keys (B, H, N_in, D).
        neighbourhood: which groups a token sees.
        scale: factor of the logits.
        bias: table (H, *window) added to the logits, or None.
        backend: see :func:`.functional.grouping_attention`.
    """

    q: Tensor
    k: Tensor
    neighbourhood: Neighbourhood
    scale: float
    bias: Tensor | None = None
    backend: str = "auto"

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
    def device(self) -> torch.device:
        """Where the memberships live."""
        return self.q.device

    def _upsample(self, values: Tensor) -> Tensor:
        """``A values``, by the attention operator."""
        q, k, bias, per_head = self._with_heads(values)
        out, _ = functional.assign(
            q, k, per_head, self.neighbourhood, scale=self.scale, bias=bias, backend=self.backend
        )
        return out.mean(1)

    def _pool(self, values: Tensor) -> Tensor:
        """``A^T values / A^T 1``, also where a group\'s mass is too small for its dtype."""
        return merge_heads(*self._group(values))

    def _sum(self, values: Tensor) -> Tensor:
        """``A^T values``, by the grouping operator."""
        out, log_mass = self._group(values)
        return (log_mass.exp()[..., None] * out).mean(1)

    def matrix(self) -> Tensor:
        """A itself, (B, N_in, N_out); for small grids."""
        scores = logits(self.q, self.k, self.neighbourhood, self.scale, self.bias, None)
        return scores.softmax(-1).mean(1)

    def labels(self) -> Tensor:
        """Most likely group under the mean over heads, tile by tile."""
        return most_likely_groups(self.q, self.k, self.neighbourhood, self.scale, self.bias)

    def _group(self, values: Tensor) -> tuple[Tensor, Tensor]:
        q, k, bias, per_head = self._with_heads(values)
        grouped = functional.group(
            q, k, per_head, self.neighbourhood, scale=self.scale, bias=bias, backend=self.backend
        )
        return grouped.out, grouped.log_mass

    def _with_heads(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Repeat values for every head, all in the wider of the two dtypes."""
        dtype = torch.promote_types(self.q.dtype, values.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        per_head = repeat(values.to(dtype), "b n c -> b h n c", h=self.q.shape[1])
        return self.q.to(dtype), self.k.to(dtype), bias, per_head


def _flatten(assignment: AttentionAssignment) -> tuple[list[Any], tuple[Any, ...]]:
    static = (assignment.neighbourhood, assignment.scale, assignment.backend)
    return [assignment.q, assignment.k, assignment.bias], static


def _unflatten(tensors: Any, static: tuple[Any, ...]) -> AttentionAssignment:
    q, k, bias = tensors
    neighbourhood, scale, backend = static
    return AttentionAssignment(q, k, neighbourhood, scale, bias, backend)


pytree.register_pytree_node(
    AttentionAssignment,
    _flatten,
    _unflatten,
    serialized_type_name="spatial_grouping_attention.AttentionAssignment",
    to_dumpable_context=lambda static: [static[0].integers(), *static[1:]],
    from_dumpable_context=lambda dumped: (Neighbourhood.from_integers(dumped[0]), *dumped[1:]),
)
