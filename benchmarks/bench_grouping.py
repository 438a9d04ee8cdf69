"""Single grouping calls: every engine and every peer, against copies, flash attention and products.

``pytest benchmarks/bench_grouping.py [-k TITLE]``: float32; heads lie side by side in memory, as layers have them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from entries import DEVICE, Absent, Bound, Case, Entry, of_leaves, token_major, yardstick
from harness import run
from other_libraries import compiled, flex_window, library, needs_gpu
from spatial_grouping_attention import Neighbourhood
from spatial_grouping_attention.functional import assign, grouping_attention
from torch import Tensor

Operator = Callable[[Tensor, Tensor, Tensor], Tensor]
Relation = Neighbourhood


def square(side: int, stride: int = 2, window: int = 3, dilation: int = 1) -> Relation:
    coarse = (side - 1) // stride + 1
    return Neighbourhood((side, side), (coarse, coarse), stride, 3, 1, window, dilation)


def cube(side: int, stride: int = 2, window: int = 3, dilation: int = 1) -> Relation:
    coarse = (side - 1) // stride + 1
    return Neighbourhood((side,) * 3, (coarse,) * 3, stride, 3, 1, window, dilation)


def small_of(relation: Relation) -> Relation:
    """The same stride and window on a grid that the matrix in float64 can afford, of sizes that do not divide."""
    sides = [
        min(n, (29, 23, 11)[i] if relation.ndim < 3 else (9, 10, 11)[i]) for i, n in enumerate(relation.input_shape)
    ]
    coarse = tuple((n + 2 * a.padding - a.kernel) // a.stride + 1 for n, a in zip(sides, relation.axes, strict=True))
    return Neighbourhood(
        tuple(sides),
        coarse,
        relation.stride,
        relation.kernel_size,
        relation.padding,
        relation.window,
        relation.dilation,
    )


def grouping(relation: Relation | None, backend: str) -> Operator:
    return lambda q, k, v: grouping_attention(q, k, v, relation, backend=backend)[0]


def leaves_of(relation: Relation, heads: int, size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return token_major(dtype, heads, size, q=relation.num_groups, k=relation.num_inputs, v=relation.num_inputs)


def exact_engine(relation: Relation) -> str:
    """The matrix where float64 can afford it; else the tiles, which a test below holds to the matrix."""
    return "reference" if relation.num_inputs * relation.num_groups < 2**21 else "tiled"


def entry(
    name: str, make: Callable[[Relation], Operator], relation: Relation, heads: int, size: int, **options: Any
) -> Entry:
    """A windowed grouping, by what makes an operator of a relation."""

    def of(small: bool) -> Relation:
        return small_of(relation) if small else relation

    return Entry(
        name,
        lambda small: of_leaves(make(of(small)), leaves_of(of(small), heads, size, torch.float32)),
        lambda small: of_leaves(
            grouping(of(small), exact_engine(of(small))), leaves_of(of(small), heads, size, torch.float64)
        ),
        **options,
    )


def by(backend: str, compile_it: bool = False) -> Callable[[Relation], Operator]:
    """One of our engines; what it refuses is the reason why it is absent."""

    def make(relation: Relation) -> Operator:
        if backend == "native":
            library("numba")
        if backend == "triton":
            needs_gpu("triton")
        if backend == "natten":
            library("natten")
            needs_gpu("NATTEN with gradients")
        operator = grouping(relation, backend)
        return compiled(operator, fullgraph=True) if compile_it else operator

    return make


def copies(relation: Relation, heads: int, size: int) -> Entry:
    """Copying k and v, both of which every engine must read."""

    def bind(small: bool) -> Bound:
        leaves = leaves_of(relation, heads, size, torch.float32)

        def call() -> Tensor:
            copied = leaves["k"].clone(), leaves["v"].clone()
            return copied[1]

        return Bound(call, leaves)

    return yardstick("copy of k and v", bind)


ENGINES = {"native": "native", "tiled": "tiled", "triton": "triton", "natten": "NATTEN"}


def windowed(title: str, relation: Relation, heads: int, size: int) -> Case:
    """All engines on one window."""
    entries = [copies(relation, heads, size)]
    entries += [entry(name, by(backend), relation, heads, size) for backend, name in ENGINES.items()]
    if relation.num_inputs * relation.num_groups <= 2**21:
        entries.append(entry("masked matrix", by("reference"), relation, heads, size))
    if relation.ndim == 2:
        entries.append(entry("FlexAttention", flex_grouping, relation, heads, size, counted=False))
    return Case(f"grouping, {title}, {heads} heads of {size}", entries, "native")


def through_a_compiler(title: str, relation: Relation, name: str, backend: str) -> Case:
    """What torch.compile makes of an engine, 4 heads of 32."""
    entries = [
        entry(name, by(backend), relation, 4, 32),
        entry(f"{name}, torch.compile", by(backend, compile_it=True), relation, 4, 32, counted=False),
    ]
    return Case(f"compiled grouping, {title}", entries, name)


def flex_grouping(relation: Relation) -> Operator:
    """Two calls of FlexAttention; the second needs the first one's normalisers."""
    if DEVICE != "cuda":
        raise Absent("compiled for a CPU, FlexAttention returns no logsumexp, which grouping needs")
    from gpu_report_cases import flex_form

    form = flex_form(relation)
    return lambda q, k, v: form(q, k, v)[0]


