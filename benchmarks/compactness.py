"""What compactness costs: whole layers and single calls with it against the same without, on one CPU thread.

``python benchmarks/compactness.py [--json FILE]``
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from spatial_grouping_attention import (
    DeformableSpatialGroupingAttention,
    DenseSpatialGroupingAttention,
    Neighbourhood,
    SparseSpatialGroupingAttention,
    WindowedSelfAttention,
)
from spatial_grouping_attention.functional import grouping_attention
from timing import alternate, print_table, write_json

CHANNELS, HEADS, BETA = 128, 8, 2.0
SHAPES = ((16, 16), (32, 32), (64, 64), (16, 16, 16))
LAYERS = {
    "dense": DenseSpatialGroupingAttention,
    "sparse": SparseSpatialGroupingAttention,
    "deformable": DeformableSpatialGroupingAttention,
}


def call_of_layer(name: str, shape: tuple[int, ...], compactness: float | None) -> Callable[[], Any]:
    """A step of a layer: forward, and gradients to its input and all its parameters."""
    torch.manual_seed(0)
    ndim = len(shape)
    if name == "windowed self-attention":
        layer: torch.nn.Module = WindowedSelfAttention(CHANNELS, HEADS, ndim, compactness=compactness)
    else:
        layer = LAYERS[name](CHANNELS, ndim, 3, HEADS, 2, compactness=compactness)
    x = torch.randn(1, math.prod(shape), CHANNELS, requires_grad=True)
    wanted = [x, *(p for n, p in layer.named_parameters() if n != "mask_embedding")]

    def step() -> None:
        out = layer(x, 1.0, shape)
        out = out if torch.is_tensor(out) else out.x_out
        torch.autograd.grad(out.square().mean(), wanted)

    return step


def layers() -> dict[str, Any]:
    results = {}
    for name in (*LAYERS, "windowed self-attention"):
        for shape in SHAPES:
            if name == "deformable" and math.prod(shape) > 1024:
                continue
            title = f"{name}, {'x'.join(map(str, shape))}, {CHANNELS} channels, {HEADS} heads, forward + backward"
            contenders = {"without": call_of_layer(name, shape, None), "with": call_of_layer(name, shape, BETA)}
            results[title] = alternate(contenders)
            print_table(title, "without", results[title])
    return results


def call_of_operator(shape: tuple[int, ...], factor: float | None) -> Callable[[], Any]:
    """``grouping_attention`` alone where every token sees every group: forward, and all gradients."""
    torch.manual_seed(0)
    groups = tuple(n // 2 for n in shape)
    relation = Neighbourhood(shape, groups, 2, 3, 1, tuple(2 * g - 1 for g in groups))
    sizes = (relation.num_groups, relation.num_inputs, relation.num_inputs)
    q, k, v = (torch.randn(1, HEADS, n, 16, requires_grad=True) for n in sizes)
    beta = None if factor is None else torch.full((HEADS,), factor, requires_grad=True)
    wanted = [x for x in (q, k, v, beta) if x is not None]

    def step() -> None:
        out, _ = grouping_attention(q, k, v, relation, compactness=beta)
        torch.autograd.grad(out.sum(), wanted)

    return step


def calls() -> dict[str, Any]:
    """Single calls, from few groups to many."""
    results = {}
    for shape in (*SHAPES, (4096,)):
        factors = {"without": None, "beta 0.1": 0.1, "beta 2": 2.0, "beta 10": 10.0}
        title = f"fused, {'x'.join(map(str, shape))}, {HEADS} heads of 16, forward + backward"
        results[title] = alternate({name: call_of_operator(shape, f) for name, f in factors.items()}, rounds=5)
        print_table(title, "without", results[title])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="write the results here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    write_json(arguments.json, {"layers": layers(), "calls": calls()})


if __name__ == "__main__":
    main()
