"""Memberships through several stages."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .base import Assignment, averages, labels_by_columns, with_ones


class ComposedAssignment(Assignment):
    """Memberships of the first tokens in the last groups, through every stage in between; made by :func:`compose`.

    The matrix of the chain is the product of the stages' matrices and dense even where they are sparse, so it is
    never formed: values pass one stage after another.

    Args:
        stages: one assignment per stage, first stage first.
    """

    def __init__(self, stages: tuple[Assignment, ...]) -> None:
        self.stages = stages
        self.valid = stages[0].valid
        self.valid_groups = stages[-1].valid_groups

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Grid of the first stage's tokens."""
        return self.stages[0].input_shape

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Grid of the last stage's groups."""
        return self.stages[-1].output_shape

    @property
    def batch_size(self) -> int:
        """Number of samples."""
        return self.stages[0].batch_size

    @property
    def num_heads(self) -> int:
        """Number of heads of a single stage."""
        return self._single().num_heads

    @property
    def device(self) -> torch.device:
        """Where the memberships live."""
        return self.stages[0].device

    def _upsample(self, values: Tensor, per_head: bool) -> Tensor:
        """``A_1 A_2 ... A_L values``, last stage first."""
        for stage in reversed(self.stages):
            values = stage.upsample(values, per_head=per_head)
        return values

    def _sum(self, values: Tensor, per_head: bool) -> Tensor:
        """``A_L^T ... A_1^T values``, first stage first."""
        for stage in self.stages:
            values = stage.sum(values, per_head=per_head)
        return values

    def _pool(self, values: Tensor, per_head: bool) -> Tensor:
        """``A^T values / A^T 1``; of a single stage as that stage does it."""
        if len(self.stages) == 1:
            return self.stages[0].pool(values, per_head=per_head)
        return averages(self._sum(with_ones(values), per_head))

    @property
    def _dtype(self) -> torch.dtype:
        return self.stages[-1]._dtype

    @property
    def _heads_of_matrix(self) -> int:
        return self.stages[0]._heads_of_matrix

    def _matrix(self, dtype: torch.dtype, per_head: bool) -> Tensor:
        """The product of the stages' matrices."""
        product = self.stages[-1]._matrix(dtype, per_head)
        for stage in reversed(self.stages[:-1]):
            product = stage.upsample(product)
        return product

    def _labels(self, nested: bool, per_head: bool) -> Tensor:
        """Most likely last group of every first token, through all memberships in between or stage by stage."""
        if per_head or len(self.stages) == 1:
            return self._single().labels(nested=nested, per_head=per_head)
        if not nested:
            return labels_by_columns(self)
        labels = self.stages[0].labels(nested=True)
        for stage in self.stages[1:]:
            labels = stage.labels(nested=True).gather(1, labels.clamp(min=0)).where(labels >= 0, labels)
        return labels

    def _single(self) -> Assignment:
        """The one stage whose heads are asked for."""
        if len(self.stages) > 1:
            raise ValueError(
                "per_head must be False for a chain of several stages, whose heads do not correspond; got True for "
                f"{len(self.stages)} stages"
            )
        return self.stages[0]


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
    if isinstance(assignments, Assignment) or not isinstance(assignments, Iterable):
        raise TypeError(f"assignments must be a sequence of Assignments; got {type(assignments).__name__}")
    stages = tuple(assignments)
    if not stages:
        raise ValueError("assignments must hold at least one Assignment; got none")
    for i, stage in enumerate(stages):
        if not isinstance(stage, Assignment):
            raise TypeError(f"assignments[{i}] must be an Assignment; got {type(stage).__name__}")
    for i, (fine, coarse) in enumerate(itertools.pairwise(stages)):
        if fine.output_shape != coarse.input_shape or fine.batch_size != coarse.batch_size:
            raise ValueError(
                f"assignments must fit, the groups of each being the tokens of the next; got stage {i} with groups "
                f"{fine.output_shape} for batch {fine.batch_size}, stage {i + 1} with tokens {coarse.input_shape} "
                f"for batch {coarse.batch_size}"
            )
    return ComposedAssignment(stages)


def _flatten(chain: ComposedAssignment) -> tuple[list[Any], None]:
    return list(chain.stages), None


def _unflatten(stages: Any, _: None) -> ComposedAssignment:
    return ComposedAssignment(tuple(stages))


pytree.register_pytree_node(
    ComposedAssignment,
    _flatten,
    _unflatten,
    serialized_type_name="spatial_grouping_attention.ComposedAssignment",
)