WINDOWED = [
    windowed("256x256 -> 128x128", square(256), 4, 32),
    windowed("256x256 -> 128x128", square(256), 8, 32),
    windowed("256x256 -> 128x128, window 7", square(256, window=7), 4, 32),
    windowed("256x256 -> 128x128, dilation 4", square(256, dilation=4), 4, 32),
    windowed("256x256 -> 64x64, stride 4", square(256, stride=4), 4, 32),
    windowed("64x64 -> 64x64, stride 1, window 7", square(64, stride=1, window=7), 4, 32),
    windowed("64x64 -> 32x32", square(64), 4, 32),
    windowed("64x64 -> 32x32", square(64), 8, 32),
    windowed("64x64 -> 32x32, window 7", square(64, window=7), 8, 32),
    windowed("64x64 -> 16x16, stride 4", square(64, stride=4), 8, 32),
    windowed("32x32 -> 16x16", square(32), 8, 32),
    windowed("32x32 -> 8x8, stride 4", square(32, stride=4), 8, 32),
    windowed("16x16 -> 8x8", square(16), 8, 32),
    windowed("32x32x32 -> 16x16x16", cube(32), 4, 32),
    windowed("32x32x32 -> 16x16x16, dilation 4", cube(32, dilation=4), 4, 32),
    windowed("16x48x48 -> 16x24x24", Neighbourhood((16, 48, 48), (16, 24, 24), (1, 2, 2), 3, 1, 3), 4, 16),
    windowed("16x16x16 -> 8x8x8", cube(16), 8, 32),
    windowed("16x16x16 -> 4x4x4, stride 4", cube(16, stride=4), 8, 32),
]


def dilations() -> Case:
    """What a dilated window costs: the halo of a tile grows with it."""
    entries = []
    for backend in ("tiled", "native"):
        for step in (1, 2, 4, 8):
            relation = square(192, dilation=step)
            entries.append(entry(f"{backend}, dilation {step}", by(backend), relation, 1, 16))
    return Case("dilated grouping, 192x192 -> 96x96, 1 heads of 16", entries, "tiled, dilation 1", same_task=False)


