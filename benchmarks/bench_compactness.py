"""What compactness costs: whole layers and single dense calls with it against the same without.

``pytest benchmarks/bench_compactness.py``: float32, 128 channels, 8 heads, 3 rounds, forward and backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench_layers import MOST_TOKENS, VARIANTS, entry, small_of
from entries import BACKWARD, DEVICE, Bound, Case, Entry, of_leaves, token_major
from harness import run
from spatial_grouping_attention import Neighbourhood
from spatial_grouping_attention.functional import grouping_attention

SHAPES = ((16, 16), (32, 32), (64, 64), (16, 16, 16))


def compactness(title: str, shape: tuple[int, ...]) -> Case:
    """What the term costs a layer."""
    entries = []
    for kind in (*VARIANTS, "windowed self-attention"):
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


CASES = [make("x".join(map(str, shape)), shape) for make in (compactness, compactness_of_calls) for shape in SHAPES]
CASES.append(compactness_of_calls("4096", (4096,)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_compactness(case: Case, recorder: Any) -> None:
    run(case, recorder)
