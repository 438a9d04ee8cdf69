"""From features of the stages to logits of the pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from RoSE.validation import require_choice
from torch import Tensor, nn

from ..assignment import Assignment, compose
from .pyramid import FusedHead, PyramidHead
from .scale import Scale
from .tokens import Tokens, blanked

HEADS = ("native", "fused", "bilinear", "fpn", "panoptic")
OF_MEMBERSHIPS = ("native", "fused", "panoptic")


class SemanticMLP(nn.Module):
    """Logits of classes from features: two linear layers.

    Args:
        dim: channels of the features.
        width: channels in between.
        num_classes: logits.
        made: ``device`` and ``dtype`` of the parameters.
    """

    def __init__(self, dim: int, width: int, num_classes: int, made: dict[str, Any]) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, width, **made)
        self.fc2 = nn.Linear(width, num_classes, **made)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., num_classes)."""
        logits: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return logits


class NativeHead(nn.Module):
    """Classify the last groups, and let the memberships of all stages carry the logits to the first tokens.

    No decoder (arXiv:2505.16993, section 4): between the tokens of the stem, pixels are interpolated.

    Args:
        dims: channels of every stage.
        scales: where the tokens of every stage lie.
        width: channels of the MLP in between.
        num_classes: logits.
        made: ``device`` and ``dtype`` of the parameters.
    """

    def __init__(
        self, dims: Sequence[int], scales: Sequence[Scale], width: int, num_classes: int, made: dict[str, Any]
    ) -> None:
        super().__init__()
        self.scale = scales[0]
        self.mlp = SemanticMLP(dims[-1], width, num_classes, made)

    def forward(self, stages: Sequence[Tokens], assignments: Sequence[Assignment], size: tuple[int, ...]) -> Tensor:
        """Tokens of all stages and the memberships between them -> logits (B, num_classes, *size)."""
        logits = compose(assignments).upsample(self.mlp(stages[-1].x))
        return self.scale.to_pixels(logits, stages[0], size)


class BilinearHead(nn.Module):
    """Classify the last tokens and interpolate between them.

    Args:
        dims, scales, width, num_classes, made: see :class:`NativeHead`.
    """

    def __init__(
        self, dims: Sequence[int], scales: Sequence[Scale], width: int, num_classes: int, made: dict[str, Any]
    ) -> None:
        super().__init__()
        self.scale = scales[-1]
        self.mlp = SemanticMLP(dims[-1], width, num_classes, made)

    def forward(self, stages: Sequence[Tokens], assignments: Sequence[Assignment], size: tuple[int, ...]) -> Tensor:
        """Tokens of all stages -> logits (B, num_classes, *size); memberships do not matter."""
        last = stages[-1]
        return self.scale.to_pixels(blanked(self.mlp(last.x), last.valid), last, size)


def require_head(kind: str | None, downsample: str) -> str:
    """Return the kind of the head; None for the plainest that a way of coarsening has."""
    if kind is None:
        return "native" if downsample == "group" else "bilinear"
    if kind in OF_MEMBERSHIPS and downsample == "conv":
        raise ValueError(
            f'head must be "bilinear" or "fpn" where downsample is "conv", without memberships; got "{kind}"'
        )
    return require_choice("head", kind, HEADS)


def make_head(
    kind: str, dims: Sequence[int], scales: Sequence[Scale], width: int | None, num_classes: int, made: dict[str, Any]
) -> NativeHead | BilinearHead | PyramidHead:
    """The head that is called ``kind``, one of HEADS; candidates have a head of their own beside the native one."""
    if kind in ("fused", "fpn"):
        pyramid = FusedHead if kind == "fused" else PyramidHead
        return pyramid(dims, scales, width or 2 * dims[0], num_classes, made)
    classifier = BilinearHead if kind == "bilinear" else NativeHead
    return classifier(dims, scales, width or dims[-1], num_classes, made)
