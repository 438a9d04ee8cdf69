"""What travels between the operators and whatever computes them: one bundle in, one bundle out.

Every engine takes :class:`Operands` and no engine checks them: that is done once, in :mod:`..functional`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..geometry import Neighbourhood


class Operands(NamedTuple):
    """The operands of one call; B samples, H heads, N_in fine tokens, N_out groups.

    Logits are ``s_ij = scale * <k_i, q_j> + bias - compactness * |p_i - p_j|^2`` where token i sees group j, and -inf
    elsewhere. Positions p are in units of the group spacing, axis by axis
    (:meth:`..geometry.Neighbourhood.squared_distances`).
    """

    q: Tensor
    """Group queries (B, H, N_out, D)."""
    k: Tensor
    """Fine keys (B, H, N_in, D)."""
    values: Tensor
    """Of the tokens (B, H, N_in, C) where they are averaged, of the groups (B, H, N_out, C) where they are carried."""
    neighbourhood: Neighbourhood | None
    """Which groups a token sees; None for all."""
    scale: float
    """Factor of the products."""
    bias: Tensor | None = None
    """A table (H, *window) over the neighbourhood's window."""
    valid: Tensor | None = None
    """(B, N_in) boolean: false tokens belong to no group."""
    valid_groups: Tensor | None = None
    """(B, N_out) boolean: false groups are seen by nobody."""
    pair_bias: Tensor | None = None
    """One value for every pair (B, H, N_in, N_out), each of the sizes possibly 1."""
    compactness: Tensor | None = None
    """(H,) in float32 at least: what a head takes off a logit per squared distance of token and group."""


class Pooled(NamedTuple):
    """Averages over the members of every group; inside of the operators in float32 at least."""

    out: Tensor
    """(B, H, N_out, C), 0 for groups without members."""
    log_mass: Tensor
    """Logarithm of the members' sum of ``exp(s - lse)`` (B, H, N_out), -inf for groups without members."""
    lse: Tensor
    """The tokens' normalisers (B, H, N_in), +inf for tokens that belong to no group."""
    expected_q: Tensor | None = None
    """``sum_j A_ij q_j`` (B, H, N_in, D), from an engine that has it at hand and needs it for the backward pass."""


class Gradients(NamedTuple):
    """Gradients of the operands; None for what there is not."""

    q: Tensor
    k: Tensor
    values: Tensor
    bias: Tensor | None
    lse: Tensor | None
    compactness: Tensor | None = None


@dataclass(frozen=True)
class Problem:
    """What decides who can compute a call: everything but the numbers."""

    device: torch.device
    dtype: torch.dtype
    head_size: int
    neighbourhood: Neighbourhood | None
    bias: str | None
    """``None``, ``"table"`` or ``"full"``."""
    compactness: bool = False
    """Whether far groups have lower logits."""

    @property
    def dense(self) -> bool:
        """Whether every token sees every group."""
        return self.neighbourhood is None or self.neighbourhood.covers_all


def problem_of(
    q: Tensor,
    neighbourhood: Neighbourhood | None,
    bias: Tensor | None,
    pair_bias: Tensor | None,
    compactness: Tensor | None = None,
) -> Problem:
    """Describe a call with checked arguments."""
    kind = None if bias is None else "table"
    kind = kind if pair_bias is None else "full"
    return Problem(q.device, q.dtype, q.shape[-1], neighbourhood, kind, compactness is not None)
