"""Peers: imported when they are asked for, absent with a reason when they are not there."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from entries import DEVICE, Absent
from torch import Tensor

# One function is compiled for every layout and problem of a session.
MOST_FORMS = 256

# A schema lives as long as its library object.
_SCHEMAS: list[torch.library.Library] = []


def library(name: str) -> ModuleType:
    """A library that may be missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError as error:
            raise Absent(f"{name} is not installed ({error})") from error


def beside_torchvision(name: str) -> ModuleType:
    """A library that imports torchvision where it is.

    torchvision's compiled operators are absent beside a CPU-only torch; its import then only lacks their schemas.
    """
    if not _SCHEMAS:
        try:
            importlib.import_module("torchvision.extension")
        except ImportError:
            pass
        except RuntimeError:
            schemas = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                schemas.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _SCHEMAS.append(schemas)
    return library(name)


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """torch.compile, anew for every shape, because one is timed and another is held to the oracle."""
    torch._dynamo.config.recompile_limit = MOST_FORMS
    return torch.compile(function, dynamic=False, **options)


def needs_gpu(what: str) -> None:
    """Say so where there is none."""
    if DEVICE != "cuda":
        raise Absent(f"{what} needs a GPU")


def flex_window(relation: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention over a window of a grid on itself, compiled: tokens k look at tokens q with values v."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = relation.mask(DEVICE)

    def sees(batch: Tensor, head: Tensor, token: Tensor, group: Tensor) -> Tensor:
        return mask[token, group]

    blocks = create_block_mask(sees, None, None, relation.num_inputs, relation.num_groups, device=DEVICE)
    attend = compiled(flex_attention)
    # Compiled for a CPU it refuses what has gradients, also where none are wanted.
    bare = DEVICE == "cpu"
    return lambda q, k, v: attend(*(x.detach() if bare else x for x in (k, q, v)), block_mask=blocks)
