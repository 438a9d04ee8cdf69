"""What every assignment can do, however its memberships are kept."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

import torch
from RoSE.validation import require_floating, require_sizes
from torch import Tensor
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from typing_extensions import Self


class Movable:
    """A pytree whose tensors can be taken out of the graph, or elsewhere, all at once."""

    def detach(self) -> Self:
        """The same without history: what is done with it no longer reaches the layer."""
        detached: Self = pytree.tree_map_only(Tensor, Tensor.detach, self)
        return detached

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> Self:
        """The same on another device.

        Args:
            device: where to; dtypes stay as they are.
            non_blocking: see :meth:`torch.Tensor.to`.
        """
        target = torch.device(device)
        moved: Self = pytree.tree_map_only(Tensor, lambda x: x.to(target, non_blocking=non_blocking), self)
        return moved


class Usage(NamedTuple):
    """How evenly groups are used."""

    mass: Tensor
    """Tokens that belong to each group, counted by their memberships: ``A^T 1``, (B, N_out); sums to the number of
    valid tokens."""
    unused: Tensor
    """Valid groups that are no token's most likely one, (B,) int64."""


class Assignment(Movable, ABC):
    """Soft memberships A of fine tokens (rows) in groups (columns), averaged over heads.

    Rows sum to 1. Rows of tokens and columns of groups that are not valid are 0: what is carried to such a token is
    0, its label is -1, and whatever values are given for it do not matter.
    """

    # Not a dataclass: code that walks through containers rebuilds those from parts it has changed.
    valid: Tensor | None
    """Which tokens are real, (B, N_in) boolean; None for all."""
    valid_groups: Tensor | None
    """Which groups are real, (B, N_out) boolean; None for all."""

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
            (B, N_in, C); 0 for tokens that are not valid.

        Raises:
            TypeError: values are not floating.
            ValueError: values have another shape.
        """
        self._check("N_out", values)
        if hard:
            labels = self.hard_labels().unsqueeze(-1)
            rows = labels.clamp(min=0).expand(-1, -1, values.shape[-1])
            return values.gather(1, rows).masked_fill(labels < 0, 0.0)
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
            return self._hard_sum(_widened(values)).to(values.dtype)
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
        pooled = averages(self._hard_sum(with_ones(wide))) if hard else self._pool(wide)
        return pooled.to(values.dtype)

    @abstractmethod
    def matrix(self) -> Tensor:
        """A itself, (B, N_in, N_out); for small grids."""

    @abstractmethod
    def labels(self) -> Tensor:
        """Most likely group of every fine token, (B, N_in) int64, without the matrix; -1 for tokens that are not valid.

        Not differentiable. Ties go to the group that comes first.
        """

    def hard_labels(self) -> Tensor:
        """The one group of every fine token where memberships are hard, (B, N_in) int64; -1 as in :meth:`labels`."""
        return self.labels()

    @torch.no_grad()
    def usage(self) -> Usage:
        """Mass of every group, and how many groups are nobody's most likely one."""
        mass = self.sum(torch.ones(self.batch_size, self.num_inputs, 1, device=self.device)).squeeze(-1)
        # Labels count from -1, which is in no group's place.
        chosen = mass.new_zeros(self.batch_size, self.num_groups + 1)
        used = chosen.scatter(1, self.labels() + 1, 1.0)[:, 1:] > 0
        unused = ~used if self.valid_groups is None else ~used & self.valid_groups
        return Usage(mass, unused.sum(1))

    @torch.no_grad()
    def boundaries(self) -> Tensor:
        """Where neighbouring tokens have different labels, for drawing: (B, *input_shape) boolean.

        Both tokens of a differing pair are marked, so lines are two tokens wide. The edge of the valid tokens is no
        boundary, as the edge of the grid is none.
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
        return averages(self._sum(with_ones(values)))

    def _hard_sum(self, values: Tensor) -> Tensor:
        labels = self.hard_labels().unsqueeze(-1)
        rows = labels.clamp(min=0).expand(-1, -1, values.shape[-1])
        total = values.new_zeros(self.batch_size, self.num_groups, values.shape[-1])
        return total.scatter_add(1, rows, values.masked_fill(labels < 0, 0.0))

    def _check(self, axis: str, values: Tensor) -> None:
        size = self.num_groups if axis == "N_out" else self.num_inputs
        require_floating("values", values)
        require_sizes("values", values, f"B {axis} C", B=self.batch_size, **{axis: size})


def _widened(values: Tensor) -> Tensor:
    """Half types cannot hold the sums over many tokens."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def with_ones(values: Tensor) -> Tensor:
    """One more channel, whose sum over a group's members is the group's mass."""
    return torch.cat((values, torch.ones_like(values[..., :1])), -1)


def averages(total: Tensor) -> Tensor:
    """Sums whose last channel is the mass -> averages, 0 where the mass is."""
    mass = total[..., -1:]
    return total[..., :-1] / mass.masked_fill(mass == 0, 1.0)


def label_boundaries(labels: Tensor) -> Tensor:
    """Mark both sides of every change between neighbours that have a label: (B, *grid) -> (B, *grid) boolean."""
    marked = torch.zeros_like(labels, dtype=torch.bool)
    for dim in range(1, labels.ndim):
        size = labels.shape[dim] - 1
        one, other = labels.narrow(dim, 0, size), labels.narrow(dim, 1, size)
        changes = (one != other) & (one >= 0) & (other >= 0)
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
        (B, N_in) int64; -1 for tokens that belong to nobody.
    """
    batch, num_groups, device = assignment.batch_size, assignment.num_groups, assignment.device
    best = torch.zeros(batch, assignment.num_inputs, device=device)
    label = torch.full((batch, assignment.num_inputs), -1, device=device)
    for first in range(0, num_groups, groups_at_once):
        columns = torch.arange(first, min(first + groups_at_once, num_groups), device=device)
        one_hot = torch.zeros(batch, num_groups, len(columns), device=device)
        one_hot[:, columns, columns - first] = 1.0
        share, group = assignment.upsample(one_hot).max(-1)
        better = share > best
        label = torch.where(better, group + first, label)
        best = torch.where(better, share, best)
    return label
