"""Three slices at right angles: the head, its labels, what was predicted, and the groups behind it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from brain_data import Brain
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from segmentation.augment import normalise
from segmentation.pictures import outlined, paint
from segmentation.prediction import Predictor, group_labels

VIEWS = ("sagittal", "coronal", "axial")  # slices across x, y, z
WINDOW = 72.0  # millimetres; groups of a few voxels must be seen
PAINTED = 0.55  # share of a colour over the image
COLUMN = 3.3  # inches

Place = tuple[slice, slice, slice]


def draw(brain: Brain, predicted: NDArray[Any], unseen: Place, predictor: Predictor, path: Path) -> None:
    """Write the picture.

    Args:
        brain: the volume and its labels.
        predicted: classes (x, y, z) of all of it.
        unseen: the part that was not trained on.
        predictor: whose groups are shown.
        path: of the picture.
    """
    centre = middle(brain.labels, unseen)
    window = around(centre, brain)
    output = predictor.look(normalise(brain.image[None])[(slice(None), *window)][None], brain.spacing)
    groups = group_labels(output, brain.image[window].shape)
    titles = ["unseen between the lines", brain.label_source, "prediction"]
    titles += [f"stage {s}: {a.num_groups} groups in {WINDOW:g} mm" for s, a in enumerate(output.assignments, 1)]

    grey = np.clip(brain.image / np.percentile(brain.image, 99.5), 0, 1)[..., None].repeat(3, -1)
    count = len(brain.classes)
    tall = [max(height / width for height, width in shapes(axis, brain, window)) for axis in range(len(VIEWS))]
    figure = Figure(figsize=(COLUMN * len(titles), COLUMN * sum(tall) + 0.8), dpi=90, layout="constrained")
    panels: Any = figure.subplots(len(VIEWS), len(titles), height_ratios=tall)
    for axis, row in enumerate(panels):
        picture = across(grey, axis, centre[axis])
        overlays = [blend(picture, across(labels, axis, centre[axis]), count) for labels in (brain.labels, predicted)]
        for panel, shown in zip(row, [picture, *overlays], strict=False):
            show(panel, shown, axis, brain)
        inside = centre[axis] - window[axis].start
        for panel, part in zip(row[3:], groups, strict=True):
            show(panel, outlined(across(grey[window], axis, inside), across(part, axis, inside)), axis, brain, window)
        row[0].set_ylabel(VIEWS[axis])
        if axis != 1:  # a slice across y lies within the unseen part, or beside it
            line = row[0].axvline if axis == 0 else row[0].axhline
            for end in (unseen[1].start, unseen[1].stop):
                line(end * brain.spacing[1], color="cyan", linewidth=1)
        for panel, title in zip(row, titles if axis == 0 else (), strict=False):
            panel.set_title(title, fontsize="medium")
    colours = paint(np.arange(count), count)
    patches = [Patch(color=colour, label=name) for colour, name in zip(colours[1:], brain.classes[1:], strict=True)]
    figure.legend(handles=patches, loc="outside lower center", ncols=count, frameon=False)
    figure.savefig(path)


def middle(labels: NDArray[np.integer], place: Place) -> list[int]:
    """The voxel that half of all labelled ones of a part lie on either side of, along every axis."""
    found = np.argwhere(labels[place] > 0)
    return [int(start.start or 0) + int(n) for start, n in zip(place, np.median(found, axis=0), strict=True)]


def around(centre: Sequence[int], brain: Brain) -> Place:
    """A window around a voxel, moved inwards where it would stick out."""
    slices = []
    for c, n, distance in zip(centre, brain.image.shape, brain.spacing, strict=True):
        side = min(n, round(WINDOW / distance))
        start = min(max(c - side // 2, 0), n - side)
        slices.append(slice(start, start + side))
    return slices[0], slices[1], slices[2]


def across(volume: NDArray[Any], axis: int, index: int) -> NDArray[Any]:
    """A slice (vertical, horizontal, ...) of a volume (x, y, z, ...); up is up, or the front."""
    return np.take(volume, index, axis).swapaxes(0, 1)


def blend(picture: NDArray[np.floating], labels: NDArray[np.integer], count: int) -> NDArray[np.floating]:
    """A picture with its labelled pixels coloured; class 0 stays as it is."""
    share = PAINTED * (labels[..., None] > 0)
    return (1 - share) * picture + share * paint(labels, count)


def extent(axis: int, brain: Brain, window: Place | None) -> tuple[float, float, float, float]:
    """Left, right, bottom and top of a slice, in millimetres."""
    horizontal, vertical = (a for a in range(3) if a != axis)
    ends: list[float] = []
    for a in (horizontal, vertical):
        part = slice(0, brain.image.shape[a]) if window is None else window[a]
        ends += [part.start * brain.spacing[a], part.stop * brain.spacing[a]]
    return ends[0], ends[1], ends[2], ends[3]


def shapes(axis: int, brain: Brain, window: Place) -> list[tuple[float, float]]:
    """Height and width of a slice through everything, and of one through the window."""
    sides = [extent(axis, brain, part) for part in (None, window)]
    return [(top - bottom, right - left) for left, right, bottom, top in sides]


def show(panel: Axes, picture: NDArray[Any], axis: int, brain: Brain, window: Place | None = None) -> None:
    """Draw a slice in millimetres, so that voxels have their shape."""
    panel.imshow(picture, extent=extent(axis, brain, window), origin="lower", interpolation="nearest")
    panel.set_xticks([])
    panel.set_yticks([])
