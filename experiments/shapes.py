"""Images that are made, with exact labels: as many as one likes, at any spacing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from images import Picture
from numpy.random import Generator
from segmentation.instances import separate
from torch.nn.functional import one_hot
from training import Batch

NOISE = 0.5  # standard deviation, where things are 1 brighter or darker than what is around them
EXTENT = 96.0  # of an image along both axes, in physical units
PIXELS = 96  # of an image of radii, whatever they measure: neither size nor content betrays the spacing

Paint = Callable[[np.ndarray, np.ndarray, Generator], tuple[np.ndarray, np.ndarray]]


def picture(family: str, rng: Generator, spacing: float = 1.0) -> Picture:
    """An image of a family; the same random numbers give the same scene at any spacing, or more or less of it."""
    noise, scene = (np.random.default_rng(s) for s in rng.integers(2**32, size=2))
    side = PIXELS if family == "radii" else round(EXTENT / spacing)
    y, x = np.meshgrid(*[(np.arange(side) + 0.5) * spacing] * 2, indexing="ij")
    brightness, classes = FAMILIES[family](y, x, scene)
    image = brightness + NOISE * noise.normal(size=brightness.shape)
    tensor = torch.from_numpy(image.astype(np.float32))[None]
    labels = torch.from_numpy(classes.astype(np.int64))
    # Walls are shared out among cells as those of predictions are.
    objects = separate(one_hot(labels).movedim(-1, 0)) if family == "touching cells" else None
    return Picture(family, tensor, labels, (spacing, spacing), objects)


def batch(family: str, rng: Generator, number: int, spacing: float = 1.0) -> Batch:
    """So many images of one spacing, to train on."""
    drawn = [picture(family, rng, spacing) for _ in range(number)]
    return Batch(torch.stack([p.image for p in drawn]), torch.stack([p.labels for p in drawn]), drawn[0].spacing)


def colours(y: np.ndarray, x: np.ndarray, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Dark and bright discs."""
    classes = np.zeros(y.shape, int)
    for cy, cx, r in _places(rng, 10, 5, 10):
        classes[np.hypot(y - cy, x - cx) < r] = 1 + rng.integers(2)
    return np.choose(classes, [0.0, -1.0, 1.0]), classes


def forms(y: np.ndarray, x: np.ndarray, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Discs and squares, alike but for their form."""
    classes = np.zeros(y.shape, int)
    for cy, cx, r in _places(rng, 10, 5, 9):
        square = rng.random() < 0.5
        angle = rng.uniform(0, np.pi / 2)
        u, v = (
            np.cos(angle) * (y - cy) + np.sin(angle) * (x - cx),
            np.cos(angle) * (x - cx) - np.sin(angle) * (y - cy),
        )
        inside = np.maximum(abs(u), abs(v)) < 0.886 * r if square else np.hypot(u, v) < r
        classes[inside] = 1 + square
    return (classes > 0).astype(float), classes


def bars(y: np.ndarray, x: np.ndarray, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Bars two units wide: those of a negative slope are one class, those of a positive slope the other."""
    classes = np.zeros(y.shape, int)
    for cy, cx, half in _places(rng, 12, 10, 25):
        rising = rng.random() < 0.5
        angle = rng.uniform(0.2, np.pi / 2 - 0.2) * (1 if rising else -1)
        along = np.cos(angle) * (x - cx) + np.sin(angle) * (y - cy)
        across = np.cos(angle) * (y - cy) - np.sin(angle) * (x - cx)
        classes[(abs(along) < half) & (abs(across) < 1)] = 1 + rising
    return 2.0 * (classes > 0), classes


def rings(y: np.ndarray, x: np.ndarray, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rings; what they enclose is a class of its own, as bright as the background."""
    classes = np.zeros(y.shape, int)
    for cy, cx, r in _places(rng, 7, 6, 14):
        distance = np.hypot(y - cy, x - cx)
        classes[distance < r] = 2
        classes[(distance < r) & (distance > r - 2.5)] = 1
    return (classes == 1).astype(float), classes


def cells(y: np.ndarray, x: np.ndarray, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Cells that touch: 1 inside, 2 the wall between them."""
    seeds = rng.uniform(0, EXTENT, (40, 2))
    distances = np.stack([np.hypot(y - cy, x - cx) for cy, cx in seeds])
    two = np.partition(distances, 1, axis=0)[:2]
    wall = two[1] - two[0] < 2.0
    inside = ~wall & (two[0] < 11)
    classes = np.where(inside, 1, np.where(wall & (two[0] < 12), 2, 0))
    return np.choose(classes, [-0.5, 1.0, 0.0]), classes


def radii(y: np.ndarray, x: np.ndarray, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Small or large discs, one kind in an image: only the radius, in physical units, tells which."""
    classes = np.zeros(y.shape, int)
    large = rng.random() < 0.5
    for cy, cx, r in _places(rng, 36 if large else 120, 8 if large else 4, 10 if large else 5, 2 * EXTENT):
        classes[np.hypot(y - cy, x - cx) < r] = 1 + large
    return (classes > 0).astype(float), classes


def _places(
    rng: Generator, number: int, low: float, high: float, extent: float = EXTENT
) -> list[tuple[float, float, float]]:
    return [(*rng.uniform(0, extent, 2), rng.uniform(low, high)) for _ in range(number)]


FAMILIES: dict[str, Paint] = {
    "colours": colours,
    "forms": forms,
    "bars": bars,
    "rings": rings,
    "touching cells": cells,
    "radii": radii,
}