def dense(size: int) -> Case:
    """Every token sees every group: against two flash calls and the matrix."""
    heads = 8

    def leaves(small: bool, dtype: torch.dtype) -> dict[str, Tensor]:
        groups, tokens = (64, 300) if small else (1024, 4096)
        return token_major(dtype, heads, size, q=groups, k=tokens, v=tokens)

    def of(name: str, operator: Operator, **options: Any) -> Entry:
        return Entry(
            name,
            lambda small: of_leaves(operator, leaves(small, torch.float32)),
            lambda small: of_leaves(grouping(None, "reference"), leaves(small, torch.float64)),
            **options,
        )

    def two_flash_calls(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        spread = F.scaled_dot_product_attention(k, q, q)
        # The first result must reach the gradient too, or its backward is not run.
        return F.scaled_dot_product_attention(q, k, v) + spread[..., : q.shape[-2], :]

    entries = [
        yardstick("two flash calls", lambda small: of_leaves(two_flash_calls, leaves(small, torch.float32))),
        of("fused", grouping(None, "fused")),
        of("matrix", grouping(None, "reference")),
        of("matrix, torch.compile", compiled(grouping(None, "reference"), fullgraph=True), counted=False),
    ]
    return Case(
        f"dense grouping, 4096 tokens, 1024 groups, 8 heads of {size}", entries, "two flash calls", needed="fused"
    )


def self_attention(title: str, shape: tuple[int, ...], window: int) -> Case:
    """The operator of WindowedSelfAttention: tokens look at tokens."""
    heads, size = 4, 32
    full = Neighbourhood(shape, shape, 1, 1, 0, window)

    def of(small: bool) -> Relation:
        return small_of(full) if small else full

    def made(name: str, make: Callable[[Relation], Operator], **options: Any) -> Entry:
        return Entry(
            name,
            lambda small: of_leaves(make(of(small)), leaves_of(of(small), heads, size, torch.float32)),
            lambda small: of_leaves(
                looking(exact_engine(of(small)))(of(small)), leaves_of(of(small), heads, size, torch.float64)
            ),
            **options,
        )

    def looking(backend: str) -> Callable[[Relation], Operator]:
        def make(relation: Relation) -> Operator:
            by(backend)(relation)
            return lambda q, k, v: assign(q, k, v, relation, backend=backend)[0]

        return make

    def masked(relation: Relation) -> Operator:
        mask = relation.mask(DEVICE)
        return lambda q, k, v: F.scaled_dot_product_attention(k, q, v, mask)

    flex_reason = "" if DEVICE == "cuda" else "compiled for a CPU, FlexAttention has no gradients"
    entries = [
        products(full.num_pairs * heads // 512, size),
        made("native", looking("native")),
        made("tiled", looking("tiled")),
        made("triton", looking("triton")),
        made("NATTEN", looking("natten")),
        made("masked attention", masked),
        made("FlexAttention, torch.compile", flex_window, only_forward=flex_reason, counted=False),
    ]
    return Case(f"windowed self-attention, {title}, 4 heads of 32", entries, "native")


def products(rows: int, size: int) -> Entry:
    """Products with as many multiplications as all logits: two are needed, and five more for gradients."""

    def bind(small: bool) -> Bound:
        torch.manual_seed(0)
        left, right = (torch.randn(s, device=DEVICE) for s in ((rows, 512), (512, size)))
        leaf = left.clone().requires_grad_()

        def call() -> Tensor:
            for _ in range(5 if torch.is_grad_enabled() else 1):
                torch.mm(left, right)
            return torch.mm(leaf, right)  # whose gradient is one more

        return Bound(call, {"leaf": leaf})

    return yardstick("products", bind)


CASES = [
    *WINDOWED,
    *(
        self_attention(f"{title}, window {window}", shape, window)
        for title, shape in (("64x64", (64, 64)), ("16x16x16", (16,) * 3))
        for window in (3, 7)
    ),
    *(dense(size) for size in (32, 16, 64)),
    dilations(),
    through_a_compiler("256x256 -> 128x128", square(256), "tiled", "tiled"),
    through_a_compiler("256x256 -> 64x64, stride 4", square(256, stride=4), "tiled", "tiled"),
    through_a_compiler("16x16x16 -> 8x8x8", cube(16), "masked matrix", "reference"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_grouping(case: Case, recorder: Any) -> None:
    run(case, recorder)


def test_tiles_in_float64_are_the_matrix() -> None:
    """Which lets them stand in for it on grids whose matrix would not fit."""
    for relation in (square(29), square(30, 4, 5), cube(9, dilation=2)):
        made = leaves_of(relation, 2, 8, torch.float64)
        found, want = (grouping(relation, backend)(*made.values()) for backend in ("tiled", "reference"))
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
