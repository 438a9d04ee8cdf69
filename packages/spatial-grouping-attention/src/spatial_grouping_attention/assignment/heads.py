"""Assignments of one grouping: every head has memberships of its own, and they are averaged."""

from __future__ import annotations

from abc import abstractmethod

import torch
from einops import repeat
from torch import Tensor

from .base import Assignment


class AssignmentOfHeads(Assignment):
    """Memberships of several heads, each applied to values of its own by the two operators."""

    @abstractmethod
    def assign_heads(self, values: Tensor) -> Tensor:
        """Carry values of the groups (B, H, N_out, C) to the tokens, head by head: (B, H, N_in, C)."""

    @abstractmethod
    def group_heads(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Average values of the tokens (B, H, N_in, C) over every group's members, head by head.

        Returns:
            (B, H, N_out, C), 0 for groups without members; the logarithm of the groups' masses (B, H, N_out).
        """

    def sum_heads(self, values: Tensor) -> Tensor:
        """Sum values of the tokens (B, H, N_in, C) over every group's members, head by head: (B, H, N_out, C)."""
        out, log_mass = self.group_heads(values)
        return log_mass.exp().unsqueeze(-1) * out

    @property
    def _heads_of_matrix(self) -> int:
        return self.num_heads

    def _matrix(self, dtype: torch.dtype, per_head: bool) -> Tensor:
        one_hot = torch.eye(self.num_groups, dtype=dtype, device=self.device)
        return self.upsample(one_hot.expand(self.batch_size, -1, -1), per_head=per_head)

    def _upsample(self, values: Tensor, per_head: bool) -> Tensor:
        carried = self.assign_heads(self._for_heads(values))
        return carried if per_head else carried.mean(1)

    def _sum(self, values: Tensor, per_head: bool) -> Tensor:
        total = self.sum_heads(self._for_heads(values))
        return total if per_head else total.mean(1)

    def _pool(self, values: Tensor, per_head: bool) -> Tensor:
        """Also where a group's mass is too small for its dtype."""
        out, log_mass = self.group_heads(self._for_heads(values))
        return out if per_head else merge_heads(out, log_mass)

    def _for_heads(self, values: Tensor) -> Tensor:
        """The same values for every head, (B, H, N, C), where they are not given per head."""
        return values if values.ndim == 4 else repeat(values, "b n c -> b h n c", h=self.num_heads)


def merge_heads(out: Tensor, log_mass: Tensor) -> Tensor:
    """Heads' averages (B, H, N_out, C) -> the average over all heads' members (B, N_out, C).

    Heads share a group in proportion to their masses, taken from their logarithms (B, H, N_out): a group that every
    head neglects still has a well-defined average.
    """
    empty = (log_mass == -torch.inf).all(1, keepdim=True)
    weights = log_mass.masked_fill(empty, 0.0).softmax(1)
    return (weights.unsqueeze(-1) * out).sum(1)
