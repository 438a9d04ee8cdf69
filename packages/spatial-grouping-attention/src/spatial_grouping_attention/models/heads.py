"""From features of the stages to logits of the pixels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from RoSE.validation import require_choice
from torch import Tensor, nn

from ..assignment import Assignment, compose
from .interpolate import interpolate
from .tokens import CONVOLUTIONS, Tokens, as_image, as_rows, blanked

HEADS = ("native", "bilinear", "fpn", "panoptic")


class Scale:
    """Where the tokens of a stage lie among the pixels: every ``stride`` pixels, centred on the stem's patches."""

    def __init__(self, stride: tuple[int, ...], stem_stride: tuple[int, ...]) -> None:
        self.stride = stride
        self.offset = tuple((s - 1) / 2 for s in stem_stride)

    def to_pixels(self, rows: Tensor, tokens: Tokens, size: tuple[int, ...]) -> Tensor:
        """Rows (B, N, C) at tokens -> pixels (B, C, *size)."""
        values, valid = _on_grid(rows, tokens)
        return interpolate(values, valid, size, self.stride, self.offset).movedim(-1, 1)


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


class FeaturePyramidHead(nn.Module):
    """A feature pyramid: coarse features are interpolated and added to finer ones, stage by stage (arXiv:1612.03144).

    A convolution smooths what reaches the first stage, whose classes are interpolated to pixels.

    Args:
        dims, scales, num_classes, made: see :class:`NativeHead`.
        width: channels of the pyramid.
    """

    def __init__(
        self, dims: Sequence[int], scales: Sequence[Scale], width: int, num_classes: int, made: dict[str, Any]
    ) -> None:
        super().__init__()
        self.scale = scales[0]
        self.strides = [
            tuple(c // f for c, f in zip(coarse.stride, fine.stride, strict=True)) for fine, coarse in pairwise(scales)
        ]
        self.lateral = nn.ModuleList(nn.Linear(dim, width, **made) for dim in dims)
        self.smooth = CONVOLUTIONS[len(self.scale.stride)](width, width, 3, padding=1, **made)
        self.norm = nn.LayerNorm(width, **made)
        self.classify = nn.Linear(width, num_classes, **made)

    def forward(self, stages: Sequence[Tokens], assignments: Sequence[Assignment], size: tuple[int, ...]) -> Tensor:
        """Tokens of all stages -> logits (B, num_classes, *size); memberships do not matter."""
        lateral = [blanked(layer(tokens.x), tokens.valid) for layer, tokens in zip(self.lateral, stages, strict=True)]
        x = lateral[-1]
        for i in reversed(range(len(self.strides))):
            fine = stages[i].grid.shape
            values, valid = _on_grid(x, stages[i + 1])
            lifted = interpolate(values, valid, fine, self.strides[i], (0.0,) * len(fine)).flatten(1, -2)
            x = lateral[i] + blanked(lifted, stages[i].valid)
        first = stages[0]
        x = F.gelu(self.norm(as_rows(self.smooth(as_image(x, first.grid.shape)))))
        return self.scale.to_pixels(blanked(self.classify(x), first.valid), first, size)


def require_head(kind: str | None, downsample: str) -> str:
    """Return the kind of the head; None for the plainest that a way of coarsening has."""
    if kind is None:
        return "native" if downsample == "group" else "bilinear"
    if kind in ("native", "panoptic") and downsample == "conv":
        raise ValueError(
            f'head must be "bilinear" or "fpn" where downsample is "conv", without memberships; got "{kind}"'
        )
    return require_choice("head", kind, HEADS)


def make_head(
    kind: str, dims: Sequence[int], scales: Sequence[Scale], width: int, num_classes: int, made: dict[str, Any]
) -> NativeHead | BilinearHead | FeaturePyramidHead:
    """The head that is called ``kind``, one of HEADS; candidates have a head of their own beside the native one."""
    if kind in ("native", "panoptic"):
        return NativeHead(dims, scales, width, num_classes, made)
    if kind == "bilinear":
        return BilinearHead(dims, scales, width, num_classes, made)
    return FeaturePyramidHead(dims, scales, width, num_classes, made)


def _on_grid(rows: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
    """Rows (B, N, C) and validity (B, N) with the axes of the grid in place of N."""
    shape = tokens.grid.shape
    valid = None if tokens.valid is None else torch.unflatten(tokens.valid, 1, shape)
    return torch.unflatten(rows, 1, shape), valid
