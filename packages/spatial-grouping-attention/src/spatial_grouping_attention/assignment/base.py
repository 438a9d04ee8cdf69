"""What every assignment can do, however its memberships are kept."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

import torch
from RoSE.validation import require_affordable, require_flag, require_floating, require_int, require_sizes
from torch import Tensor
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from typing_extensions import Self


MAX_MATRIX_BYTES = 16 * 2**30


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
    """Soft memberships A of fine tokens (rows) in groups (columns).

    Rows sum to 1. Rows of tokens and columns of groups that are not valid are 0: what is carried to such a token is
    0, its label is -1, and whatever values are given for it do not matter.

    Every head of a layer has memberships of its own, and groups by them. What is shown here is their mean over heads,
    one map for people and losses to look at; ``per_head=True`` gives the heads themselves, behind the batch (B, H,
    ...), so that ``pool(v, per_head=True)`` of a layer's own values is the layer's own grouping. Heads of several
    stages do not correspond, so a chain of those has the mean only.

    A token's label is its most likely group. In a chain that has two meanings, and ``nested`` chooses the same one
    wherever labels occur: False, the largest entry of the chain's memberships, through every way from the token to a
    group; or True, the group that is reached by the most likely group of every stage, so that segments are nested
    (tokens that share a group in one stage share it in all later ones). For one stage both are the same.

    All results are those of the memberships at their own precision, whether or not autocast is on.
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
    def num_heads(self) -> int:
        """Number of heads, H.

        Raises:
            ValueError: a chain of several stages has none.
        """

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

    def upsample(self, values: Tensor, *, hard: bool = False, nested: bool = False, per_head: bool = False) -> Tensor:
        """Carry values of the groups to the fine tokens: ``A values``.

        Args:
            values: (B, N_out, C), for example class logits or features; with ``per_head`` also (B, H, N_out, C).
            hard: give every token the value of its one group (:meth:`labels`) instead of a mixture; gradients then
                flow to the values only.
            nested: which label of a chain is meant; only where ``hard``.
            per_head: do not average over heads.

        Returns:
            (B, N_in, C), or (B, H, N_in, C) per head; 0 for tokens that are not valid.

        Raises:
            TypeError: values are not floating.
            ValueError: values have another shape, ``nested`` without ``hard``, or heads of a chain are asked for.
        """
        self._check("N_out", values, hard, nested, per_head)
        if hard:
            values, labels, rows = self._with_labels(values, nested, per_head)
            return values.gather(-2, rows).masked_fill(labels < 0, 0.0)
        return self._upsample(_widened(values), per_head).to(values.dtype)

    def sum(self, values: Tensor, *, hard: bool = False, nested: bool = False, per_head: bool = False) -> Tensor:
        """Sum values of the fine tokens over the members of every group: ``A^T values``, upsample's adjoint.

        Args:
            values: (B, N_in, C); with ``per_head`` also (B, H, N_in, C).
            hard: let every token belong to its one group (:meth:`labels`) only.
            nested: which label of a chain is meant; only where ``hard``.
            per_head: do not average over heads.

        Returns:
            (B, N_out, C), or (B, H, N_out, C) per head.

        Raises:
            TypeError: values are not floating.
            ValueError: values have another shape, ``nested`` without ``hard``, or heads of a chain are asked for.
        """
        self._check("N_in", values, hard, nested, per_head)
        wide = _widened(values)
        total = self._hard_sum(wide, nested, per_head) if hard else self._sum(wide, per_head)
        return total.to(values.dtype)

    def pool(self, values: Tensor, *, hard: bool = False, nested: bool = False, per_head: bool = False) -> Tensor:
        """Average values of the fine tokens over the members of every group: ``A^T values / A^T 1``.

        Args:
            values: (B, N_in, C); with ``per_head`` also (B, H, N_in, C).
            hard: let every token belong to its one group (:meth:`labels`) only.
            nested: which label of a chain is meant; only where ``hard``.
            per_head: average over the members that every head has, each by itself: what the layer does.

        Returns:
            (B, N_out, C), or (B, H, N_out, C) per head; 0 for groups without members.

        Raises:
            TypeError: values are not floating.
            ValueError: values have another shape, ``nested`` without ``hard``, or heads of a chain are asked for.
        """
        self._check("N_in", values, hard, nested, per_head)
        wide = _widened(values)
        pooled = averages(self._hard_sum(with_ones(wide), nested, per_head)) if hard else self._pool(wide, per_head)
        return pooled.to(values.dtype)

    def matrix(self, *, per_head: bool = False, max_bytes: int = MAX_MATRIX_BYTES) -> Tensor:
        """A itself; for small grids.

        Args:
            per_head: the matrix of every head.
            max_bytes: the most that the matrices of all heads may take, which are made for their mean too; in a chain
                those of its first stage's heads.

        Returns:
            (B, N_in, N_out), or (B, H, N_in, N_out) per head, of float32 at least.

        Raises:
            TypeError: ``per_head`` is not True or False, or ``max_bytes`` no integer.
            ValueError: the matrices would take more than ``max_bytes``, or heads of a chain are asked for.
        """
        if require_flag("per_head", per_head):
            _ = self.num_heads  # which a chain has none of
        dtype = torch.promote_types(self._dtype, torch.float32)
        require_affordable(
            "the matrices",
            self.batch_size * self._heads_of_matrix * self.num_inputs * self.num_groups * dtype.itemsize,
            "max_bytes",
            require_int("max_bytes", max_bytes, minimum=1),
            f"{self.num_inputs} tokens and {self.num_groups} groups",
            "upsample, sum, pool and labels do without",
        )
        return self._matrix(dtype, per_head)

    def labels(self, *, nested: bool = False, per_head: bool = False) -> Tensor:
        """Most likely group of every fine token, without the matrix.

        Not differentiable. Ties go to the group that comes first.

        Args:
            nested: which label of a chain is meant, see the class: the largest of its memberships, or, cheaper, the
                group that is reached stage by stage.
            per_head: the labels of every head.

        Returns:
            (B, N_in) int64, or (B, H, N_in) per head; -1 for tokens that belong to nobody (not valid, or NaN), and
            where a nested way ends at a group that is not valid.

        Raises:
            TypeError: ``nested`` or ``per_head`` is not True or False.
            ValueError: heads of a chain are asked for.
        """
        return self._labels(require_flag("nested", nested), require_flag("per_head", per_head))

    def usage(self, *, nested: bool = False) -> Usage:
        """Mass of every group, and how many groups are nobody's most likely one (:meth:`labels`)."""
        with torch.no_grad():
            mass = self.sum(torch.ones(self.batch_size, self.num_inputs, 1, device=self.device)).squeeze(-1)
        # Labels count from -1, which is in no group's place.
        chosen = mass.new_zeros(self.batch_size, self.num_groups + 1)
        used = chosen.scatter(1, self.labels(nested=nested) + 1, 1.0)[:, 1:] > 0
        unused = ~used if self.valid_groups is None else ~used & self.valid_groups
        return Usage(mass, unused.sum(1))

    def boundaries(self, *, nested: bool = False) -> Tensor:
        """Where neighbouring tokens have different labels (:meth:`labels`): (B, *input_shape) boolean.

        For drawing: both tokens of a differing pair are marked, so lines are two tokens wide. The edge of the valid
        tokens is no boundary, as the edge of the grid is none.
        """
        return label_boundaries(self.labels(nested=nested).reshape(self.batch_size, *self.input_shape))

    @property
    @abstractmethod
    def _dtype(self) -> torch.dtype:
        """Type of what the memberships are made of; not public, or code that casts takes assignments for tensors."""

    @property
    @abstractmethod
    def _heads_of_matrix(self) -> int:
        """How many matrices :meth:`matrix` makes, whether or not their mean is taken."""

    @abstractmethod
    def _matrix(self, dtype: torch.dtype, per_head: bool) -> Tensor:
        """:meth:`matrix` that may be made, of float32 at least."""

    @abstractmethod
    def _labels(self, nested: bool, per_head: bool) -> Tensor:
        """:meth:`labels` for checked flags."""

    @abstractmethod
    def _upsample(self, values: Tensor, per_head: bool) -> Tensor:
        """``A values`` for checked values of float32 at least."""

    @abstractmethod
    def _sum(self, values: Tensor, per_head: bool) -> Tensor:
        """``A^T values`` for checked values of float32 at least."""

    @abstractmethod
    def _pool(self, values: Tensor, per_head: bool) -> Tensor:
        """``A^T values / A^T 1`` for checked values of float32 at least."""

    def _hard_sum(self, values: Tensor, nested: bool, per_head: bool) -> Tensor:
        values, labels, rows = self._with_labels(values, nested, per_head)
        total = values.new_zeros(*values.shape[:-2], self.num_groups, values.shape[-1])
        return total.scatter_add(-2, rows, values.masked_fill(labels < 0, 0.0))

    def _with_labels(self, values: Tensor, nested: bool, per_head: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Values (B, [H,] N, C), labels (B, [H,] N_in, 1), and these as rows to read or to write for every channel."""
        labels = self.labels(nested=nested, per_head=per_head).unsqueeze(-1)
        if per_head and values.ndim == 3:
            values = values.unsqueeze(1).expand(-1, self.num_heads, -1, -1)
        return values, labels, labels.clamp(min=0).expand(*labels.shape[:-1], values.shape[-1])

    def _check(self, axis: str, values: Tensor, hard: bool, nested: bool, per_head: bool) -> None:
        for name, flag in (("hard", hard), ("nested", nested), ("per_head", per_head)):
            require_flag(name, flag)
        if nested and not hard:
            raise ValueError("nested must be False unless hard is True, for it says which label is meant; got True")
        sizes = {"B": self.batch_size, axis: self.num_groups if axis == "N_out" else self.num_inputs}
        require_floating("values", values)
        if per_head:
            sizes["H"] = self.num_heads
        require_sizes("values", values, f"B H {axis} C" if per_head and values.ndim == 4 else f"B {axis} C", **sizes)


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
