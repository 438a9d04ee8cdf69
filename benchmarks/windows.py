"""Windowed self-attention against attention with a mask, and deformable grouping against sparse; one thread.

``python benchmarks/windows.py [--json FILE] [--rounds N]``. Contenders take turns. What windowed attention could cost
at least is the time of one matrix product with as many multiplications; a mask costs products of all pairs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from spatial_grouping_attention import (
    DeformableSpatialGroupingAttention,
    Neighbourhood,
    SparseSpatialGroupingAttention,
)
from spatial_grouping_attention.backends.operands import Operands
from spatial_grouping_attention.backends.semantics import logits
from spatial_grouping_attention.functional import assign
from timing import alternate, print_table, write_json
from torch import Tensor

HEADS, SIZE = 4, 32


def same_grid(shape: tuple[int, ...], window: int) -> Neighbourhood:
    return Neighbourhood(shape, shape, 1, 1, 0, window)


CASES = {
    "64x64, window 3": same_grid((64, 64), 3),
    "64x64, window 7": same_grid((64, 64), 7),
    "16x16x16, window 3": same_grid((16,) * 3, 3),
    "16x16x16, window 7": same_grid((16,) * 3, 7),
}


def mask_of(relation: Neighbourhood) -> Tensor:
    """(N, N): which tokens see which."""
    one = torch.zeros(1, 1, relation.num_inputs, 1)
    return logits(Operands(one, one, one, relation, 1.0))[0, 0] > -torch.inf


def both(function: Callable[..., Tensor], leaves: list[Tensor], gradient: Tensor) -> dict[str, Callable[[], Any]]:
    def forward() -> None:
        with torch.no_grad():
            function(*leaves)

    return {
        "forward": forward,
        "forward + backward": lambda: torch.autograd.grad(function(*leaves), leaves, gradient),
    }


def products(relation: Neighbourhood) -> dict[str, Callable[[], Any]]:
    """A matrix product with as many multiplications as all logits: two are needed, and five more for gradients."""
    rows = relation.num_pairs * HEADS // 512
    left, right = torch.randn(rows, 512), torch.randn(512, SIZE)
    out = torch.empty(rows, SIZE)

    def times(count: int) -> Callable[[], Any]:
        def run() -> None:
            for _ in range(count):
                torch.mm(left, right, out=out)

        return run

    return {"forward": times(2), "forward + backward": times(7)}


def measure(relation: Neighbourhood, rounds: int) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    leaves = [torch.randn(1, relation.num_inputs, HEADS, SIZE).transpose(1, 2).requires_grad_() for _ in range(3)]
    gradient = torch.randn(1, relation.num_inputs, HEADS, SIZE).transpose(1, 2)
    mask = mask_of(relation)
    functions: dict[str, Callable[..., Tensor]] = {
        backend: lambda q, k, v, backend=backend: assign(k, q, v, relation, backend=backend)[0]
        for backend in ("native", "tiled")
    }
    functions["masked"] = lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
    with torch.no_grad():
        results = {name: function(*leaves) for name, function in functions.items()}
    for name, result in results.items():
        assert (result - results["masked"]).norm() < 1e-5 * result.norm(), name
    contenders = {f"products, {name}": call for name, call in products(relation).items()}
    for label, function in functions.items():
        contenders |= {f"{label}, {name}": call for name, call in both(function, leaves, gradient).items()}
    return alternate(contenders, rounds, time.process_time)


def layers(rounds: int) -> dict[str, dict[str, float]]:
    """Whole layers, 32x32 -> 16x16, 128 channels, 4 heads, 3 rounds."""
    contenders = {}
    kinds = {"sparse": SparseSpatialGroupingAttention, "deformable": DeformableSpatialGroupingAttention}
    for label, kind in kinds.items():
        torch.manual_seed(0)
        module = kind(128, 2, 3, 4, stride=2, iters=3)
        x = torch.randn(1, 32 * 32, 128, requires_grad=True)

        def forward(module: Any = module, x: Tensor = x) -> None:
            with torch.no_grad():
                module(x, 1.0, (32, 32))

        def step(module: Any = module, x: Tensor = x) -> None:
            module(x, 1.0, (32, 32)).x_out.sum().backward()

        contenders |= {f"{label}, forward": forward, f"{label}, forward + backward": step}
    return alternate(contenders, rounds, time.process_time)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for title, relation in CASES.items():
        results[title] = measure(relation, arguments.rounds)
        print_table(title, "products, forward", results[title])
    results["layers"] = layers(arguments.rounds)
    print_table("layers, 32x32 -> 16x16", "sparse, forward", results["layers"])
    write_json(arguments.json, results)


if __name__ == "__main__":
    main()
