"""A way back that adds the features of every stage: the decoder of networks that need fine detail."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..assignment import Assignment
from .interpolate import interpolate
from .normalise import InstanceNorm
from .scale import Scale, on_grid
from .tokens import CONVOLUTIONS, Tokens, as_rows, blanked


class PyramidHead(nn.Module):
    """A feature pyramid (arXiv:1612.03144): coarse features are lifted and added to finer ones, stage by stage.

    After every addition a convolution with instance norm and GELU is added to what it read; every token of the first
    stage then classifies the pixels of its patch.

    Args:
        dims: channels of every stage.
        scales: where the tokens of every stage lie.
        width: channels of the pyramid.
        num_classes: logits.
        made: ``device`` and ``dtype`` of the parameters.
    """

    def __init__(
        self, dims: Sequence[int], scales: Sequence[Scale], width: int, num_classes: int, made: dict[str, Any]
    ) -> None:
        super().__init__()
        self.scale = scales[0]
        self.strides = [
            tuple(c // f for c, f in zip(coarse.stride, fine.stride, strict=True)) for fine, coarse in pairwise(scales)
        ]
        convolution = CONVOLUTIONS[len(self.scale.stride)]
        self.lateral = nn.ModuleList(nn.Linear(dim, width, **made) for dim in dims)
        self.convs = nn.ModuleList(convolution(width, width, 3, padding=1, **made) for _ in self.strides)
        self.norms = nn.ModuleList(InstanceNorm(width, **made) for _ in self.strides)
        self.classify = nn.Linear(width, num_classes * self.scale.pixels_per_token, **made)

    def forward(self, stages: Sequence[Tokens], assignments: Sequence[Assignment], size: tuple[int, ...]) -> Tensor:
        """Tokens of all stages and the memberships between them -> logits (B, num_classes, *size)."""
        lateral = [blanked(layer(tokens.x), tokens.valid) for layer, tokens in zip(self.lateral, stages, strict=True)]
        x = lateral[-1]
        for i in reversed(range(len(self.strides))):
            fine, valid = on_grid(lateral[i] + self.lift(x, i, stages, assignments), stages[i])
            image = fine.movedim(-1, 1)
            x = as_rows(image + F.gelu(self.norms[i](self.convs[i](image), valid)))
        return self.scale.patches_to_pixels(self.classify(x), stages[0], size)

    def lift(self, x: Tensor, i: int, stages: Sequence[Tokens], assignments: Sequence[Assignment]) -> Tensor:
        """Rows of stage i + 1 (B, N, C) -> rows of stage i, 0 where not valid: here interpolated."""
        fine = stages[i].grid.shape
        values, valid = on_grid(x, stages[i + 1])
        lifted = interpolate(values, valid, fine, self.strides[i], (0.0,) * len(fine)).flatten(1, -2)
        return blanked(lifted, stages[i].valid)


class FusedHead(PyramidHead):
    """The pyramid whose features are lifted by memberships: a token takes up what its groups carry.

    Args:
        dims, scales, width, num_classes, made: see :class:`PyramidHead`.
    """

    def lift(self, x: Tensor, i: int, stages: Sequence[Tokens], assignments: Sequence[Assignment]) -> Tensor:
        """Rows of the groups (B, N, C) -> rows of their members, 0 where not valid."""
        return assignments[i].upsample(x)
