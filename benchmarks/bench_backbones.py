"""Whole networks beside their twins, timm's Swin-T and MONAI's SwinUNETR.

``pytest benchmarks/bench_backbones.py [-k TITLE]``: float32; with backward, gradients to all parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from entries import DEVICE, Bound, Case, Entry, in_float64, of_module, random_leaves
from harness import run
from other_libraries import beside_torchvision
from spatial_grouping_attention.models import grouping_vit_nano, grouping_vit_tiny
from torch import Tensor, nn

CLASSES = 4
# Dozens of blocks in float32, and gradients through all of them.
TOLERANCE = 1e-3
# SwinUNETR norms over as few as two places, which makes much of rounding.
PEERS_TOLERANCE = 1e-2


def swin_tiny() -> nn.Module:
    """Swin-T without its classifier."""
    return beside_torchvision("timm").create_model("swin_tiny_patch4_window7_224", num_classes=0)


def swin_unetr(spatial_dims: int, feature_size: int) -> nn.Module:
    nets = beside_torchvision("monai.networks.nets")
    return nets.SwinUNETR(1, CLASSES, feature_size=feature_size, spatial_dims=spatial_dims)


def result_of(network: nn.Module, image: Tensor) -> Tensor:
    """What a network is for: logits of pixels, or features."""
    output = network(image)
    logits: Tensor = output if torch.is_tensor(output) else output.logits
    return logits


def entry(
    name: str,
    make: Callable[..., nn.Module],
    size: tuple[int, ...],
    small: tuple[int, ...],
    *,
    ours: bool = False,
) -> Entry:
    """A network, held to itself in float64; ours to itself with the reference engine.

    Dropout and stochastic depth are off, so that a call can be compared; shapes of (B, C, *size).
    """

    def built(**options: Any) -> nn.Module:
        torch.manual_seed(0)
        return make(**options).eval().to(DEVICE)

    def of(network: nn.Module, is_small: bool, dtype: torch.dtype) -> Bound:
        return of_module(network, result_of, random_leaves(dtype, x=small if is_small else size)["x"])

    exact = {"backend": "reference"} if ours else {}
    note = "ours" if ours else "held to itself in float64"
    return Entry(
        name,
        lambda is_small: of(built(), is_small, torch.float32),
        lambda is_small: of(in_float64(built(**exact)), is_small, torch.float64),
        TOLERANCE if ours else PEERS_TOLERANCE,
        note="" if ours else note,
    )


def backbones() -> Case:
    size, small = (1, 3, 224, 224), (1, 3, 64, 64)
    entries = [
        entry("grouping_vit_tiny", grouping_vit_tiny, size, small, ours=True),
        entry("its twin", lambda **o: grouping_vit_tiny(downsample="conv", **o), size, small, ours=True),
        entry("timm Swin-T", swin_tiny, size, size),
    ]
    return Case("backbones, 224 x 224, one image", entries, "grouping_vit_tiny", same_task=False, gate_full_size=False)


def segmentation(*sides: int) -> Case:
    spatial_dims = len(sides)
    # Two images: of a single one, torch 2.13's instance norm on a CPU computes wrong gradients where the gradient that
    # reaches it lies with its channels last, and the gate is red for grouping_vit_nano.
    size = (2, 1, *sides)
    # SwinUNETR halves every axis five times and then norms what is left of it.
    small = (2, 1, 128, 128) if spatial_dims == 2 else (2, 1, 64, 32, 32)

    def nano(**options: Any) -> nn.Module:
        return grouping_vit_nano(spatial_dims, 1, CLASSES, **options)

    entries = [
        entry("grouping_vit_nano", nano, size, small, ours=True),
        entry("its twin", lambda **o: nano(downsample="conv", **o), size, small, ours=True),
        entry("MONAI SwinUNETR, 12 channels", lambda: swin_unetr(spatial_dims, 12), size, small),
        entry("MONAI SwinUNETR, 24 channels", lambda: swin_unetr(spatial_dims, 24), size, small),
    ]
    title = " x ".join(map(str, sides))
    return Case(
        f"segmentation, {title}, two images", entries, "grouping_vit_nano", same_task=False, gate_full_size=False
    )


CASES = (backbones(), segmentation(256, 256), segmentation(64, 64, 32))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_backbones(case: Case, recorder: Any) -> None:
    run(case, recorder)
