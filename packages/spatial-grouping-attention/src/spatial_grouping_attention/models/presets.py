"""Networks of four sizes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from .vit import GroupingViT

Preset = TypeVar("Preset", bound=Callable[..., GroupingViT])

_NANO: dict[str, Any] = {
    "dims": (16, 32, 128),
    "depths": (0, 1, 2),
    "num_heads": (1, 2, 8),
    "mlp": "conv",
    "mlp_ratio": 2.0,
    "stem": "conv",
    "stem_stride": 2,
    "window": 5,
    # The last grid of a whole image is still large, and a window means the same on images of any size.
    "grouping": "sparse",
    "iters": 1,
    "head": "fused",
}


def _published(dim: int, mlp_ratio: float) -> dict[str, Any]:
    """The layout of the paper: four stages of heads of 32 channels."""
    dims = tuple(dim * factor for factor in (1, 2, 4, 8))
    return {
        "dims": dims,
        "depths": (3, 4, 18, 5),
        "num_heads": tuple(d // 32 for d in dims),
        "mlp_ratio": mlp_ratio,
        "stem_stride": 4,
        "strides": 2,
        "kernels": 3,
        "window": 7,
        "grouping_window": 3,
        "grouping_mlp_ratio": 2.0,
        "iters": 3,
        "head_width": 512,
    }


_TINY, _BASE, _LARGE = _published(64, 3.0), _published(128, 2.0), _published(192, 2.0)

SETTINGS = {"nano": _NANO, "tiny": _TINY, "base": _BASE, "large": _LARGE}


def settings_of(preset: str, keywords: dict[str, Any]) -> dict[str, Any]:
    """Keywords of :class:`GroupingViT`: those of a preset, by its name in SETTINGS, where none of ``keywords`` wins."""
    settings = {**SETTINGS[preset], **keywords}
    if settings.get("downsample") == "conv" and settings.get("head") == "fused" and "head" not in keywords:
        settings["head"] = "fpn"  # without memberships the pyramid interpolates
    return settings


def _spell_out(settings: dict[str, Any]) -> Callable[[Preset], Preset]:
    """Show GroupingViT's keywords, with the defaults that they have here, in the signature of a preset."""

    def decorate(preset: Preset) -> Preset:
        signature = inspect.signature(preset)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        theirs = [
            p.replace(default=settings.get(name, p.default))
            for name, p in inspect.signature(GroupingViT).parameters.items()
            if p.kind is p.KEYWORD_ONLY
        ]
        preset.__signature__ = signature.replace(parameters=[*own, *theirs])  # type: ignore[attr-defined]
        return preset

    return decorate


@_spell_out(_NANO)
def grouping_vit_nano(
    spatial_dims: int = 2, in_channels: int = 3, num_classes: int = 2, **keywords: Any
) -> GroupingViT:
    """A network small enough to be trained on a CPU: three stages, patches of 2, about 0.4 million parameters.

    It begins with convolutions and ends with the fused head (its twin with the feature pyramid); all groupings are
    sparse, and of one round.

    Args:
        spatial_dims: axes of the images: 1, 2 or 3.
        in_channels: channels of the images.
        num_classes: logits of every pixel.
        **keywords: of :class:`GroupingViT`; they win over those of the preset.
    """
    return GroupingViT(spatial_dims, in_channels, num_classes, **settings_of("nano", keywords))


@_spell_out(_TINY)
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
    return GroupingViT(spatial_dims, in_channels, num_classes, **settings_of("tiny", keywords))


@_spell_out(_BASE)
def grouping_vit_base(
    spatial_dims: int = 2, in_channels: int = 3, num_classes: int = 150, **keywords: Any
) -> GroupingViT:
    """The layout published as B (arXiv:2505.16993): dims from 128, 96 million parameters without head.

    Args:
        spatial_dims, in_channels, num_classes, **keywords: see :func:`grouping_vit_tiny`.
    """
    return GroupingViT(spatial_dims, in_channels, num_classes, **settings_of("base", keywords))


@_spell_out(_LARGE)
def grouping_vit_large(
    spatial_dims: int = 2, in_channels: int = 3, num_classes: int = 150, **keywords: Any
) -> GroupingViT:
    """The layout published as L (arXiv:2505.16993): dims from 192, 215 million parameters without head.

    Args:
        spatial_dims, in_channels, num_classes, **keywords: see :func:`grouping_vit_tiny`.
    """
    return GroupingViT(spatial_dims, in_channels, num_classes, **settings_of("large", keywords))
