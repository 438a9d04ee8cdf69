"""Instances by way of classes, for networks that only classify pixels: inside of objects, and their borders."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from skimage.segmentation import find_boundaries, watershed
from torch import Tensor

BACKGROUND, INSIDE, BORDER = 0, 1, 2


def instance_classes(labels: NDArray) -> NDArray[np.int64]:
    """Classes to train on: 0 background, 1 inside of an object, 2 its border.

    The border is the outermost pixel of an object in 2-D and 3-D, whatever a pixel measures: objects that touch are
    two pixels apart inside. An object that is nothing but border, being thin, is inside as a whole.

    Args:
        labels: (*size), 0 is background, every object has a number.
    """
    border = find_boundaries(labels, connectivity=1, mode="inner", background=0)
    cores = np.unique(labels[~border])
    thin = ~np.isin(labels, cores)
    return np.where(labels == 0, BACKGROUND, np.where(border & ~thin, BORDER, INSIDE))


def separate(logits: NDArray | Tensor) -> NDArray[np.int32]:
    """Objects from what a network says of the classes of `instance_classes`.

    Every connected piece of inside is an object, and grows by watershed over the border around it, from the
    likeliest inside to the unlikeliest. Border that touches no inside belongs to nothing.

    Args:
        logits: (3, *size), of background, inside and border.

    Returns:
        (*size), 0 is background, objects are 1, 2, ...
    """
    inside = torch.as_tensor(logits).float().softmax(0)[INSIDE].cpu().numpy()
    likeliest = torch.as_tensor(logits).argmax(0).cpu().numpy()
    seeds, _ = ndimage.label(likeliest == INSIDE)
    return watershed(-inside, seeds, mask=likeliest != BACKGROUND).astype(np.int32)
