"""What a network makes of a few images: image, reference, prediction, and the groups of every stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy.typing import NDArray
from skimage.segmentation import find_boundaries

from segmentation.augment import Piece, normalise
from segmentation.pairs import Sample
from segmentation.prediction import Predictor, group_labels
from segmentation.resample import at_spacing

WINDOW = {2: 128, 3: 64}  # pixels shown along an axis: groups of a few pixels must be seen
PANEL = 3.2  # inches
DPI = 120


def draw(predictor: Predictor, samples: Sequence[Sample], num_classes: int) -> Figure:
    """A row per sample. Of large images the window around what is labelled; of volumes the middle slice of that.

    Args:
        predictor: the network, and how it looks at images.
        samples: with reference labels.
        num_classes: of them.
    """
    rows = [_panels(predictor, sample) for sample in samples]
    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(PANEL * columns, (PANEL + 0.3) * len(rows)), dpi=DPI, layout="constrained")
    panels: Any = figure.subplots(len(rows), columns, squeeze=False)
    instances = predictor.task == "instances"
    for sample, row, places in zip(samples, rows, panels, strict=True):
        spacing = predictor.spacing or sample.spacing
        aspect = spacing[-2] / spacing[-1]
        for (title, picture), place in zip(row.items(), places, strict=True):
            if title in ("reference", "prediction"):
                picture = scramble(picture) if instances else paint(picture, num_classes)
            place.imshow(picture, cmap="gray", aspect=aspect, interpolation="nearest")
            place.set_title(f"{sample.name}" if title == "image" else title, fontsize="small")
            place.set_axis_off()
    return figure


def _panels(predictor: Predictor, sample: Sample) -> dict[str, NDArray[Any]]:
    """Pictures (height, width) or (height, width, 3) of one sample as the network sees it, by title."""
    piece = Piece(normalise(sample.image).numpy(), sample.labels, sample.spacing)
    if predictor.spacing is not None:
        piece = at_spacing(piece, predictor.spacing)
    place, cut = window(piece.labels)
    pixels, labels = piece.image[(slice(None), *place)], piece.labels[place]
    output = predictor.look(torch.from_numpy(pixels)[None], piece.spacing)
    picture = displayed(pixels[(slice(None), *cut)])
    panels = {"image": picture, "reference": labels[cut], "prediction": predictor.decide(output, labels.shape)[cut]}
    for stage, groups in enumerate(group_labels(output, labels.shape), 1):
        panels[f"{output.assignments[stage - 1].num_groups} groups, stage {stage}"] = outlined(picture, groups[cut])
    return panels


def window(labels: NDArray[np.integer]) -> tuple[tuple[slice, ...], tuple[Any, ...]]:
    """Where to look: slices of a window around the median labelled pixel, and the index of a plane in it."""
    side = WINDOW[labels.ndim]
    labelled = np.argwhere(labels > 0)
    centre = np.median(labelled, axis=0) if len(labelled) else np.array(labels.shape) / 2
    starts = [int(np.clip(c - side // 2, 0, max(0, n - side))) for c, n in zip(centre, labels.shape, strict=True)]
    place = tuple(slice(start, start + side) for start in starts)
    plane = () if labels.ndim == 2 else (int(centre[0]) - starts[0],)
    return place, (*plane, ...)


def displayed(image: NDArray[Any]) -> NDArray[np.float64]:
    """(C, height, width) of any range -> (height, width, 3) in [0, 1]; of other than three channels the first."""
    shown = (image if image.shape[0] == 3 else image[:1].repeat(3, 0)).astype(np.float64)
    low, high = np.percentile(shown, (0.5, 99.5))
    return np.moveaxis(((shown - low) / max(high - low, 1e-12)).clip(0, 1), 0, -1)


def outlined(picture: NDArray[np.float64], groups: NDArray[np.int64]) -> NDArray[np.float64]:
    """A picture with the borders between groups drawn in; enlarged, so that they are thin beside the groups."""
    zoom = max(1, round(PANEL * DPI / max(groups.shape)))
    enlarged = [part.repeat(zoom, 0).repeat(zoom, 1) for part in (picture, groups + 1)]  # 0 would have no border
    borders = find_boundaries(enlarged[1], mode="inner")
    return np.where(borders[..., None], (1.0, 0.9, 0.0), enlarged[0])


def paint(labels: NDArray[np.integer], num_classes: int) -> NDArray[np.float64]:
    """A colour per class, black for class 0."""
    colours = np.vstack([np.zeros(3), colormaps["tab10"](np.arange(max(num_classes - 1, 1)) % 10)[:, :3]])
    return colours[labels]


def scramble(instances: NDArray[np.integer]) -> NDArray[np.float64]:
    """Colours that differ between neighbouring numbers, black for 0."""
    colours = colormaps["tab20"](instances * 7919 % 20)[..., :3]
    return np.where(instances[..., None] > 0, colours, 0.0)
