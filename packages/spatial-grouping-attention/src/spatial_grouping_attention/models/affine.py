"""Spacing from the affine matrix that an image carries, as MONAI's MetaTensor does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..geometry import Spacing


def spacing_of(image: Tensor) -> Tensor:
    """Distances between the pixels of images, read from their affine matrix.

    Column i of the matrix is the step along axis i of the image, in the unit of the file (millimetres for NIfTI); its
    length is the spacing, whatever the orientation. A MetaTensor made without a matrix has the identity.

    Args:
        image: (B, C, *size) with an attribute ``affine``: one matrix (n + 1, n + 1) or one per image (B, n + 1, n + 1),
            n at least the axes of the image.

    Returns:
        (axes,), or (B, axes) where there is one matrix per image, float64 on the device of the image.

    Raises:
        ValueError: the image carries no matrix, or one of another shape.
    """
    affine = getattr(image, "affine", None)
    if affine is None:
        raise ValueError(
            f"image must carry an affine matrix where no spacing is given; got a {type(image).__name__} without "
            "(sliding windows lose theirs: give them spacing=common_spacing(image))"
        )
    axes = image.ndim - 2
    matrix = torch.as_tensor(affine, dtype=torch.float64, device=image.device)
    if matrix.ndim not in (2, 3) or matrix.shape[-1] <= axes or matrix.shape[-2] != matrix.shape[-1]:
        raise ValueError(
            f"affine of the image must be a square matrix, or one per image, for at least {axes} axes; "
            f"got shape {tuple(matrix.shape)}"
        )
    return matrix[..., :-1, :axes].square().sum(-2).sqrt()


def common_spacing(image: Tensor) -> Tensor:
    """The one spacing (axes,) of all images of a batch, for what cuts them into windows.

    MONAI's sliding windows are plain tensors, and any of them may come from any image of the batch. So
    ``inferer(image, network, spacing=common_spacing(image))``.

    Args:
        image: see :func:`spacing_of`.

    Raises:
        ValueError: as :func:`spacing_of`, or images differ in spacing.
    """
    rows = spacing_of(image).reshape(-1, image.ndim - 2)
    # Matrices that were multiplied and inverted on their way are off by rounding.
    if not torch.allclose(rows, rows[:1].expand_as(rows), rtol=1e-5, atol=0.0):
        raise ValueError(f"images of one batch must have the same spacing to be cut into windows; got {rows.tolist()}")
    return rows[0]


class SpacingFromAffine(nn.Module):
    """A segmentation network for code that knows images and logits alone, such as MONAI's.

    Spacing is read from the image (:func:`spacing_of`) unless it is given, so none is ever assumed, and the logits come
    back as what the image was: a MetaTensor goes in, a MetaTensor with the same metadata comes out.

    Args:
        network: :class:`GroupingViT`, or what is called like one, compiled or wrapped.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor, spacing: Spacing | None = None, valid: Tensor | None = None) -> Tensor:
        """Images (B, in_channels, *size) -> logits (B, num_classes, *size); see :meth:`GroupingViT.forward`.

        Raises:
            ValueError: no spacing is given, and the image carries none.
        """
        if spacing is None:
            spacing = spacing_of(image)
        # The network's own arithmetic is not the metadata's matter.
        logits: Tensor = self.network(image.as_subclass(Tensor), spacing, valid).logits
        kind: Any = type(image)
        if hasattr(kind, "copy_meta_from"):
            logits = kind(logits).copy_meta_from(image)
        return logits
