"""What is learned from: a photograph, a class for every pixel, and the part that training never sees."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from skimage import color, data, filters, io, segmentation
from torch import Tensor

RIM_WIDTH = 3  # pixels
SMALLEST_COIN = 500  # pixels; what is smaller is dust
SMALLEST_PART = 16  # pixels along an axis; three halvings leave two groups


@dataclass(frozen=True)
class Scene:
    """An image, its reference labels, and how far apart its pixels are.

    Args:
        image: brightness in [0, 1], (height, width).
        labels: class of every pixel, 0 .. number of classes - 1.
        classes: their names.
        spacing: physical distance between rows and between columns.
        image_source: where the image is from, in a few words.
        label_source: where the labels are from.
    """

    image: NDArray[np.float32]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    spacing: tuple[float, float]
    image_source: str
    label_source: str

    def split(self, fraction: float) -> tuple[Scene, Scene]:
        """The upper ``fraction`` of the rows, and the rest. They share no pixel."""
        row = round(self.image.shape[0] * fraction)
        parts = (self._rows(slice(None, row)), self._rows(slice(row, None)))
        for part in parts:
            if min(part.image.shape) < SMALLEST_PART:
                raise ValueError(
                    f"both parts must be at least {SMALLEST_PART} pixels high and wide; "
                    f"{fraction} of the image's rows leaves one of {part.image.shape}"
                )
        return parts

    def _rows(self, rows: slice) -> Scene:
        return replace(self, image=self.image[rows], labels=self.labels[rows])


def coins(spacing: tuple[float, float] = (1.0, 1.0)) -> Scene:
    """The photograph of coins that scikit-image carries, labelled without anyone looking at it.

    Marker-controlled watershed on the gradient floods from pixels that are surely table (dark) and surely coin
    (bright); the outermost pixels of every coin become a class of their own. The labels are a *pseudo* ground
    truth: no person drew them. The rim is thin on purpose: a mask that is a little too smooth, or a little off,
    costs the two broad classes almost nothing and loses the rim. The photograph has no known scale, so its unit is
    the pixel.
    """
    photograph = data.coins()
    markers = np.zeros(photograph.shape, dtype=np.int32)
    markers[photograph < 30] = 1
    markers[photograph > 150] = 2
    basins = segmentation.watershed(filters.sobel(photograph), markers)
    pieces, _ = ndimage.label(ndimage.binary_fill_holes(basins == 2))
    sizes = np.bincount(pieces.ravel())
    coin = (pieces > 0) & (sizes >= SMALLEST_COIN)[pieces]
    rim = coin & (ndimage.distance_transform_edt(coin) <= RIM_WIDTH)
    labels = coin.astype(np.int64) + rim
    return Scene(
        (photograph / 255.0).astype(np.float32),
        labels,
        ("table", "coin", "rim"),
        spacing,
        "the coins photograph of scikit-image",
        "pseudo ground truth: marker-controlled watershed",
    )


def from_files(image: Path, labels: Path, spacing: tuple[float, float]) -> Scene:
    """A scene of your own.

    Args:
        image: anything scikit-image reads; colours become brightness.
        labels: an integer image of the same size. Its distinct values are the classes.
        spacing: physical distance between rows and between columns.
    """
    picture = io.imread(image)
    if picture.ndim == 3:
        picture = color.rgb2gray(picture[..., :3])
    classes = io.imread(labels)
    if picture.ndim != 2 or classes.shape != picture.shape:
        raise ValueError(
            f"the image and its labels must be one plane of the same size: "
            f"{image} is {picture.shape}, {labels} is {classes.shape}"
        )
    if not np.issubdtype(classes.dtype, np.integer):
        raise TypeError(f"labels must be integers, {labels} holds {classes.dtype}")
    values, index = np.unique(classes, return_inverse=True)
    if len(values) < 2:
        raise ValueError(f"labels must hold at least two classes, {labels} holds only {values.tolist()}")
    bright = picture.astype(np.float32)
    low, high = float(bright.min()), float(bright.max())
    return Scene(
        (bright - low) / max(high - low, 1e-6),
        index.reshape(classes.shape).astype(np.int64),
        tuple(f"class {value}" for value in values),
        spacing,
        image.name,
        f"labels of {labels.name}",
    )


class Crops:
    """Random square crops of one scene, mirrored and re-lit; the same sequence for the same seed."""

    def __init__(self, scene: Scene, size: int, seed: int) -> None:
        self.image = torch.from_numpy(np.ascontiguousarray(scene.image))
        self.labels = torch.from_numpy(np.ascontiguousarray(scene.labels))
        self.size = tuple(min(size, n) for n in self.image.shape)
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self, count: int) -> tuple[Tensor, Tensor]:
        """Images (count, 1, *size) and labels (count, *size)."""
        pairs = [self._crop() for _ in range(count)]
        return torch.stack([image for image, _ in pairs])[:, None], torch.stack([label for _, label in pairs])

    def _crop(self) -> tuple[Tensor, Tensor]:
        corner = [self._integer(n - s + 1) for n, s in zip(self.image.shape, self.size, strict=True)]
        window = tuple(slice(c, c + s) for c, s in zip(corner, self.size, strict=True))
        mirrored = [axis for axis in (0, 1) if self._integer(2)]
        image, label = (part[window].flip(mirrored) for part in (self.image, self.labels))
        contrast, brightness = (torch.rand(2, generator=self.generator) * 2 - 1).tolist()
        return image * (1 + 0.2 * contrast) + 0.1 * brightness, label

    def _integer(self, below: int) -> int:
        return int(torch.randint(below, (), generator=self.generator))
