"""Windowed grouping against copying its operands, dense grouping against two flash calls, on one CPU thread.

``python benchmarks/grouping.py [--json FILE] [--compile] [--only windowed|growth|dilation|choice|dense]``
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from spatial_grouping_attention import Neighbourhood
from spatial_grouping_attention.functional import grouping_attention
from timing import alternate, print_table, write_json
from torch import Tensor


def operands(num_groups: int, num_tokens: int, heads: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q = torch.randn(1, heads, num_groups, size, requires_grad=True)
    k, v = (torch.randn(1, heads, num_tokens, size, requires_grad=True) for _ in range(2))
    return q, k, v


def check(call: Callable[..., Tensor], reference: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> None:
    """No figure without agreement: outputs and gradients in float32 against the oracle in float64."""
    gradient = torch.randn_like(q)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = reference(*wide)
    results = [call(q, k, v), *torch.autograd.grad(call(q, k, v), (q, k, v), gradient)]
    wanted = [expected, *torch.autograd.grad(expected, wide, gradient.double())]
    for got, want in zip(results, wanted, strict=True):
        error = (got.double() - want).norm() / want.norm()
        assert error < 1e-5, f"disagrees with the oracle by {error:.1e}"


def both_ways(call: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> tuple[Callable[[], Any], ...]:
    gradient = torch.randn_like(q)

    def forward() -> None:
        with torch.no_grad():
            call(q, k, v)

    def forward_backward() -> None:
        torch.autograd.grad(call(q, k, v), (q, k, v), gradient)

    return forward, forward_backward


def square(side: int, stride: int = 2, window: int = 3) -> Neighbourhood:
    coarse = (side - 1) // stride + 1
    return Neighbourhood((side, side), (coarse, coarse), stride, 3, 1, window)


def windowed(compiled: bool) -> dict[str, Any]:
    results = {}
    cases = {
        "256x256 -> 128x128, window 3": square(256),
        "256x256 -> 64x64, stride 4, window 3": square(256, 4),
        "64x64 -> 64x64, stride 1, window 7": square(64, 1, 7),
        "32x32x32 -> 16x16x16, window 3": Neighbourhood((32,) * 3, (16,) * 3, 2, 3, 1, 3),
    }
    small = square(24)

    def call(relation: Neighbourhood, backend: str = "tiled") -> Callable[..., Tensor]:
        return lambda q, k, v: grouping_attention(q, k, v, relation, backend=backend)[0]

    check(call(small), call(small, "reference"), *operands(small.num_groups, small.num_inputs, 2, 32))
    for title, relation in cases.items():
        q, k, v = operands(relation.num_groups, relation.num_inputs, 4, 32)
        forward, forward_backward = both_ways(call(relation), q, k, v)
        contenders = {
            "copy of k and v": lambda k=k, v=v: (k.detach().clone(), v.detach().clone()),
            "forward": forward,
            "forward + backward": forward_backward,
        }
        if compiled:
            torch._dynamo.reset()
            one, two = both_ways(torch.compile(call(relation), fullgraph=True), q, k, v)
            contenders |= {"forward, compiled": one, "forward + backward, compiled": two}
        results[title] = alternate(contenders)
        print_table(f"{title}, 4 heads of 32, float32", "copy of k and v", results[title])
    return results


def growth() -> dict[str, Any]:
    """Time per token from 128x128 to 1024x1024: linear cost is a constant here."""
    results = {}
    for side in (128, 256, 512, 1024):
        relation = square(side)
        q, k, v = operands(relation.num_groups, relation.num_inputs, 4, 32)
        _, call = both_ways(lambda q, k, v, r=relation: grouping_attention(q, k, v, r, backend="tiled")[0], q, k, v)
        times = alternate({"forward + backward": call}, rounds=3)["forward + backward"]
        results[str(side)] = times
        per_token = 1e6 * times["median"] / relation.num_inputs
        print(f"  {side:5d} x {side:<5d} forward + backward {times['median']:7.3f} s = {per_token:6.2f} us per token")
    return results


def dense() -> dict[str, Any]:
    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return grouping_attention(q, k, v, backend="fused")[0]

    def matrix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return grouping_attention(q, k, v, backend="reference")[0]

    def two_flash_calls(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        spread = F.scaled_dot_product_attention(k, q, q)
        gathered = F.scaled_dot_product_attention(q, k, v)
        # The first result must reach the gradient too, or its backward is not run.
        return gathered + spread[..., : q.shape[-2], :]

    results = {}
    check(fused, matrix, *operands(64, 300, 2, 32))
    for size in (16, 32, 64):
        q, k, v = operands(1024, 4096, 8, size)
        contenders = {}
        for name, call in {"two flash calls": two_flash_calls, "fused": fused, "matrix": matrix}.items():
            contenders[f"{name}, forward"], contenders[f"{name}, forward + backward"] = both_ways(call, q, k, v)
        for way in ("forward", "forward + backward"):
            title = f"4096 tokens, 1024 groups, 8 heads of {size}, {way}"
            results[title] = alternate({n: c for n, c in contenders.items() if n.endswith(f", {way}")}, rounds=5)
            print_table(title, f"two flash calls, {way}", results[title])
    return results


def dilation() -> dict[str, Any]:
    """What a dilated window costs: the halo of a tile grows with it."""
    contenders = {}
    for step in (1, 2, 4, 8):
        relation = Neighbourhood((192, 192), (96, 96), 2, 3, 1, 3, step)
        q, k, v = operands(relation.num_groups, relation.num_inputs, 1, 16)
        name = f"dilation {step}"
        contenders[name], _ = both_ways(
            lambda q, k, v, r=relation: grouping_attention(q, k, v, r, backend="tiled")[0], q, k, v
        )
    results = alternate(contenders, rounds=5)
    print_table("192x192 -> 96x96, window 3, 1 head of 16, forward", "dilation 1", results)
    return results


def choice() -> dict[str, Any]:
    """Where groups are few, is the masked matrix faster than the tiles that "auto" takes?"""
    results = {}
    cases = {
        "16x16x16 -> 4x4x4": Neighbourhood((16,) * 3, (4,) * 3, 4, 3, 1, 3),
        "16x16x16 -> 8x8x8": Neighbourhood((16,) * 3, (8,) * 3, 2, 3, 1, 3),
        "64x64 -> 16x16": square(64, 4),
        "32x32 -> 8x8": square(32, 4),
        "32x32 -> 16x16": square(32),
        "16x16 -> 8x8": square(16),
    }
    for title, relation in cases.items():
        q, k, v = operands(relation.num_groups, relation.num_inputs, 8, 32)
        contenders = {}
        for name in ("tiled", "reference"):
            _, contenders[name] = both_ways(
                lambda q, k, v, r=relation, b=name: grouping_attention(q, k, v, r, backend=b)[0], q, k, v
            )
        results[title] = alternate(contenders, rounds=5)
        print_table(f"{title}, window 3, 8 heads of 32, forward + backward", "tiled", results[title])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--compile", action="store_true", help="measure the compiled forms too")
    parser.add_argument("--only", choices=("windowed", "growth", "dilation", "choice", "dense"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    if arguments.only in (None, "windowed"):
        results["windowed"] = windowed(arguments.compile)
    if arguments.only in (None, "growth"):
        print("\nwindowed growth, stride 2, window 3, 4 heads of 32")
        results["growth"] = growth()
    if arguments.only in (None, "dilation"):
        results["dilation"] = dilation()
    if arguments.only in (None, "choice"):
        results["choice"] = choice()
    if arguments.only in (None, "dense"):
        results["dense"] = dense()
    write_json(arguments.json, results)


if __name__ == "__main__":
    main()
