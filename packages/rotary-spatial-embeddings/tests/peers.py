"""The libraries that parity is checked against, imported once and with their imports' noise kept out."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from types import ModuleType

import pytest
import torch

# timm needs torchvision, and transformers imports it where it is. Its compiled operators are absent beside a CPU-only
# torch; its import then only lacks their schemas. The library object must outlive the import.
_SCHEMAS: list[torch.library.Library] = []


def beside_torchvision(name: str) -> ModuleType:
    """A library that imports torchvision."""
    if not _SCHEMAS and not _has_nms():
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _SCHEMAS.append(library)
    return _quietly(name)


def timm_layers() -> ModuleType:
    """``timm.layers``."""
    return beside_torchvision("timm.layers")


def rotary_embedding_torch() -> ModuleType:
    """``rotary_embedding_torch``."""
    return _quietly("rotary_embedding_torch")


def _has_nms() -> bool:
    try:
        importlib.import_module("torchvision.extension")
    except (ImportError, RuntimeError):
        return False
    return hasattr(torch.ops.torchvision, "nms")


def _quietly(name: str) -> ModuleType:
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        pytest.skip(f"parity with {name} is checked where it is installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)
