"""Small segmentation networks and images for them."""

from __future__ import annotations

import torch
from spatial_grouping_attention.models import GroupingViT
from torch import Tensor

SIZES = {1: (23,), 2: (13, 10), 3: (5, 7, 6)}
LARGER = {1: (30,), 2: (19, 17), 3: (8, 9, 11)}
SPACINGS = {1: (0.7,), 2: (1.0, 0.6), 3: (1.5, 1.0, 0.8)}


def make(ndim: int = 2, *, seed: int = 0, **options: object) -> GroupingViT:
    """A network of three small stages in float64, in which nothing is at a special starting value."""
    torch.manual_seed(seed)
    settings: dict[str, object] = {
        "dims": (8, 12, 16),
        "depths": (1, 1, 1),
        "num_heads": (2, 2, 2),
        "stem_stride": 2,
        "window": 3,
        "iters": 2,
        "head_width": 8,
        "dtype": torch.float64,
        **options,
    }
    model = GroupingViT(ndim, 2, 3, **settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "freqs" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def image_of(size: tuple[int, ...], *, batch: int = 2, seed: int = 1, channels: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, *size, generator=generator, dtype=torch.float64)


def padded(image: Tensor, larger: tuple[int, ...], fill: float) -> tuple[Tensor, Tensor]:
    """An image at the start of a larger one, and which pixels of that are its own."""
    corner = tuple(slice(n) for n in image.shape[2:])
    wide = image.new_full((*image.shape[:2], *larger), fill)
    valid = torch.zeros(image.shape[0], *larger, dtype=torch.bool)
    wide[(..., *corner)], valid[(slice(None), *corner)] = image, True
    return wide, valid


def cut(image: Tensor, size: tuple[int, ...]) -> Tensor:
    return image[(..., *(slice(n) for n in size))]
