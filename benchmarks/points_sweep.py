"""How much a program of the kernels on points should hold: every pass with many sizes of blocks, timed on a GPU.

    PYTHONPATH=packages/rotary-spatial-embeddings/src:packages/spatial-grouping-attention/src \
        python benchmarks/points_sweep.py [--json FILE]

``BLOCK_BYTES`` and ``WARPS`` of ``backends/triton/points/passes.py`` are what came out of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_report import environment
from gpu_report_timing import MOST_WORKERS, in_workers, said, synchronize
from spatial_grouping_attention.backends.deformable import lattice
from spatial_grouping_attention.backends.derivatives import Relative, Wanted
from spatial_grouping_attention.backends.triton.points import passes
from torch import Tensor

# Bytes of vectors that a program sees at a point of its tokens, and warps, of which each should have some.
CONFIGURATIONS = [
    (size, warps)
    for size, warps in itertools.product((2**11, 2**12, 2**13, 2**14), (1, 2, 4, 8))
    if size // warps >= 2**9
]

# Sides, heads, and channels of a head.
SHAPES = {
    "256x256, 8 heads of 16": ((256, 256), 8, 16),
    "32x32x32, 8 heads of 16": ((32,) * 3, 8, 16),
    "128x128, 4 heads of 64": ((128, 128), 4, 64),
}


def calls(shape: tuple[int, ...], heads: int, channels: int) -> dict[str, Callable[[], Any]]:
    """Every pass, forward and backward: half as many groups on every axis, points half a step off a window of 3."""
    generator = torch.Generator().manual_seed(0)
    ndim, sides = len(shape), tuple(side // 2 for side in shape)
    count, rows = math.prod(shape), math.prod(sides)

    def token_major(number: int) -> Tensor:
        return torch.randn(1, number, heads, channels, generator=generator).cuda().transpose(1, 2)

    cells = torch.cartesian_prod(*(torch.arange(side) / 2 for side in shape)).view(count, 1, ndim)
    steps = torch.cartesian_prod(*[torch.arange(-1.0, 2.0)] * ndim).view(1, -1, ndim)
    moved = torch.randn(1, heads, count, 3**ndim, ndim, generator=generator) / 2
    places = (cells + steps + moved).cuda()
    q, k = token_major(rows), token_major(count)
    logs = torch.randn(places.shape[:4], generator=generator).cuda().log_softmax(-1)
    grid, shares = lattice(sides), logs.exp()
    _, masses, highest = passes.relative_sums(logs, places, k, grid)
    relative = Relative(highest, masses, torch.randn_like(masses))
    to_products = Wanted(places=True, tokens=True, groups=True)
    to_averages = Wanted(factors=True, places=True, groups=True)
    to_sums = Wanted(factors=True, places=True, tokens=True)
    derive = passes.derivatives
    return {
        "products": lambda: passes.products(q, k, places, grid),
        "gradients of products": lambda: derive(shares, places, k, q, grid, to_products),
        "averages": lambda: passes.averages(shares, places, q, grid),
        "gradients of averages": lambda: derive(shares, places, k, q, grid, to_averages),
        "relative sums": lambda: passes.relative_sums(logs, places, k, grid),
        "gradients of relative sums": lambda: derive(logs, places, k, q, grid, to_sums, relative),
    }


def configure(size: int, warps: int) -> None:
    passes.BLOCK_BYTES, passes.WARPS = size, warps


def compile_share(share: int) -> str:
    """Compile this process' share."""
    for configuration in CONFIGURATIONS[share::MOST_WORKERS]:
        configure(*configuration)
        for shape in SHAPES.values():
            for call in calls(*shape).values():
                call()
    synchronize()
    return ""


def main() -> None:
    from triton.testing import do_bench

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    found: dict[str, Any] = {"environment": environment()}
    failures = [reason for reason in in_workers(compile_share, list(range(MOST_WORKERS)), said) if reason]
    print("compiled", *failures, flush=True)
    for title, shape in SHAPES.items():
        made = calls(*shape)
        for name, call in made.items():
            times = {}
            for configuration in CONFIGURATIONS:
                configure(*configuration)
                times[str(configuration)] = do_bench(call, warmup=3, rep=15, return_mode="median")
            found.setdefault(title, {})[name] = times
            fastest = sorted(times, key=lambda name: times[name])[:4]
            print(f"{title}, {name}: " + ", ".join(f"{key} {times[key]:.3f} ms" for key in fastest), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
