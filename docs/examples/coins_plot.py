"""One picture: the image, its labels, every prediction, and the borders of the groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from coins_data import Scene
from coins_metrics import Scores, boundary
from coins_models import GroupingNetwork
from coins_training import evaluating
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray
from spatial_grouping_attention import compose

COLUMN = 4.4  # inches


@dataclass(frozen=True)
class Prediction:
    """What a method says of the unseen part, and how good it is."""

    name: str
    labels: NDArray[np.int64]
    scores: Scores
    parameters: int


def draw(
    scene: Scene,
    seen: Scene,
    unseen: Scene,
    predictions: Sequence[Prediction],
    network: GroupingNetwork,
    window: int,
    path: Path,
) -> None:
    """Write the picture.

    Args:
        scene: the whole image.
        seen: the part trained on.
        unseen: the part the predictions are of.
        predictions: one per method; four.
        network: whose groups are shown.
        window: its size, in pixels.
        path: of the picture.
    """
    stretch = scene.spacing[0] / scene.spacing[1]
    place = busiest(unseen, window)
    groups = group_labels(network, unseen.image[place])
    part, zoom = (image.shape[0] / image.shape[1] * stretch for image in (unseen.image, unseen.image[place]))
    figure = Figure(figsize=(4 * COLUMN, (2 * part + zoom) * COLUMN + 1.6), layout="constrained")
    axes = figure.subplot_mosaic(
        [["image", "unseen", "labels", 0], ["image", 1, 2, 3], ["window", "stage 1", "stage 2", "stage 3"]],
        height_ratios=(part, part, zoom),
    )
    grey = {"cmap": "gray", "vmin": 0, "vmax": 1, "aspect": stretch}
    colours = palette(len(scene.classes))
    paint = {"cmap": colours, "vmin": 0, "vmax": colours.N - 1, "aspect": stretch, "interpolation": "nearest"}
    for panel in axes.values():
        panel.set_axis_off()

    show(axes["image"], "the image: trained above the line", scene.image, **grey)
    axes["image"].axhline(len(seen.image) - 0.5, color="cyan")
    show(axes["unseen"], "the unseen part\n(box: the last row's window)", unseen.image, **grey)
    axes["unseen"].add_patch(box(place))
    show(axes["labels"], f"its labels\n{scene.label_source}", unseen.labels, **paint)
    for number, p in enumerate(predictions):
        figures = f"mIoU {100 * p.scores.mean_iou:.1f} %, BF@1px {100 * p.scores.mean_boundary:.1f} %"
        show(axes[number], f"{p.name}\n{figures}", p.labels, **paint)
    show(axes["window"], "the window, unseen", unseen.image[place], **grey)
    for stage, labels in enumerate(groups, start=1):
        title = f"stage {stage}: the pixels fall into {len(np.unique(labels))} groups"
        show(axes[f"stage {stage}"], title, unseen.image[place], **grey)
        axes[f"stage {stage}"].add_collection(borders(labels, color="gold", linewidth=0.7))
    handles = [Patch(color=colours(i), label=name) for i, name in enumerate(scene.classes)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=100)


def show(panel: Axes, title: str, picture: NDArray[Any], **how: Any) -> None:
    """Draw a picture under its title."""
    panel.imshow(picture, **how)
    panel.set_title(title)


def palette(count: int) -> ListedColormap:
    """Colours of the classes, the first one dark."""
    bright = colormaps["tab10"]
    return ListedColormap([(0.15, 0.16, 0.22), *(bright((i + 1) % 10)[:3] for i in range(count - 1))])


def box(place: tuple[slice, slice]) -> Rectangle:
    """Frame of a window."""
    rows, columns = place
    return Rectangle(
        (columns.start - 0.5, rows.start - 0.5), columns.stop - columns.start, rows.stop - rows.start,
        fill=False, color="cyan",
    )  # fmt: skip


def windows(shape: tuple[int, ...], size: tuple[int, ...]) -> list[tuple[slice, slice]]:
    """Windows that cover a grid, evenly spread, neighbours overlapping by half or more."""
    starts = []
    for n, s in zip(shape, size, strict=True):
        hops = -(-(n - s) // max(1, s // 2))
        starts.append([round(i * (n - s) / max(1, hops)) for i in range(hops + 1)])
    return [(slice(y, y + size[0]), slice(x, x + size[1])) for y in starts[0] for x in starts[1]]


def busiest(scene: Scene, window: int) -> tuple[slice, slice]:
    """The window with most label boundary in it."""
    lines = sum(boundary(scene.labels == c).astype(int) for c in range(len(scene.classes)))
    size = tuple(min(window, n) for n in scene.image.shape)
    return max(windows(scene.image.shape, size), key=lambda place: lines[place].sum())


def group_labels(network: GroupingNetwork, image: NDArray[np.float32]) -> list[NDArray[np.int64]]:
    """The most likely group of every pixel, for the groups of every stage."""
    with evaluating(network):
        stages = network(torch.from_numpy(np.ascontiguousarray(image))[None, None]).groups.stages
        chains = [compose(stages[: i + 1]) for i in range(len(stages))]
        return [chain.labels().reshape(image.shape).numpy() for chain in chains]


def borders(labels: NDArray[np.int64], **how: Any) -> LineCollection:
    """Lines between neighbouring pixels of different groups."""
    y, x = np.nonzero(labels[1:] != labels[:-1])
    below = np.stack([np.stack([x - 0.5, y + 0.5], -1), np.stack([x + 0.5, y + 0.5], -1)], 1)
    y, x = np.nonzero(labels[:, 1:] != labels[:, :-1])
    beside = np.stack([np.stack([x + 0.5, y - 0.5], -1), np.stack([x + 0.5, y + 0.5], -1)], 1)
    return LineCollection([*below, *beside], **how)
