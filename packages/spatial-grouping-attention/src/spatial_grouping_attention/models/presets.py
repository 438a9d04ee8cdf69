"""Networks of four sizes."""

from __future__ import annotations

from typing import Any

from .vit import GroupingViT

_PUBLISHED: dict[str, Any] = {
    "depths": (3, 4, 18, 5),
    "stem_stride": 4,
    "strides": 2,
    "kernels": 3,
    "window": 7,
    "grouping_window": 3,
    "grouping_mlp_ratio": 2.0,
    "iters": 3,
    "head_width": 512,
}
_HEAD_DIM = 32


def grouping_vit_nano(
    spatial_dims: int = 2, in_channels: int = 3, num_classes: int = 2, **keywords: Any
) -> GroupingViT:
    """A network small enough to be trained on a CPU: three stages, patches of 2, about 0.4 million parameters.

    All groupings are sparse.

    Args:
        spatial_dims: axes of the images: 1, 2 or 3.
        in_channels: channels of the images.
        num_classes: logits of every pixel.
        **keywords: of :class:`GroupingViT`; they win over those of the preset.
    """
    preset = {
        "dims": (32, 64, 96),
        "depths": (1, 2, 2),
        "num_heads": (2, 4, 6),
        "mlp_ratio": 2.0,
        "stem_stride": 2,
        "window": 5,
        # The last grid of a whole image is still large, and a window means the same on images of any size.
        "grouping": ("sparse", "sparse"),
        "head_width": 128,
    }
    return GroupingViT(spatial_dims, in_channels, num_classes, **{**preset, **keywords})


def grouping_vit_tiny(
    spatial_dims: int = 2, in_channels: int = 3, num_classes: int = 150, **keywords: Any
) -> GroupingViT:
    """The layout published as T (arXiv:2505.16993): dims from 64, 29 million parameters without head.

    Args:
        spatial_dims: axes of the images: 1, 2 or 3.
        in_channels: channels of the images.
        num_classes: logits of every pixel; by default the 150 of ADE20k.
        **keywords: of :class:`GroupingViT`; they win over those of the preset.
    """
    return _published(64, 3.0, spatial_dims, in_channels, num_classes, keywords)


def grouping_vit_base(
    spatial_dims: int = 2, in_channels: int = 3, num_classes: int = 150, **keywords: Any
) -> GroupingViT:
    """The layout published as B (arXiv:2505.16993): dims from 128, 96 million parameters without head.

    Args:
        spatial_dims, in_channels, num_classes, **keywords: see :func:`grouping_vit_tiny`.
    """
    return _published(128, 2.0, spatial_dims, in_channels, num_classes, keywords)


def grouping_vit_large(
    spatial_dims: int = 2, in_channels: int = 3, num_classes: int = 150, **keywords: Any
) -> GroupingViT:
    """The layout published as L (arXiv:2505.16993): dims from 192, 215 million parameters without head.

    Args:
        spatial_dims, in_channels, num_classes, **keywords: see :func:`grouping_vit_tiny`.
    """
    return _published(192, 2.0, spatial_dims, in_channels, num_classes, keywords)


def _published(
    dim: int, mlp_ratio: float, spatial_dims: int, in_channels: int, num_classes: int, keywords: dict[str, Any]
) -> GroupingViT:
    dims = tuple(dim * factor for factor in (1, 2, 4, 8))
    heads = tuple(d // _HEAD_DIM for d in dims)
    preset = {**_PUBLISHED, "dims": dims, "num_heads": heads, "mlp_ratio": mlp_ratio}
    return GroupingViT(spatial_dims, in_channels, num_classes, **{**preset, **keywords})
