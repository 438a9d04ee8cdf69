"""Whole layers: dense, sparse and deformable grouping, self-attention, the index's package; what compactness costs.

``pytest benchmarks/bench_layers.py [-k TITLE]``: float32, 128 channels, 3 rounds, window 3, stride 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from entries import BACKWARD, DEVICE, Bound, Case, Entry, in_float64, of_leaves, of_module, random_leaves, token_major
from harness import run
from other_libraries import library
from other_process import IndexLayer
from spatial_grouping_attention import (
    DeformableSpatialGroupingAttention,
    DenseSpatialGroupingAttention,
    Neighbourhood,
    SparseSpatialGroupingAttention,
    WindowedSelfAttention,
)
from spatial_grouping_attention.functional import grouping_attention
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
        entry("windowed self-attention, window 7", "windowed self-attention", shape, heads, window=7),
        of_index("dense, on the index", "DenseSpatialGroupingAttention", shape, heads),
        of_index("sparse, on the index", "SparseSpatialGroupingAttention", shape, heads),
    ]
    afford = math.prod(shape) <= MOST_TOKENS
    return Case(f"layers, {title}, {heads} heads", entries, "sparse", same_task=False, gate_full_size=afford)


def compactness(title: str, shape: tuple[int, ...]) -> Case:
    """What the term costs a layer."""
    entries = []
    for kind in (*VARIANTS, "windowed self-attention"):
        if kind == "deformable" and math.prod(shape) > 1024:
            continue
        for name, beta in ((kind, None), (f"{kind}, compactness", 2.0)):
            entries.append(entry(name, kind, shape, 8, compactness=beta))
    return Case(
        f"compactness, layers, {title}",
        entries,
        "sparse",
        ways=(BACKWARD,),
        same_task=False,
        gate_full_size=math.prod(shape) <= MOST_TOKENS,
    )


def compactness_of_calls(title: str, shape: tuple[int, ...]) -> Case:
    """What it costs a single dense call, from spread out (0.1) to nearly local (10)."""

    def of(factor: float | None, backend: str, dtype: torch.dtype) -> Callable[[bool], Bound]:
        def bind(small: bool) -> Bound:
            grid = (small_of(shape) if len(shape) > 1 else (60,)) if small else shape
            groups = tuple((n - 1) // 2 + 1 for n in grid)
            relation = Neighbourhood(grid, groups, 2, 3, 1, tuple(2 * g - 1 for g in groups))
            leaves = token_major(dtype, 8, 16, q=relation.num_groups, k=relation.num_inputs, v=relation.num_inputs)
            if factor is None:
                return of_leaves(lambda q, k, v: grouping_attention(q, k, v, relation, backend=backend)[0], leaves)
            beta = torch.full((8,), factor, dtype=dtype, device=DEVICE, requires_grad=True)
            return of_leaves(
                lambda q, k, v, b: grouping_attention(q, k, v, relation, compactness=b, backend=backend)[0],
                leaves | {"beta": beta},
            )

        return bind

    entries = [
        Entry(
            name,
            of(factor, "fused", torch.float32),
            of(factor, "reference", torch.float64),
            # Nearly local memberships hardly depend on beta: its gradient is what is left of terms that cancel.
            tolerance=1e-3 if factor == 10.0 else 1e-4,
            note="of which the gradient to beta alone makes use" if factor == 10.0 else "",
        )
        for name, factor in {"without": None, "beta 0.1": 0.1, "beta 2": 2.0, "beta 10": 10.0}.items()
    ]
    return Case(
        f"compactness, dense calls, {title}, 8 heads of 16",
        entries,
        "without",
        ways=(BACKWARD,),
        gate_full_size=math.prod(shape) <= MOST_TOKENS,
    )


CASES = [
    variants("32x32 -> 16x16", (32, 32), 4),
    variants("64x64 -> 32x32", (64, 64), 8),
    variants("16x16x16 -> 8x8x8", (16,) * 3, 8),
    *(compactness("x".join(map(str, shape)), shape) for shape in ((16, 16), (32, 32), (64, 64), (16, 16, 16))),
    *(
        compactness_of_calls("x".join(map(str, shape)), shape)
        for shape in ((16, 16), (32, 32), (64, 64), (16, 16, 16), (4096,))
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_layers(case: Case, recorder: Any) -> None:
    run(case, recorder)
