"""The kernels for the CPU against the tiles in plain torch, and against copying k and v; one thread and two.

``python benchmarks/native.py [--json FILE] [--only TITLE] [--threads N ...] [--first-call]``. Operands lie as layers
have them, heads side by side. ``--first-call`` tells what a process pays before its first result, with and without
kernels that were kept on disk.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from spatial_grouping_attention import Neighbourhood, SparseSpatialGroupingAttention
from spatial_grouping_attention.functional import grouping_attention
from timing import alternate, print_table, write_json
from torch import Tensor


def square(side: int, window: int = 3, dilation: int = 1) -> Neighbourhood:
    return Neighbourhood((side, side), (side // 2, side // 2), 2, 3, 1, window, dilation)


def cube(window: int = 3, dilation: int = 1) -> Neighbourhood:
    return Neighbourhood((32,) * 3, (16,) * 3, 2, 3, 1, window, dilation)


CASES: dict[str, tuple[Neighbourhood, int, int]] = {
    "256x256 -> 128x128, 4 heads of 32": (square(256), 4, 32),
    "256x256 -> 128x128, 8 heads of 32": (square(256), 8, 32),
    "256x256 -> 128x128, window 7, 4 heads of 32": (square(256, 7), 4, 32),
    "256x256 -> 128x128, dilation 4, 4 heads of 32": (square(256, 3, 4), 4, 32),
    "64x64 -> 32x32, 4 heads of 32": (square(64), 4, 32),
    "64x64 -> 32x32, 8 heads of 32": (square(64), 8, 32),
    "64x64 -> 32x32, window 7, 8 heads of 32": (square(64, 7), 8, 32),
    "32x32x32 -> 16x16x16, 4 heads of 32": (cube(), 4, 32),
    "32x32x32 -> 16x16x16, dilation 4, 4 heads of 32": (cube(3, 4), 4, 32),
    "16x48x48 -> 16x24x24, 4 heads of 16": (
        Neighbourhood((16, 48, 48), (16, 24, 24), (1, 2, 2), 3, 1, 3),
        4,
        16,
    ),
}


def operands(relation: Neighbourhood, heads: int, size: int) -> list[Tensor]:
    torch.manual_seed(0)
    rows = (relation.num_groups, relation.num_inputs, relation.num_inputs)
    return [torch.randn(1, n, heads, size).transpose(1, 2).requires_grad_() for n in rows]


def call(relation: Neighbourhood, backend: str) -> Callable[..., Tensor]:
    return lambda q, k, v: grouping_attention(q, k, v, relation, backend=backend)[0]


def check(relation: Neighbourhood, heads: int, size: int) -> None:
    """No figure without agreement: results and gradients of both, each in float32."""
    leaves = operands(relation, heads, size)
    gradient = torch.randn(leaves[0].shape)
    found = []
    for backend in ("native", "tiled"):
        out = call(relation, backend)(*leaves)
        found.append([out, *torch.autograd.grad(out, leaves, gradient)])
    for mine, theirs in zip(*found, strict=True):
        error = (mine - theirs).norm() / theirs.norm()
        assert error < 1e-5, f"disagree by {error:.1e}"


def clock() -> Callable[[], float]:
    """One thread is measured in the time of the processor, several in that of the wall."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def measure(relation: Neighbourhood, heads: int, size: int, rounds: int) -> dict[str, dict[str, float]]:
    q, k, v = operands(relation, heads, size)
    gradient = torch.randn(1, relation.num_groups, heads, size).transpose(1, 2)
    contenders: dict[str, Callable[[], Any]] = {"copy of k and v": lambda: (k.detach().clone(), v.detach().clone())}
    for backend in ("native", "tiled"):
        grouping = call(relation, backend)

        def forward(grouping: Callable[..., Tensor] = grouping) -> None:
            with torch.no_grad():
                grouping(q, k, v)

        def both(grouping: Callable[..., Tensor] = grouping) -> None:
            torch.autograd.grad(grouping(q, k, v), (q, k, v), gradient)

        contenders |= {f"{backend}, forward": forward, f"{backend}, forward + backward": both}
    return alternate(contenders, rounds, clock())


def layer(rounds: int) -> dict[str, dict[str, float]]:
    """A whole sparse layer, 64x64 -> 32x32, 128 channels, 8 heads, 3 rounds, forward and backward."""
    contenders = {}
    for backend in ("native", "tiled"):
        torch.manual_seed(0)
        module = SparseSpatialGroupingAttention(128, 2, 3, 8, stride=2, iters=3, backend=backend)
        x = torch.randn(1, 64 * 64, 128, requires_grad=True)
        contenders[backend] = lambda module=module, x=x: module(x, 1.0, (64, 64)).x_out.sum().backward()
    return alternate(contenders, rounds, clock())


FIRST = """
import time, torch
from spatial_grouping_attention import Neighbourhood
from spatial_grouping_attention.functional import grouping_attention
q, k = (torch.randn(1, 1, n, 8, requires_grad={gradients}) for n in (4, 8))
start, worked = time.perf_counter(), time.process_time()
out = grouping_attention(q, k, k, Neighbourhood((8,), (4,), 2, 3, 1, 3))[0]
if {gradients}:
    out.sum().backward()
print(time.perf_counter() - start, time.process_time() - worked)
"""


def first_call() -> dict[str, dict[str, float]]:
    """Seconds to the first result of a process, by "auto": the check, and so compilation, is in it."""
    results = {}
    for gradients in (False, True):
        with tempfile.TemporaryDirectory() as cache:
            for kept in ("no kernels kept", "kernels kept"):
                command = [sys.executable, "-c", FIRST.format(gradients=gradients)]
                environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                wall, worked = map(float, done.stdout.split())
                name = f"{'forward + backward' if gradients else 'forward'}, {kept}"
                results[name] = {"wall": wall, "processor": worked}
                print(f"  first call, {name}: {wall:.1f} s, {worked:.1f} s of a processor")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--only", default="", help="cases whose title begins so")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--first-call", action="store_true", help="only this")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    if arguments.first_call:
        results["first call"] = first_call()
    else:
        start = time.perf_counter()
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            for title, case in CASES.items():
                if title.startswith(arguments.only):
                    check(*case)
                    name = f"{title}, {threads} threads"
                    results[name] = measure(*case, arguments.rounds)
                    print_table(name, "copy of k and v", results[name])
            if "layer".startswith(arguments.only):
                name = f"layer, 64x64 -> 32x32, 128 channels, 8 heads, 3 rounds, {threads} threads"
                results[name] = layer(arguments.rounds)
                print_table(name, "tiled", results[name])
        print(f"\n{time.perf_counter() - start:.0f} s")
    write_json(arguments.json, results)


if __name__ == "__main__":
    main()
