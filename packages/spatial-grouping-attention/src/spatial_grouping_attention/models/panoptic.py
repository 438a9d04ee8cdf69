"""Objects among the groups: which groups are candidates, what they are, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from RoSE import Grid
from RoSE.validation import require_floating, require_int, require_sizes
from torch import Tensor, nn

from ..assignment import Assignment, compose
from .heads import SemanticMLP
from .scale import Scale
from .tokens import Tokens

# Added to memberships before their logarithm is taken: far below what matters, and it bounds the gradient.
FLOOR = 1e-12
# As many as MaskFormer has queries.
CANDIDATES = 100
# Of the classes of a slot without candidate; half types hold it.
NEVER = -1e4


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type for memberships and their sums: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def require_candidates(number: int | None, head: str, downsample: str) -> int | None:
    """Return how many groups are candidates at most; None for no candidates at all."""
    if number is None:
        return CANDIDATES if head == "panoptic" else None
    if downsample == "conv":
        raise ValueError(f'num_candidates must be None where downsample is "conv", without groups; got {number!r}')
    return require_int("num_candidates", number, minimum=1)


class CandidateHead(nn.Module):
    """Classify the groups of largest mass (arXiv:2505.16993, section 4): each is a candidate for an object.

    Args:
        dim: channels of the groups.
        width: channels of the MLP in between.
        num_classes: classes of objects; "no object" is one more.
        num_candidates: how many groups.
        made: ``device`` and ``dtype`` of the parameters.
    """

    def __init__(self, dim: int, width: int, num_classes: int, num_candidates: int, made: dict[str, Any]) -> None:
        super().__init__()
        self.num_candidates = num_candidates
        self.mlp = SemanticMLP(dim, width, num_classes + 1, made)

    def forward(self, groups: Tensor, assignments: Sequence[Assignment]) -> tuple[Tensor, Tensor]:
        """Groups of the last stage (B, N, dim) and the memberships that lead to them -> candidates and their classes.

        Returns:
            Indices of the groups, largest mass first, (B, G) int64, -1 where there are fewer valid groups than G;
            logits (B, G, num_classes + 1), of "no object" with certainty for those.
        """
        candidates = heaviest(assignments, self.num_candidates, wide(groups.dtype))
        rows = candidates.clamp(min=0).unsqueeze(-1)
        logits = self.mlp(groups.gather(1, rows.expand(-1, -1, groups.shape[-1])))
        nothing = F.pad(logits.new_full((logits.shape[-1] - 1,), NEVER), (0, 1))
        return candidates, torch.where((candidates < 0).unsqueeze(-1), nothing, logits)


@torch.no_grad()
def heaviest(assignments: Sequence[Assignment], most: int, dtype: torch.dtype) -> Tensor:
    """The groups of largest mass, through all assignments, and -1 after the last valid one.

    Args:
        assignments: one per stage, first stage first.
        most: how many groups at most.
        dtype: to count in.

    Returns:
        (B, min(most, groups)) int64; of groups of equal mass the first comes first.
    """
    chain = compose(assignments)
    ones = torch.ones(chain.batch_size, chain.num_inputs, 1, device=chain.device, dtype=dtype)
    mass = chain.sum(ones).squeeze(-1)
    if chain.valid_groups is not None:
        mass = mass.masked_fill(~chain.valid_groups, -1.0)
    mass, groups = mass.sort(dim=1, descending=True, stable=True)
    kept = min(most, chain.num_groups)
    return groups[:, :kept].masked_fill(mass[:, :kept] < 0, -1)


@dataclass(frozen=True)
class PixelMemberships:
    """Memberships of pixels in the last groups: through all assignments, and interpolated between the first tokens."""

    assignments: Sequence[Assignment]
    """One per stage, first stage first."""
    tokens: Grid
    """Grid of the first stage."""
    stem_stride: tuple[int, ...]
    """Pixels per token of the first stage, per axis."""
    size: tuple[int, ...]
    """Pixels per axis."""
    valid: Tensor | None
    """(B, *size) boolean, false for pixels that are members of no group; None for all."""

    def upsample(self, values: Tensor) -> Tensor:
        """Carry values of the groups (B, N_out, C) to the pixels (B, C, *size)."""
        return self._interpolate(compose(self.assignments).upsample(values))

    def sum(self, values: Tensor) -> Tensor:
        """Sum values of the pixels (B, C, *size) over the members of every group (B, N_out, C); without gradient."""
        chain = compose(self.assignments)
        axes = ("depth", "height", "width")[-len(self.size) :]
        sizes = dict(zip(axes, self.size, strict=True))
        pattern = " ".join(("B", "C", *axes))
        require_sizes("values", require_floating("values", values), pattern, B=chain.batch_size, **sizes)
        # Interpolation is linear, so its gradient is its adjoint.
        rows = values.new_zeros(chain.batch_size, chain.num_inputs, values.shape[1], requires_grad=True)
        with torch.enable_grad():
            (rows,) = torch.autograd.grad(self._interpolate(rows), rows, values)
        with torch.no_grad():
            return chain.sum(rows)

    def log_masks(self, groups: Tensor, dtype: torch.dtype) -> Tensor:
        """Logarithms (B, G, *size) of the memberships in some groups, given by their indices (B, G)."""
        columns = torch.arange(compose(self.assignments).num_groups, device=groups.device).unsqueeze(-1)
        return (self.upsample((columns == groups.unsqueeze(1)).to(dtype)) + FLOOR).log()

    def _interpolate(self, rows: Tensor) -> Tensor:
        scale, valid = Scale(self.stem_stride, self.stem_stride), self.assignments[0].valid
        pixels = scale.to_pixels(rows, Tokens(rows, self.tokens, valid), self.size)
        return pixels if self.valid is None else pixels.masked_fill(~self.valid.unsqueeze(1), 0.0)
