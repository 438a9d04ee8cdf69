"""How good predictions are: of classes (IoU, Dice, boundaries) and of instances (AP, panoptic quality)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from coins_metrics import boundary_f_score
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from skimage.metrics import contingency_table
from skimage.segmentation import relabel_sequential
from torchmetrics.classification import MulticlassJaccardIndex

THRESHOLDS = (0.5, 0.75)
MORE_THAN_HALF = float(np.nextafter(0.5, 1))  # so no object has two matches


def semantic_scores(
    predictions: Iterable[NDArray], references: Iterable[NDArray], num_classes: int, tolerance: float = 1.0
) -> dict[str, float | list[float]]:
    """Scores of label images (*size), classes 0 .. num_classes - 1.

    IoU and Dice are of all pixels of all images together. The boundary F-score is that of Csurka et al. (BMVC 2013):
    the harmonic mean of the shares of predicted and of real boundary pixels that have one of the other kind within
    ``tolerance`` pixels; mean over the classes that occur in an image, then over images.

    Returns:
        "mean IoU", "IoU per class", "Dice per class", "boundary F"; in [0, 1], NaN for what occurs nowhere.
    """
    # Of what is given here alone; by itself it would wait for the other processes of a training.
    iou = MulticlassJaccardIndex(num_classes, average="none", zero_division=float("nan"), sync_on_compute=False)
    boundaries = []
    for predicted, reference in _pairs(predictions, references):
        iou.update(*(torch.from_numpy(np.ascontiguousarray(a, dtype=np.int64)) for a in (predicted, reference)))
        scores = [boundary_f_score(predicted == c, reference == c, tolerance) for c in range(num_classes)]
        boundaries.append(_mean(scores))
    per_class = iou.compute().tolist()
    return {
        "mean IoU": _mean(per_class),
        "IoU per class": per_class,
        "Dice per class": [2 * value / (1 + value) for value in per_class],
        "boundary F": _mean(boundaries),
    }


def instance_scores(predictions: Iterable[NDArray], references: Iterable[NDArray]) -> dict[str, float]:
    """Scores of instance images (*size), 0 is background.

    At an IoU t, predicted and real objects are matched one to one so that as many as possible have an IoU of at
    least t. AP is then TP / (TP + FP + FN), as StarDist and the Data Science Bowl of 2018 have it (without a
    confidence, so no area under a curve). Panoptic quality (Kirillov et al., CVPR 2019) takes the matches of more than
    0.5 of all images together, and is the mean IoU of matches, SQ, times their F-score, RQ. (torchmetrics and MONAI
    have it too and agree, but would search for the matches anew, pixel by pixel and object by object.)

    Returns:
        "AP@0.5" and "AP@0.75": mean over images, without those in which nothing is and nothing was found;
        "AP@0.5 pooled" and "AP@0.75 pooled": TP, FP and FN summed over images first; "PQ", "SQ", "RQ". NaN where
        there is no object at all.
    """
    found: dict[float, list[Matches]] = {t: [] for t in (*THRESHOLDS, MORE_THAN_HALF)}
    for predicted, reference in _pairs(predictions, references):
        overlaps = iou_matrix(predicted, reference)
        for threshold, matches in found.items():
            matches.append(match(overlaps, threshold))
    if not found[MORE_THAN_HALF]:
        raise ValueError("predictions must be at least one image; got none")
    pooled = {t: Matches(*map(sum, zip(*matches, strict=True))) for t, matches in found.items()}
    scores = {f"AP@{t:g}": _mean([one.average_precision for one in found[t]]) for t in THRESHOLDS}
    scores |= {f"AP@{t:g} pooled": pooled[t].average_precision for t in THRESHOLDS}
    true, false_positive, false_negative, iou = pooled[MORE_THAN_HALF]
    objects = true + (false_positive + false_negative) / 2
    return scores | {"PQ": _share(iou, objects), "SQ": _share(iou, true), "RQ": _share(true, objects)}


class Matches(NamedTuple):
    """Counts of objects, and the IoU of all true positives together."""

    true: int
    false_positive: int
    false_negative: int
    iou: float

    @property
    def average_precision(self) -> float:
        """TP / (TP + FP + FN)."""
        return _share(self.true, self.true + self.false_positive + self.false_negative)


def iou_matrix(predicted: NDArray, reference: NDArray) -> NDArray[np.float64]:
    """Intersection over union of every real object (rows) with every predicted one (columns)."""
    numbered = [relabel_sequential(labels)[0] for labels in (reference, predicted)]
    shared = contingency_table(*numbered, sparse_type="array").toarray()
    real, found = shared.sum(1, keepdims=True), shared.sum(0, keepdims=True)
    return (shared / np.maximum(real + found - shared, 1))[1:, 1:]


def match(overlaps: NDArray, threshold: float) -> Matches:
    """Match objects one to one: as many as possible that share enough.

    Args:
        overlaps: IoU, (real objects, predicted objects).
        threshold: smallest IoU of a match.
    """
    real, found = overlaps.shape
    shared = np.zeros(0)
    if overlaps.size:
        # As many matches as possible come first; what they share decides among equally many.
        gain = (overlaps >= threshold) + overlaps / (2 * min(real, found))
        chosen = overlaps[linear_sum_assignment(gain, maximize=True)]
        shared = chosen[chosen >= threshold]
    return Matches(len(shared), found - len(shared), real - len(shared), float(shared.sum()))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


def _pairs(predictions: Iterable[NDArray], references: Iterable[NDArray]) -> Iterator[tuple[NDArray, NDArray]]:
    for i, (predicted, reference) in enumerate(zip(predictions, references, strict=True)):
        if predicted.shape != reference.shape:
            raise ValueError(f"prediction {i} must have its reference's shape {reference.shape}; got {predicted.shape}")
        yield predicted, reference


def _mean(values: Iterable[float]) -> float:
    """Mean of what is a number."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")
