"""What is done to an image before a network sees it, and the ways in which a crop is varied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from segmentation.intensities import Intensities

Image = NDArray[np.float32]
Labels = NDArray[np.int32]

LARGEST_RESCALE = 1.25  # and its reciprocal is the smallest
SAME_SPACING = 1e-3  # relative


def normalise(image: NDArray | Tensor) -> Tensor:
    """Shift and scale every channel of an image to mean 0 and standard deviation 1.

    Values beyond the percentiles 0.05 and 99.95 are cut off first: a few hot or dead pixels would otherwise decide
    the scale of all others. More must not be cut: an object in the dark can be smaller than 0.5 % of an image.

    Args:
        image: (channels, *size) of any type, the whole of it: the same numbers for training and for prediction.

    Returns:
        float32, of the same shape; a channel of one value becomes zero.
    """
    array = np.asarray(image)
    return torch.from_numpy(Intensities.of(array).apply(array))


class Piece(NamedTuple):
    """A part of an image (channels, *size) with its labels (*size) and their spacing."""

    image: Image
    labels: Labels
    spacing: tuple[float, ...]


def cut(piece: Piece, size: Sequence[int], rng: Generator, rescale: bool) -> Piece:
    """A part of an image from a random place, at a random scale or at its own.

    Enlarged by f, the image has f times as many pixels on the same extent, so its spacing is divided by f; f is
    log-uniform from 1/1.25 to 1.25 and the same for all axes. Images are interpolated linearly, labels take the
    nearest pixel's.

    Returns:
        Of ``size``, or shorter where the whole image is, at this scale.
    """
    shape = piece.labels.shape
    factor = float(np.exp(rng.uniform(-1, 1) * np.log(LARGEST_RESCALE))) if rescale else 1.0
    # Pixel k of the crop lies at start + k / factor, and the last one must still be within the image.
    crop = [min(s, int((n - 1) * factor) + 1) for s, n in zip(size, shape, strict=True)]
    room = [n - 1 - (c - 1) / factor for c, n in zip(crop, shape, strict=True)]
    if not rescale:
        start = [int(rng.integers(round(r) + 1)) for r in room]
        window = tuple(slice(a, a + c) for a, c in zip(start, crop, strict=True))
        return piece._replace(image=piece.image[(slice(None), *window)], labels=piece.labels[window])
    start = [rng.uniform(0, max(r, 0.0)) for r in room]
    step = [1 / factor] * len(shape)

    def sample(array: NDArray, order: int) -> NDArray:
        return ndimage.affine_transform(array, step, start, tuple(crop), order=order, mode="nearest")

    image = np.stack([sample(channel, 1) for channel in piece.image])
    return Piece(image, sample(piece.labels, 0), tuple(s / factor for s in piece.spacing))


def turn(piece: Piece, size: Sequence[int], rng: Generator) -> Piece:
    """Exchange axes of equal spacing and crop size by chance, and mirror every axis or not.

    With both, every turn by 90 degrees and every mirror image is as likely as any other. Spacing goes with its axis.
    """
    axes = range(len(size))
    groups: list[list[int]] = []
    for axis in axes:
        alike = (g for g in groups if size[g[0]] == size[axis] and _close(piece.spacing[g[0]], piece.spacing[axis]))
        group = next(alike, None)
        if group is None:
            groups.append([axis])
        else:
            group.append(axis)
    order = list(axes)
    for group in groups:
        for place, axis in zip(group, rng.permutation(group).tolist(), strict=True):
            order[place] = axis
    mirrored = [axis for axis in axes if rng.random() < 0.5]
    image = np.flip(piece.image.transpose(0, *(axis + 1 for axis in order)), [axis + 1 for axis in mirrored])
    labels = np.flip(piece.labels.transpose(order), mirrored)
    return Piece(image, labels, tuple(piece.spacing[axis] for axis in order))


def relight(image: Image, rng: Generator) -> Image:
    """Vary contrast, brightness and gamma of a normalised image, all channels alike, and add noise."""
    low, high = image.min(), image.max()
    if high > low:
        gamma = np.exp(rng.uniform(-1, 1) * np.log(1.4))
        image = ((image - low) / (high - low)) ** gamma * (high - low) + low
    contrast, brightness = rng.uniform(0.8, 1.2), rng.uniform(-0.2, 0.2)
    noise = rng.standard_normal(image.shape, dtype=np.float32) * rng.uniform(0, 0.15)
    return (image * contrast + brightness + noise).astype(np.float32)


def _close(first: float, second: float) -> bool:
    return abs(first - second) <= SAME_SPACING * first
