"""What every assignment can do, however its memberships are kept."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from .. import validation


class Usage(NamedTuple):
    """How evenly groups are used."""

    mass: Tensor
    """Tokens that belong to each group, counted by their memberships: ``A^T 1``, (B, N_out); sums to N_in."""
    unused: Tensor
    """Groups that are no token's most likely one, (B,) int64."""


class Assignment(ABC):
    """Soft memberships A of fine tokens (rows) in groups (columns), averaged over heads; rows sum to 1."""

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int, ...]:
        """Grid of the fine tokens."""

    @property
    @abstractmethod
    def output_shape(self) -> tuple[int, ...]:
        """Grid of the groups."""

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """Number of samples."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the memberships live."""

    @property
    def num_inputs(self) -> int:
        """Number of fine tokens, N_in."""
        return math.prod(self.input_shape)

    @property
    def num_groups(self) -> int:
        """Number of groups, N_out."""
        return math.prod(self.output_shape)

    def upsample(self, values: Tensor, *, hard: bool = False) -> Tensor:
        """Carry values of the groups to the fine tokens: ``A values``.

        Args:
            values: (B, N_out, C), for example class logits or features.
            hard: give every token the value of its one group (:meth:`hard_labels`) instead of a mixture; gradients
                then flow to the values only.

        Returns:
            (B, N_in, C).

        Raises:
            TypeError: values are not floating.
            ValueError: values have another shape.
        """
        self._check("N_out", values)
        if hard:
            return values.gather(1, self._rows(values))
        return self._upsample(_widened(values)).to(values.dtype)

    def sum(self, values: Tensor, *, hard: bool = False) -> Tensor:
        """Sum values of the fine tokens over the members of every group: ``A^T values``, upsample's adjoint.

        Args:
            values: (B, N_in, C).
            hard: let every token belong to its one group (:meth:`hard_labels`) only.

        Returns:
            (B, N_out, C).

        Raises:
            TypeError: values are not floating.
            ValueError: values have another shape.
        """
        self._check("N_in", values)
        if hard:
            wide = _widened(values)
            total = wide.new_zeros(self.batch_size, self.num_groups, values.shape[-1])
            return total.scatter_add(1, self._rows(values), wide).to(values.dtype)
        return self._sum(_widened(values)).to(values.dtype)

    def pool(self, values: Tensor, *, hard: bool = False) -> Tensor:
        """Average values of the fine tokens over the members of every group: ``A^T values / A^T 1``.

        Args:
            values: (B, N_in, C).
            hard: let every token belong to its one group (:meth:`hard_labels`) only.

        Returns:
            (B, N_out, C); 0 for groups without members.

        Raises:
            TypeError: values are not floating.
            ValueError: values have another shape.
        """
        self._check("N_in", values)
        wide = _widened(values)
        if hard:
            total = self.sum(torch.cat((wide, torch.ones_like(wide[..., :1])), -1), hard=True)
            return self._mean(total).to(values.dtype)
        return self._pool(wide).to(values.dtype)

    @abstractmethod
    def matrix(self) -> Tensor:
        """A itself, (B, N_in, N_out); for small grids."""

    @abstractmethod
    def labels(self) -> Tensor:
        """Most likely group of every fine token, (B, N_in) int64, without the matrix.

        Not differentiable. Ties go to the group that comes first.
        """

    def hard_labels(self) -> Tensor:
        """The one group of every fine token where memberships are hard, (B, N_in) int64."""
        return self.labels()

    @torch.no_grad()
    def usage(self) -> Usage:
        """Mass of every group, and how many groups are nobody's most likely one."""
        mass = self.sum(torch.ones(self.batch_size, self.num_inputs, 1, device=self.device)).squeeze(-1)
        chosen = torch.zeros_like(mass, dtype=torch.bool)
        chosen.scatter_(1, self.labels(), torch.ones_like(self.labels(), dtype=torch.bool))
        return Usage(mass, self.num_groups - chosen.sum(1))

    @torch.no_grad()
    def boundaries(self) -> Tensor:
        """Where neighbouring tokens have different labels, for drawing: (B, *input_shape) boolean.

        Both tokens of a differing pair are marked, so lines are two tokens wide.
        """
        return label_boundaries(self.labels().reshape(-1, *self.input_shape))

    @abstractmethod
    def _upsample(self, values: Tensor) -> Tensor:
        """``A values`` for checked values of float32 at least."""

    @abstractmethod
    def _sum(self, values: Tensor) -> Tensor:
        """``A^T values`` for checked values of float32 at least."""

    def _pool(self, values: Tensor) -> Tensor:
        """``A^T values / A^T 1`` for checked values of float32 at least."""
        return self._mean(self._sum(torch.cat((values, torch.ones_like(values[..., :1])), -1)))

    @staticmethod
    def _mean(total: Tensor) -> Tensor:
        """Sums whose last channel is the mass -> averages."""
        mass = total[..., -1:]
        return total[..., :-1] / mass.masked_fill(mass == 0, 1.0)

    def _rows(self, values: Tensor) -> Tensor:
        """Every token's one group, repeated for every channel of values."""
        return self.hard_labels().unsqueeze(-1).expand(-1, -1, values.shape[-1])

    def _check(self, axis: str, values: Tensor) -> None:
        size = self.num_groups if axis == "N_out" else self.num_inputs
        validation.floating("values", values)
        validation.shaped("values", values, f"B {axis} C", B=self.batch_size, **{axis: size})


def _widened(values: Tensor) -> Tensor:
    """Half types cannot hold the sums over many tokens."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def merge_heads(out: Tensor, log_mass: Tensor) -> Tensor:
    """Heads' averages (B, H, N_out, C) -> the average over all heads' members (B, N_out, C).

    Heads share a group in proportion to their masses, taken from their logarithms (B, H, N_out): a group that every
    head neglects still has a well-defined average.
    """
    empty = (log_mass == -torch.inf).all(1, keepdim=True)
    weights = log_mass.masked_fill(empty, 0.0).softmax(1)
    return (weights.unsqueeze(-1) * out).sum(1)


def label_boundaries(labels: Tensor) -> Tensor:
    """Mark both sides of every change between neighbours on the grid: (B, *grid) -> (B, *grid) boolean."""
    marked = torch.zeros_like(labels, dtype=torch.bool)
    for dim in range(1, labels.ndim):
        size = labels.shape[dim] - 1
        changes = labels.narrow(dim, 0, size) != labels.narrow(dim, 1, size)
        marked.narrow(dim, 0, size).logical_or_(changes)
        marked.narrow(dim, 1, size).logical_or_(changes)
    return marked


@torch.no_grad()
def labels_by_columns(assignment: Assignment, groups_at_once: int = 64) -> Tensor:
    """Most likely group of every token from ``upsample`` alone, holding a few columns of A at a time.

    Args:
        assignment: any assignment.
        groups_at_once: columns held at a time; memory is B * N_in times this.

    Returns:
        (B, N_in) int64.
    """
    batch, num_groups, device = assignment.batch_size, assignment.num_groups, assignment.device
    best = torch.full((batch, assignment.num_inputs), -torch.inf, device=device)
    label = torch.zeros(batch, assignment.num_inputs, dtype=torch.long, device=device)
    for first in range(0, num_groups, groups_at_once):
        columns = torch.arange(first, min(first + groups_at_once, num_groups), device=device)
        one_hot = torch.zeros(batch, num_groups, len(columns), device=device)
        one_hot[:, columns, columns - first] = 1.0
        share, group = assignment.upsample(one_hot).max(-1)
        better = share > best
        label = torch.where(better, group + first, label)
        best = torch.where(better, share, best)
    return label
