"""How good predictions are, and how well segments keep to objects."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from images import Picture, resampled
from monai.inferers import sliding_window_inference
from networks import CLASSES, Logits
from segmentation.instances import separate
from segmentation.metrics import instance_scores, semantic_scores
from segmentation.prediction import group_labels
from skimage.metrics import contingency_table
from skimage.segmentation import slic
from torch import nn
from torchmetrics.classification import MulticlassJaccardIndex

COMPACTNESS = (0.1, 0.3, 1.0)  # of superpixels: for every image the one that suits its labels best


@torch.no_grad()
def predict(
    network: nn.Module, picture: Picture, tile: Sequence[int], as_spacing: Sequence[float] | None = None
) -> torch.Tensor:
    """Logits (classes, *size), in tiles as large as training has seen; with a spacing, of the image brought to it."""
    other = picture if as_spacing is None else resampled(picture, as_spacing)

    def of_tiles(image: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = network(image, other.spacing)
        return logits

    # Not beyond the image: padding is nothing that training has seen much of.
    size = [min(t, n) for t, n in zip(tile, other.image.shape[1:], strict=True)]
    logits = sliding_window_inference(other.image[None], size, 4, of_tiles, overlap=0.25, mode="gaussian")
    assert isinstance(logits, torch.Tensor)
    if as_spacing is None:
        return logits[0]
    mode = "bilinear" if logits.ndim == 4 else "trilinear"
    return nn.functional.interpolate(logits, tuple(picture.labels.shape), mode=mode, align_corners=False)[0]


def of_classes(network: nn.Module, pictures: Sequence[Picture], tile: Sequence[int]) -> dict[str, float]:
    """Mean IoU, mean Dice without background, and boundary F, in %."""
    found = [predict(network, p, tile).argmax(0).numpy() for p in pictures]
    scores = semantic_scores(found, [p.labels.numpy() for p in pictures], CLASSES)
    dice = float(np.nanmean(scores["Dice per class"][1:]))
    return _percent({"mIoU": scores["mean IoU"], "Dice": dice, "boundary F": scores["boundary F"]})


def mean_iou(
    network: nn.Module, pictures: Sequence[Picture], tile: Sequence[int], as_spacing: Sequence[float] | None = None
) -> float:
    """Over the classes of all pixels together, in %."""
    iou = MulticlassJaccardIndex(CLASSES)
    for picture in pictures:
        iou.update(predict(network, picture, tile, as_spacing).argmax(0), picture.labels)
    return round(100 * float(iou.compute()), 2)


def of_objects(network: nn.Module, pictures: Sequence[Picture], tile: Sequence[int]) -> dict[str, float]:
    """AP at two overlaps, of objects by watershed, and IoU of foreground, in %."""
    found = [separate(predict(network, p, tile)) for p in pictures]
    real = [p.objects for p in pictures]
    scores = instance_scores(found, real)
    both = sum(int(((f > 0) & (r > 0)).sum()) for f, r in zip(found, real, strict=True))
    either = sum(int(((f > 0) | (r > 0)).sum()) for f, r in zip(found, real, strict=True))
    return _percent({**{name: scores[name] for name in ("AP@0.5", "AP@0.75")}, "foreground IoU": both / either})


@torch.no_grad()
def of_segments(network: nn.Module, pictures: Sequence[Picture]) -> dict[str, float]:
    """Of every stage's groups, beside as many superpixels of SLIC, in %.

    Achievable segmentation accuracy: pixels that are right if every segment gets the best class for it.
    Undersegmentation error: what segments have beyond the border of the object, the smaller part counted (Neubert and
    Protzel 2012).
    """
    assert isinstance(network, Logits)
    rows: dict[str, list[tuple[float, float]]] = {}
    for picture in pictures:
        real = objects_of(picture)
        output = network.model(picture.image[None], picture.spacing)
        for stage, groups in enumerate(group_labels(output, real.shape), 1):
            rows.setdefault(f"stage {stage}", []).append(segment_scores(groups, real))
            number = len(np.unique(groups))
            rows.setdefault(f"SLIC, as stage {stage}", []).append(segment_scores(superpixels(picture, number), real))
    return {
        f"{name}, {kind}": round(100 * float(np.mean([row[i] for row in values])), 2)
        for name, values in rows.items()
        for i, kind in enumerate(("accuracy", "undersegmentation"))
    }


def objects_of(picture: Picture) -> np.ndarray:
    """Single ones where they are labelled, else all pixels of a class."""
    return picture.labels.numpy() if picture.objects is None else picture.objects


def superpixels(picture: Picture, number: int) -> np.ndarray:
    """SLIC's (Achanta et al., TPAMI 2012), of the compactness that suits the labels best."""
    each = [_superpixels(picture, number, compactness) for compactness in COMPACTNESS]
    return max(each, key=lambda found: segment_scores(found, objects_of(picture)))


def _superpixels(picture: Picture, number: int, compactness: float) -> np.ndarray:
    """Within 5 % of a number where it can: SLIC merges the smallest of them."""
    image = picture.image.movedim(0, -1).numpy()
    asked = float(number)
    for _ in range(8):
        found = slic(image, round(asked), compactness=compactness, sigma=1, start_label=0, channel_axis=-1)
        there = len(np.unique(found))
        if abs(there / number - 1) <= 0.05:
            break
        asked *= number / there
    return np.asarray(found)


@torch.no_grad()
def of_picture(network: nn.Module, picture: Picture, tile: Sequence[int]) -> dict[str, np.ndarray]:
    """Classes of one image, and the segments of the stages of a network that groups, to be drawn."""
    arrays = {"classes": predict(network, picture, tile).argmax(0).numpy().astype(np.uint8)}
    if isinstance(network, Logits):
        output = network.model(picture.image[None], picture.spacing)
        for stage, groups in enumerate(group_labels(output, tuple(picture.labels.shape)), 1):
            arrays[f"stage {stage}"] = groups.astype(np.uint16)
    return arrays


def segment_scores(segments: np.ndarray, real: np.ndarray) -> tuple[float, float]:
    """Achievable accuracy and undersegmentation error of one image, as shares of its pixels."""
    table = contingency_table(segments, real).toarray()
    total = table.sum()
    largest = table.max(1).sum()
    spilled = np.minimum(table, table.sum(1, keepdims=True) - table).sum()
    return float(largest / total), float(spilled / total)


def _percent(scores: dict[str, float]) -> dict[str, float]:
    return {name: round(100 * float(value), 2) for name, value in scores.items()}
