"""Compile the kernels of some calls for a GPU that is not there, and print what came of it as JSON.

Run by test_triton_compiled.py in a process of its own, because triton decides when it is imported whether kernels are
compiled or interpreted. Calls go through the package's own launch code; only the launch itself is left out.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from typing import Any
from unittest.mock import patch

import torch
import triton
from spatial_grouping_attention import Neighbourhood
from spatial_grouping_attention.backends import Operands, Pooled
from spatial_grouping_attention.backends.triton import launch, passes
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


class AbsentGPU:
    """What triton asks a driver for while it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 80, 32)


class Compiler:
    """Stands in for :meth:`JITFunction.run`: compiles, and remembers kernels and launches by kernel."""

    def __init__(self) -> None:
        self.run = JITFunction.run
        self.compiled: dict[str, list[Any]] = defaultdict(list)
        self.grids: dict[str, list[tuple[int, ...]]] = defaultdict(list)

    def __call__(self, kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = self.run(kernel, *arguments, grid=grid, warmup=True, **options)
        if not any(compiled is other for other in self.compiled[kernel.__name__]):
            self.compiled[kernel.__name__].append(compiled)
        self.grids[kernel.__name__].append(tuple(grid))
        return compiled

    def instructions(self, kernel: str) -> list[str]:
        """Of the last one compiled, without labels and directives."""
        lines = (line.strip() for line in self.compiled[kernel][-1].asm["ptx"].splitlines())
        return [line for line in lines if line.endswith(";") and not line.startswith((".", "//"))]


def rows(batch: int, heads: int, number: int, channels: int, dtype: torch.dtype, *, token_major: bool = True) -> Tensor:
    """Room that nothing is ever written to."""
    if token_major:
        return torch.empty(batch, number, heads, channels, dtype=dtype).transpose(1, 2)
    return torch.empty(batch, heads, number, channels, dtype=dtype)


def call(
    relation: Neighbourhood,
    *,
    batch: int = 1,
    heads: int = 2,
    size: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = False,
    compact: bool = False,
    masks: bool = False,
    token_major: bool = True,
    cut_from: int | None = None,
) -> None:
    """Every pass; ``cut_from``: operands are the first channels of tensors with so many."""
    wide = size if cut_from is None else cut_from
    q, k = (
        rows(batch, heads, n, wide, dtype, token_major=token_major)[..., :size]
        for n in (relation.num_groups, relation.num_inputs)
    )
    options: dict[str, Tensor] = {}
    if bias:
        options["bias"] = torch.empty(heads, *relation.window)
    if compact:
        options["compactness"] = torch.empty(heads)
    if masks:
        options["valid"] = torch.empty(batch, relation.num_inputs, dtype=torch.bool)
        options["valid_groups"] = torch.empty(batch, relation.num_groups, dtype=torch.bool)
    pooling = Operands(q, k, k, relation, 1.0, **options)
    pooled = Pooled(q, torch.empty(q.shape[:3]), torch.empty(k.shape[:3]))
    passes.pool(pooling, None)
    passes.pool_backward(pooling, pooled, q, pooled.log_mass, pooled.lse)
    assigning = pooling._replace(values=q)
    passes.assign(assigning)
    passes.assign_backward(assigning, k, pooled.lse, k, pooled.lse)


def plane(height: int, width: int, window: int = 3) -> Neighbourhood:
    return Neighbourhood((height, width), ((height + 1) // 2, (width + 1) // 2), 2, 3, 1, window)


def sizes(compiler: Compiler) -> dict[str, Any]:
    """Grids, batches and heads of all divisibilities; how often each kernel was compiled."""
    for token_major in (True, False):
        for size in (32, 24):
            for batch, heads, shape in ((1, 2, (64, 48)), (3, 2, (65, 51)), (16, 4, (49, 112)), (1, 1, (57, 33))):
                call(
                    plane(*shape),
                    batch=batch,
                    heads=heads,
                    size=size,
                    bias=True,
                    compact=True,
                    masks=True,
                    token_major=token_major,
                )
    # Head sizes and orders in memory are what kernels are compiled for.
    return {name: len(compiled) for name, compiled in compiler.compiled.items()}


def large_batch(compiler: Compiler) -> dict[str, Any]:
    """More samples than the second axis of a launch may have."""
    call(Neighbourhood((2,), (1,), 2, 2, 0, 3), batch=70_000, heads=1, size=1, bias=True)
    return dict(compiler.grids)


def loads(compiler: Compiler) -> dict[str, Any]:
    """How many loads of 16 bytes there are, of aligned rows and of the first 8 of 9 channels."""
    found = {}
    for name, options in {"aligned": {"size": 32}, "cut": {"size": 8, "cut_from": 9}}.items():
        call(plane(64, 48), **options)
        found[name] = sum("ld.global" in line and ".v4" in line for line in compiler.instructions("token_forward"))
    return found


def compactness(compiler: Compiler) -> dict[str, Any]:
    """Instructions of every kernel without compactness and with it, and those that turn whole numbers into others."""
    found: dict[str, Any] = {}
    for name, compact in (("without", False), ("with", True)):
        call(plane(64, 48), compact=compact)
        for kernel in list(compiler.compiled):
            lines = compiler.instructions(kernel)
            found.setdefault(kernel, {})[name] = [len(lines), sum("cvt.rn.f32.s32" in line for line in lines)]
    return found


def main() -> None:
    compiler = Compiler()
    JITFunction.run = lambda kernel, *given, **options: compiler(kernel, *given, **options)
    patch.object(launch, "choose", lambda key, candidates, run: run(candidates()[0])).start()
    triton.runtime.driver.set_active(AbsentGPU())
    print(json.dumps(globals()[sys.argv[1]](compiler)))


if __name__ == "__main__":
    main()
