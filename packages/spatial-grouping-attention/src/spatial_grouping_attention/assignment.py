"""Memberships of fine tokens in groups: kept as the queries and keys they come from, never as a matrix.

``upsample`` carries anything known of the groups to the tokens, ``pool`` averages anything known of the tokens
over the groups. Both are attention with the layer's own queries and keys, so they cost as little as a forward
pass, they take any number of channels, and gradients flow through them into the layer.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from einops import repeat
from torch import Tensor
from torch.utils import _pytree as pytree

from . import functional, validation
from .functional.labels import most_likely_groups
from .functional.reference import logits
from .geometry import Neighbourhood


class Members(Protocol):
    """What a single assignment and a chain of them have in common."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Grid of the fine tokens."""

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Grid of the groups."""

    def upsample(self, values: Tensor) -> Tensor:
        """Values of the groups (B, N_out, C) -> of the fine tokens (B, N_in, C)."""

    def pool(self, values: Tensor) -> Tensor:
        """Values of the fine tokens (B, N_in, C) -> averages over the groups (B, N_out, C)."""

    def labels(self) -> Tensor:
        """Most likely group of every fine token, (B, N_in)."""


@dataclass(frozen=True, eq=False)
class Assignment:
    """Soft memberships A (rows: fine tokens, columns: groups) of one grouping, averaged over heads.

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

    def upsample(self, values: Tensor) -> Tensor:
        """Carry values of the groups to the fine tokens: ``A values``.

        Args:
            values: (B, N_out, C), for example class logits or features.

        Returns:
            (B, N_in, C): every token mixes the groups it belongs to; rows of A sum to 1.

        Raises:
            TypeError: values are not floating.
            ValueError: values have another shape.
        """
        q, k, bias, per_head = self._with_heads("N_out", values)
        out, _ = functional.assign(
            q, k, per_head, self.neighbourhood, scale=self.scale, bias=bias, backend=self.backend
        )
        return out.mean(1).to(values.dtype)

    def pool(self, values: Tensor) -> Tensor:
        """Average values of the fine tokens over the members of every group: ``A^T values / A^T 1``.

        Args:
            values: (B, N_in, C).

        Returns:
            (B, N_out, C); 0 for groups that no token sees.

        Raises:
            TypeError: values are not floating.
            ValueError: values have another shape.
        """
        out, log_mass = self._group(values)
        # Heads share a group's average in proportion to their masses, computed from logarithms: a group that
        # every head neglects still has a well-defined average.
        empty = (log_mass == -torch.inf).all(1, keepdim=True)
        weights = log_mass.masked_fill(empty, 0.0).softmax(1)
        return (weights[..., None] * out).sum(1).to(values.dtype)

    def sum(self, values: Tensor) -> Tensor:
        """Sum values of the fine tokens over the members of every group: ``A^T values``, upsample's adjoint.

        Args:
            values: (B, N_in, C).

        Returns:
            (B, N_out, C).

        Raises:
            TypeError: values are not floating.
            ValueError: values have another shape.
        """
        out, log_mass = self._group(values)
        return (log_mass.exp()[..., None] * out).mean(1).to(values.dtype)

    def matrix(self) -> Tensor:
        """A itself, (B, N_in, N_out), mean over heads; for small grids. Rows sum to 1."""
        scores = logits(self.q, self.k, self.neighbourhood, self.scale, self.bias, None)
        return scores.softmax(-1).mean(1)

    def labels(self) -> Tensor:
        """Most likely group of every fine token under the mean over heads, (B, N_in) int64; no dense matrix.

        Not differentiable. Ties go to the group that comes first.
        """
        return most_likely_groups(self.q, self.k, self.neighbourhood, self.scale, self.bias)

    def _group(self, values: Tensor) -> tuple[Tensor, Tensor]:
        q, k, bias, per_head = self._with_heads("N_in", values)
        grouped = functional.group(
            q, k, per_head, self.neighbourhood, scale=self.scale, bias=bias, backend=self.backend
        )
        return grouped.out, grouped.log_mass

    def _with_heads(self, axis: str, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Check values and repeat them for every head, all in the wider of the two dtypes."""
        sizes = {"B": self.q.shape[0], "N_out": self.q.shape[2], "N_in": self.k.shape[2]}
        validation.floating("values", values)
        validation.shaped("values", values, f"B {axis} C", B=sizes["B"], **{axis: sizes[axis]})
        dtype = torch.promote_types(self.q.dtype, values.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        per_head = repeat(values.to(dtype), "b n c -> b h n c", h=self.q.shape[1])
        return self.q.to(dtype), self.k.to(dtype), bias, per_head


@dataclass(frozen=True, eq=False)
class ComposedAssignment:
    """Memberships of the first tokens in the last groups, through every stage in between.

    The matrix of the chain is the product of the stages' matrices and dense even where they are sparse, so it is
    never formed: values pass one stage after another.
    """

    stages: tuple[Assignment, ...]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Grid of the first stage's tokens."""
        return self.stages[0].input_shape

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Grid of the last stage's groups."""
        return self.stages[-1].output_shape

    def upsample(self, values: Tensor) -> Tensor:
        """Carry values of the last groups (B, N_out, C) to the first tokens (B, N_in, C): ``A_1 A_2 ... values``."""
        for stage in reversed(self.stages):
            values = stage.upsample(values)
        return values

    def pool(self, values: Tensor) -> Tensor:
        """Average values of the first tokens (B, N_in, C) over the members of every last group (B, N_out, C)."""
        total = self.sum(torch.cat((values, torch.ones_like(values[..., :1])), -1))
        mass = total[..., -1:]
        return total[..., :-1] / mass.masked_fill(mass == 0, 1.0)

    def sum(self, values: Tensor) -> Tensor:
        """Sum values of the first tokens (B, N_in, C) over the members of every last group (B, N_out, C)."""
        for stage in self.stages:
            values = stage.sum(values)
        return values

    def matrix(self) -> Tensor:
        """The product of the stages' matrices, (B, N_in, N_out); for small grids. Rows sum to 1."""
        product = self.stages[0].matrix()
        for stage in self.stages[1:]:
            product = product @ stage.matrix()
        return product

    @torch.no_grad()
    def labels(self, *, groups_at_once: int = 64) -> Tensor:
        """Most likely last group of every first token, (B, N_in) int64.

        Args:
            groups_at_once: columns of the chain's matrix that are held at a time; memory is N_in times this.
        """
        last = self.stages[-1]
        batch, _, num_groups, _ = last.q.shape
        best = label = None
        for first in range(0, num_groups, groups_at_once):
            columns = torch.arange(first, min(first + groups_at_once, num_groups), device=last.q.device)
            one_hot = torch.zeros(batch, num_groups, len(columns), device=last.q.device)
            one_hot[:, columns, columns - first] = 1.0
            share, group = self.upsample(one_hot).max(-1)
            if best is None or label is None:
                best, label = share, group
            else:
                label = torch.where(share > best, group + first, label)
                best = torch.maximum(best, share)
        assert label is not None
        return label


def compose(assignments: Sequence[Assignment]) -> ComposedAssignment:
    """Chain the assignments of stacked stages, first stage first.

    Args:
        assignments: one per stage; the groups of each are the tokens of the next.

    Returns:
        The memberships of the first stage's tokens in the last stage's groups.

    Raises:
        TypeError: an entry is not an Assignment.
        ValueError: there is none, or two neighbouring stages do not fit.
    """
    stages = tuple(assignments)
    if not stages:
        raise ValueError("compose needs at least one assignment, got none")
    for stage in stages:
        if not isinstance(stage, Assignment):
            raise TypeError(f"compose takes Assignments, got {type(stage).__name__}")
    for i, (fine, coarse) in enumerate(itertools.pairwise(stages)):
        if fine.output_shape != coarse.input_shape or fine.q.shape[0] != coarse.q.shape[0]:
            raise ValueError(
                f"the groups of each stage must be the tokens of the next: stage {i} has groups "
                f"{fine.output_shape} for batch {fine.q.shape[0]}, stage {i + 1} has tokens {coarse.input_shape} "
                f"for batch {coarse.q.shape[0]}"
            )
    return ComposedAssignment(stages)


def _flatten(assignment: Assignment) -> tuple[list[Any], tuple[Any, ...]]:
    static = (assignment.neighbourhood, assignment.scale, assignment.backend)
    return [assignment.q, assignment.k, assignment.bias], static


def _unflatten(tensors: Any, static: tuple[Any, ...]) -> Assignment:
    q, k, bias = tensors
    neighbourhood, scale, backend = static
    return Assignment(q, k, neighbourhood, scale, bias, backend)


pytree.register_pytree_node(
    Assignment, _flatten, _unflatten, serialized_type_name="spatial_grouping_attention.Assignment"
)
pytree.register_pytree_node(
    ComposedAssignment,
    lambda chain: (list(chain.stages), None),
    lambda stages, _: ComposedAssignment(tuple(stages)),
    serialized_type_name="spatial_grouping_attention.ComposedAssignment",
)
