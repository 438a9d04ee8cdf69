"""Images of one spacing, and labels and logits on the way back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from segmentation.augment import Piece


def size_at(size: Sequence[int], spacing: Sequence[float], target: Sequence[float]) -> tuple[int, ...]:
    """How many pixels the same extent has at another spacing."""
    return tuple(max(1, round(n * s / t)) for n, s, t in zip(size, spacing, target, strict=True))


def resize(values: Tensor, size: Sequence[int]) -> Tensor:
    """Values (B, C, *old) in other pixels on the same extent, (B, C, *size).

    Linear along every axis; along those that become coarser averaged, so that nothing aliases.
    """
    for axis, n in enumerate(size, 2):
        if n != values.shape[axis]:
            # torch averages along the axes of planes only, so all others are one axis that stays as it is; a first one,
            # since it is wrong where the last is a single pixel that stays one (torch 2.13).
            rows = values.movedim(axis, -1)
            plane = rows.flatten(2, -2)
            plane = F.interpolate(plane, (plane.shape[2], n), mode="bilinear", align_corners=False, antialias=True)
            values = plane.unflatten(2, rows.shape[2:-1]).movedim(-1, axis)
    return values


def resize_labels(labels: NDArray[np.int32], size: Sequence[int]) -> NDArray[np.int32]:
    """Labels (*old) in other pixels, (*size): each takes the one at its centre."""
    places = [(2 * np.arange(n) + 1) * old // (2 * n) for n, old in zip(size, labels.shape, strict=True)]
    return labels[np.ix_(*places)]


def at_spacing(piece: Piece, target: Sequence[float]) -> Piece:
    """A piece in pixels of another spacing."""
    size = size_at(piece.labels.shape, piece.spacing, target)
    image = resize(torch.from_numpy(piece.image)[None], size)[0].numpy()
    return Piece(image, resize_labels(piece.labels, size), tuple(target))
