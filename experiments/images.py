"""Real images, from a folder that is given; what it must hold is in README.md beside this file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from segmentation.augment import normalise
from segmentation.instances import instance_classes
from skimage.io import imread
from torch import Tensor
from training import Batch, vary


class Picture(NamedTuple):
    """An image (C, *size), normalised, with its classes (*size) and, where there are any, its objects."""

    name: str
    image: Tensor
    labels: Tensor
    spacing: tuple[float, ...]
    objects: np.ndarray | None = None


HELD_OUT = "rat4"  # one of two animals of 0.1 um


@lru_cache(maxsize=1)
def axons(data: Path) -> dict[str, Picture]:
    """Micrographs of rat spinal cord: 0 the rest, 1 myelin, 2 axons; the pixels of every animal have their own size."""
    folder, found = data / "axondeepseg_sem", {}
    for path in sorted(folder.glob("sub-*/micr/*.png")):
        name = path.name.removesuffix(".png")
        sidecars = sorted(path.parent.glob("*.json"))
        (sidecar,) = [s for s in sidecars if s.stem in name] or sidecars
        size = json.loads(sidecar.read_text())["PixelSize"]
        size = float(size[0] if isinstance(size, list) else size)
        masks = folder / "derivatives" / "labels" / path.parent.relative_to(folder)
        (mask,) = masks.glob(f"{name}_seg-axonmyelin*")
        grey = _plane(imread(mask))
        labels = torch.from_numpy(np.digitize(grey, [100, 200]).astype(np.int64))
        animal = path.parts[-3].removeprefix("sub-")
        found[f"{animal} {name}"] = Picture(animal, normalise(_plane(imread(path))[None]), labels, (size, size))
    return found


@lru_cache(maxsize=1)
def nuclei(data: Path) -> list[Picture]:
    """Nuclei in fluorescence: 0 background, 1 inside, 2 the border of a nucleus."""
    folder, found = data / "dsb2018_256", []
    for path in sorted((folder / "images").iterdir()):
        (mask,) = (folder / "labels").glob(f"{path.stem}.*")
        objects = imread(mask).astype(np.int32)
        classes = torch.from_numpy(np.asarray(instance_classes(objects)).astype(np.int64))
        found.append(Picture(path.stem, normalise(_plane(imread(path))[None]), classes, (1.0, 1.0), objects))
    return found


@lru_cache(maxsize=1)
def hippocampus(data: Path) -> list[Picture]:
    """Hippocampus in MR, voxels of 1 mm: 0 the rest, 1 its front, 2 its back."""
    folder, found = data / "msd_hippocampus", []
    for path in sorted((folder / "images").iterdir()):
        (mask,) = (folder / "labels").glob(f"{path.name.split('.')[0]}*")
        labels = torch.from_numpy(np.asarray(nibabel.load(mask).dataobj).astype(np.int64))
        image = normalise(np.asarray(nibabel.load(path).dataobj, np.float32)[None])
        found.append(Picture(path.name, image, labels, (1.0, 1.0, 1.0)))
    return found


def _plane(image: np.ndarray) -> np.ndarray:
    """The first channel of a grey image that has several."""
    return image[..., 0] if image.ndim == 3 else image


def averaged(picture: Picture, slices: int, axis: int) -> Picture:
    """As a scanner with thicker slices would see it; what is left over at the end is cut off."""
    kept = picture.labels.shape[axis] // slices * slices
    image = picture.image.narrow(axis + 1, 0, kept).unflatten(axis + 1, (-1, slices)).mean(axis + 2)
    labels = picture.labels.narrow(axis, 0, kept)
    # The class of most of them: an even number has no slice in its middle.
    votes = F.one_hot(labels.unflatten(axis, (-1, slices))).sum(axis + 1)
    spacing = tuple(s * (slices if a == axis else 1) for a, s in enumerate(picture.spacing))
    return picture._replace(image=image, labels=votes.argmax(-1), spacing=spacing)


def resampled(picture: Picture, spacing: Sequence[float]) -> Picture:
    """An image of another spacing: what is to be beaten. Labels stay as they are, since predictions are taken back."""
    image = at_spacing(picture.image[None], picture.spacing, spacing)[0]
    return picture._replace(image=image, spacing=tuple(spacing))


def at_spacing(images: Tensor, spacing: Sequence[float], target: Sequence[float]) -> Tensor:
    """Images (B, C, *size) of as many pixels as another spacing has."""
    size = [max(16, round(n * s / t)) for n, s, t in zip(images.shape[2:], spacing, target, strict=True)]
    if len(size) == 3:
        return F.interpolate(images, size, mode="trilinear", align_corners=False)
    coarser = any(s < t for s, t in zip(spacing, target, strict=True))
    return F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=coarser)


def resized(batch: Batch, size: int) -> Batch:
    """Planar crops of another number of pixels, with the spacing that these have: what training sees of other zooms."""
    shape = batch.labels.shape[1:]
    images = F.interpolate(batch.images, (size, size), mode="bilinear", antialias=True)
    labels = F.interpolate(batch.labels[:, None].float(), (size, size), mode="nearest-exact")[:, 0].long()
    spacing = tuple(s * n / size for s, n in zip(batch.spacing, shape, strict=True))
    return Batch(images, labels, spacing)


def crops(pictures: Sequence[Picture], size: Sequence[int], number: int, rng: Generator) -> Batch:
    """Crops at random places, varied; of pictures of one spacing."""
    spacing = pictures[0].spacing
    chosen = [pictures[int(rng.integers(len(pictures)))] for _ in range(number)]
    images, labels = [], []
    for picture in chosen:
        short = [max(0, s - n) for s, n in zip(size, picture.labels.shape, strict=True)]
        missing = [p for n in reversed(short) for p in (0, n)]
        image, classes = F.pad(picture.image, missing), F.pad(picture.labels, missing)
        starts = [int(rng.integers(n - s + 1)) for n, s in zip(classes.shape, size, strict=True)]
        place = tuple(slice(start, start + s) for start, s in zip(starts, size, strict=True))
        image, classes = vary(image[(slice(None), *place)], classes[place], spacing, rng)
        images.append(image)
        labels.append(classes)
    return Batch(torch.stack(images), torch.stack(labels), spacing)
