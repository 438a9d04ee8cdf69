"""Small networks and images for the tests beside other libraries, and timm, which needs care to be imported."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from spatial_grouping_attention.models import GroupingViT, grouping_vit_nano
from torch import Tensor

# timm imports torchvision, whose compiled operators are absent beside a CPU-only torch; its import then only lacks
# their schemas. The library object must outlive the import.
_SCHEMAS: list[torch.library.Library] = []


def beside_torchvision(name: str) -> ModuleType:
    """A library that imports torchvision."""
    if not _SCHEMAS and not _has_nms():
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _SCHEMAS.append(library)
    return importlib.import_module(name)


def _has_nms() -> bool:
    try:
        importlib.import_module("torchvision.extension")
    except (ImportError, RuntimeError):
        return False
    return hasattr(torch.ops.torchvision, "nms")


def nano(
    spatial_dims: int = 2, in_channels: int = 1, num_classes: int = 3, *, seed: int = 0, **options: Any
) -> GroupingViT:
    """The preset in which nothing is at a special starting value: groupings take part from the first step."""
    torch.manual_seed(seed)
    return stirred(grouping_vit_nano(spatial_dims, in_channels, num_classes, **options))


def stirred(model: Any) -> Any:
    """A model whose parameters were moved a little, wave vectors apart."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "freqs" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
