"""How good a mask is: mean intersection over union, and the boundary F-score."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Labels = NDArray[np.integer]


@dataclass(frozen=True)
class Scores:
    """Both measures for every class; NaN for a class that neither mask has."""

    iou: tuple[float, ...]
    boundary: tuple[float, ...]

    @property
    def mean_iou(self) -> float:
        """Mean over classes."""
        return float(np.nanmean(self.iou))

    @property
    def mean_boundary(self) -> float:
        """Mean over classes."""
        return float(np.nanmean(self.boundary))


def score(predicted: Labels, reference: Labels, num_classes: int, tolerance: float = 1.0) -> Scores:
    """Compare two label images class by class.

    Args:
        predicted: class of every pixel.
        reference: of the same shape.
        num_classes: classes are 0 .. num_classes - 1.
        tolerance: distance in pixels within which a boundary counts as found.
    """
    masks = [(predicted == c, reference == c) for c in range(num_classes)]
    return Scores(
        tuple(intersection_over_union(*pair) for pair in masks),
        tuple(boundary_f_score(*pair, tolerance) for pair in masks),
    )


def intersection_over_union(predicted: NDArray[np.bool_], reference: NDArray[np.bool_]) -> float:
    """Shared pixels over all pixels of two masks; NaN where both are empty."""
    union = np.count_nonzero(predicted | reference)
    return np.count_nonzero(predicted & reference) / union if union else float("nan")


def boundary_f_score(predicted: NDArray[np.bool_], reference: NDArray[np.bool_], tolerance: float = 1.0) -> float:
    """Harmonic mean of how much of the predicted boundary is real and how much of the real one was found.

    A boundary pixel counts where the other mask has one within ``tolerance`` pixels (Euclidean). After Csurka et al.,
    "What is a good evaluation measure for semantic segmentation?", BMVC 2013.

    Args:
        predicted: mask.
        reference: mask of the same shape.
        tolerance: in pixels.

    Returns:
        In [0, 1]; NaN where neither mask has a boundary.
    """
    found, real = boundary(predicted), boundary(reference)
    if not found.any() and not real.any():
        return float("nan")
    if not found.any() or not real.any():
        return 0.0
    precision = np.mean(ndimage.distance_transform_edt(~real)[found] <= tolerance)
    recall = np.mean(ndimage.distance_transform_edt(~found)[real] <= tolerance)
    total = precision + recall
    return float(2 * precision * recall / total) if total else 0.0


def boundary(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels of a mask that touch a pixel outside it. The edge of the image is no boundary."""
    return mask & ~ndimage.binary_erosion(mask, border_value=1)
