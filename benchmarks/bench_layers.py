"""Whole layers: dense, sparse and deformable grouping, self-attention, and the index's packages.

``pytest benchmarks/bench_layers.py [-k TITLE]``: float32, 128 channels, 3 rounds, window 3, stride 2.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from entries import DEVICE, Bound, Case, Entry, in_float64, of_module, random_leaves
from harness import run
from other_libraries import library
from other_process import IndexLayer
from spatial_grouping_attention import (
    DeformableSpatialGroupingAttention,
    DenseSpatialGroupingAttention,
    SparseSpatialGroupingAttention,
    WindowedSelfAttention,
)
from torch import Tensor, nn

CHANNELS = 128
# Three rounds of projections, norms and MLPs in float32.
TOLERANCE = 1e-4

# Up to here the matrices of the oracle, in float64 and with gradients, are no burden.
MOST_TOKENS = 1024

VARIANTS: dict[str, type[nn.Module]] = {
    "dense": DenseSpatialGroupingAttention,
    "sparse": SparseSpatialGroupingAttention,
    "deformable": DeformableSpatialGroupingAttention,
}
# A layer starts with its points on whole steps, where it must equal the sparse one.
ONLY_DEFORMABLE = ("mask_embedding", "offsets.weight", "offsets.bias")


def small_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (9, 8, 10)[: len(shape)] if len(shape) == 3 else (13, 14)


def layer(kind: str, shape: tuple[int, ...], heads: int, channels: int, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    if kind == "windowed self-attention":
        return WindowedSelfAttention(channels, heads, len(shape), **options)
    return VARIANTS[kind](channels, len(shape), 3, heads, 2, **options)


def bound(module: nn.Module, shape: tuple[int, ...], channels: int, dtype: torch.dtype) -> Bound:
    x = random_leaves(dtype, x=(1, math.prod(shape), channels))["x"]

    def read(module: nn.Module, x: Tensor) -> Tensor:
        out = module(x, 1.0, shape)
        return out if torch.is_tensor(out) else out.x_out

    return of_module(module.to(DEVICE), read, x, without=("mask_embedding",))


def entry(name: str, kind: str, shape: tuple[int, ...], heads: int, channels: int = CHANNELS, **options: Any) -> Entry:
    """A layer, held to itself by the reference engine in float64; a deformable one to the sparse layer."""
    exact = {**options, "backend": "reference"}

    def of(small: bool) -> tuple[int, ...]:
        return small_of(shape) if small else shape

    def bind(small: bool) -> Bound:
        if options.get("backend") == "native":
            library("numba")
        return bound(layer(kind, of(small), heads, channels, **options), of(small), channels, torch.float32)

    def oracle(small: bool) -> Bound:
        weights = layer(kind, of(small), heads, channels, **options).state_dict()
        held = layer("sparse" if kind == "deformable" else kind, of(small), heads, channels, **exact)
        held.load_state_dict(weights, strict=kind != "deformable")
        return bound(in_float64(held), of(small), channels, torch.float64)

    return Entry(name, bind, oracle, TOLERANCE)


def of_index(name: str, kind: str, shape: tuple[int, ...], heads: int) -> Entry:
    """The same layer of the packages on the index."""

    def bind(small: bool) -> Any:
        settings = {"feature_dims": CHANNELS, "spatial_dims": len(shape), "kernel_size": 3, "num_heads": heads}
        return IndexLayer(name=kind, shape=small_of(shape) if small else shape, stride=2, iters=3, **settings)

    formula = "another formula (softmax over tokens); held to itself in float64; in a process of its own"
    return Entry(name, bind, bind, TOLERANCE, note=formula)


def variants(title: str, shape: tuple[int, ...], heads: int) -> Case:
    """All variants on one grid."""
    entries = [
        entry("sparse", "sparse", shape, heads),
        entry("sparse, tiled", "sparse", shape, heads, backend="tiled"),
        entry("dense", "dense", shape, heads),
        entry("deformable", "deformable", shape, heads),
        entry("deformable, plain torch", "deformable", shape, heads, backend="reference"),
        entry("windowed self-attention, window 7", "windowed self-attention", shape, heads, window=7),
        of_index("dense, on the index", "DenseSpatialGroupingAttention", shape, heads),
        of_index("sparse, on the index", "SparseSpatialGroupingAttention", shape, heads),
    ]
    afford = math.prod(shape) <= MOST_TOKENS
    return Case(f"layers, {title}, {heads} heads", entries, "sparse", same_task=False, gate_full_size=afford)


CASES = [
    variants("32x32 -> 16x16", (32, 32), 4),
    variants("64x64 -> 32x32", (64, 64), 8),
    variants("16x16x16 -> 8x8x8", (16,) * 3, 8),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_layers(case: Case, recorder: Any) -> None:
    run(case, recorder)
