"""Compile the kernels for GPUs that this machine does not have, and report what they would occupy there.

    PYTHONPATH=packages/rotary-spatial-embeddings/src:packages/spatial-grouping-attention/src \
        python benchmarks/compile_report.py [--architectures 80 90] [--json FILE]

Needs triton with the ptxas that its wheels bring, but neither CUDA nor a GPU. Kernels are compiled by the package's
own launch code for the arguments of real calls, every candidate plan of every pass; only the launch itself is left
out. Registers per thread and spilled bytes are what ptxas reports, shared memory is what triton would ask for. Ends
with the table of docs/gpu.md.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from RoSE.kernels import launch as rotation
from spatial_grouping_attention.backends import Operands, Pooled
from spatial_grouping_attention.backends.deformable import lattice
from spatial_grouping_attention.backends.derivatives import Relative, Wanted
from spatial_grouping_attention.backends.triton import launch as grouping
from spatial_grouping_attention.backends.triton import passes
from spatial_grouping_attention.backends.triton.plan import INTERPRETED, Plan
from spatial_grouping_attention.backends.triton.points import passes as points
from spatial_grouping_attention.geometry import Neighbourhood
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


class AbsentGPU:
    """What triton asks a driver for while it compiles."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        # Triton remembers compiled kernels by device.
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


class Compiler:
    """Stands in for :meth:`JITFunction.run`: compiles, asks ptxas, and launches nothing."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.case = ""
        self.run = JITFunction.run

    def __call__(self, kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = self.run(kernel, *arguments, grid=grid, warmup=True, **options)
        architecture = compiled.metadata.target.arch
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(compiled.asm["ptx"])
            file.flush()
            # Triton targets the architecture's own instructions from sm_90 on, as it does at a launch.
            target = f"sm_{architecture}{'a' if architecture >= 90 else ''}"
            command = [PTXAS, "-v", f"--gpu-name={target}", file.name, "-o", "/dev/null"]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        registers = re.search(r"Used (\d+) registers", said)
        spilled = re.search(r"(\d+) bytes spill stores", said)
        if registers is None or spilled is None:
            raise RuntimeError(f"ptxas reported no registers:\n{said}")
        # Rotation has one block and no form.
        tile, block = None, options.get("BLOCK")
        if "FORM" in options:
            tile, block = options["FORM"].tile, options["FORM"].block
        row = {
            "case": self.case,
            "kernel": kernel.__name__,
            "architecture": architecture,
            "tile": tile,
            "rows_per_step": block,
            "warps": compiled.metadata.num_warps,
            "registers": int(registers[1]),
            "spilled_bytes": int(spilled[1]),
            "shared_bytes": compiled.metadata.shared,
        }
        self.rows.append(row)
        print(
            f"  {row['kernel']:22s} tile {row['tile'] or '-'!s:12s} rows {row['rows_per_step'] or '-'!s:4s} "
            f"warps {row['warps']}  registers {row['registers']:3d}  spilled {row['spilled_bytes']:5d} B  "
            f"shared {row['shared_bytes']:6d} B"
        )
        return compiled


def every_candidate(key: Any, candidates: Any, run: Any) -> Any:
    """Stands in for the choice of a plan."""
    plans: list[Plan] = candidates()
    return [run(plan) for plan in plans][-1]


def token_major(rows: int, size: int, dtype: torch.dtype, heads: int = 8) -> Tensor:
    return torch.empty(1, rows, heads, size, dtype=dtype).transpose(1, 2)


def group(relation: Neighbourhood, size: int, dtype: torch.dtype, *extras: str) -> None:
    """All passes of both operators, with any of "bias", "compactness" and "masks"."""
    q, k = token_major(relation.num_groups, size, dtype), token_major(relation.num_inputs, size, dtype)
    options: dict[str, Tensor] = {}
    if "bias" in extras:
        options["bias"] = torch.empty(8, *relation.window)
    if "compactness" in extras:
        options["compactness"] = torch.empty(8)
    if "masks" in extras:
        options["valid"] = torch.empty(1, relation.num_inputs, dtype=torch.bool)
        options["valid_groups"] = torch.empty(1, relation.num_groups, dtype=torch.bool)
    pooling = Operands(q, k, k, relation, 1.0, **options)
    pooled = Pooled(q, torch.empty(q.shape[:3]), torch.empty(k.shape[:3]))
    passes.pool(pooling, None)
    passes.pool_backward(pooling, pooled, q, pooled.log_mass, pooled.lse)
    assigning = pooling._replace(values=q)
    passes.assign(assigning)
    passes.assign_backward(assigning, k, pooled.lse, k, pooled.lse)


def look(shape: tuple[int, ...], size: int, dtype: torch.dtype, *, holes: bool = False) -> None:
    """All passes on points, with all gradients; half as many groups as tokens on every axis."""
    sides = tuple(side // 2 for side in shape)
    count, rows = math.prod(shape), math.prod(sides)
    groups = lattice(sides, torch.ones(1, rows, dtype=torch.bool) if holes else None)
    places, shares = (torch.empty(1, 8, count, 3 ** len(shape), *more, dtype=dtype) for more in ((len(shape),), ()))
    q, k = token_major(rows, size, dtype), token_major(count, size, dtype)
    points.products(q, k, places, groups)
    points.averages(shares, places, q, groups)
    points.relative_sums(shares, places, k, groups)
    everything = Wanted(factors=True, places=True, tokens=True, groups=True)
    points.derivatives(shares, places, k, q, groups, everything)
    relative = Relative(*torch.empty(3, 1, 8, rows, dtype=dtype))
    points.derivatives(shares, places, k, q, groups, Wanted(factors=True, places=True, tokens=True), relative)


def rotate(size: int, dtype: torch.dtype, *, interleaved: bool) -> None:
    """Forward and backward, with angles from positions and with given ones."""
    heads, tokens, planes = 32, 16384, size // 2
    q = token_major(tokens, size, dtype, heads)
    computed = rotation.computed(torch.empty(1, tokens, 2), torch.empty(heads, planes, 2), 0)
    rotation.rotate(q, q, q, q, computed, interleaved)
    shares: dict[str, Tensor | None] = dict.fromkeys(("dcos", "dsin", "dcoordinates", "dfreqs"))
    shares["dfreqs"] = torch.empty(1, -(-tokens // rotation.block_of_tokens(size)), heads, planes, 2)
    rotation.rotate_backward((q, q), (q, q), (q, q), shares, computed, interleaved)
    angles = torch.empty(tokens, planes).expand(1, heads, -1, -1)
    rotation.rotate(q, None, q, None, rotation.given(angles, angles), interleaved)


def markdown(rows: list[dict[str, Any]]) -> str:
    """Per case and kernel: registers, how many candidates spill, and the most shared memory, by architecture."""
    architectures = sorted({row["architecture"] for row in rows})
    lines = [
        "| case | kernel | " + " | ".join(f"sm_{architecture}" for architecture in architectures) + " |",
        "|---" * (2 + len(architectures)) + "|",
    ]
    for case, kernel in dict.fromkeys((row["case"], row["kernel"]) for row in rows):
        cells = []
        for architecture in architectures:
            key = (case, kernel, architecture)
            found = [row for row in rows if (row["case"], row["kernel"], row["architecture"]) == key]
            registers = sorted({row["registers"] for row in found})
            spilling = sum(row["spilled_bytes"] > 0 for row in found)
            shared = -(-max(row["shared_bytes"] for row in found) // 1024)
            span = "-".join(str(n) for n in dict.fromkeys((registers[0], registers[-1])))
            cells.append(f"{span}, {spilling}/{len(found)}, {shared} KiB")
        lines.append(f"| {case} | `{kernel}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--only", default="", help="cases whose titles hold this")
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    if INTERPRETED:
        sys.exit("compile_report.py compiles kernels; unset TRITON_INTERPRET.")
    compiler = Compiler()
    JITFunction.run = lambda kernel, *given, **options: compiler(kernel, *given, **options)
    patch.object(grouping, "choose", every_candidate).start()
    plane = Neighbourhood((512, 512), (256, 256), 2, 3, 1, 3)
    volume = Neighbourhood((64,) * 3, (32,) * 3, 2, 3, 1, 3)
    wide = Neighbourhood((64,) * 3, (32,) * 3, 2, 3, 1, 9)
    half, full = torch.bfloat16, torch.float32
    cases: dict[str, Any] = {
        "2-D, heads of 32, bf16": lambda: group(plane, 32, half),
        "2-D, heads of 32, bf16, compactness": lambda: group(plane, 32, half, "compactness"),
        "2-D, heads of 32, bf16, everything": lambda: group(plane, 32, half, "bias", "compactness", "masks"),
        "3-D, heads of 32, bf16": lambda: group(volume, 32, half),
        "3-D, heads of 32, bf16, bias over 9x9x9": lambda: group(wide, 32, half, "bias"),
        "2-D, heads of 128, bf16": lambda: group(plane, 128, half),
        "2-D, heads of 32, float32": lambda: group(plane, 32, full),
        "2-D, heads of 128, float32": lambda: group(plane, 128, full),
        "points, 2-D, heads of 32, float32": lambda: look((64, 64), 32, full),
        "points, 3-D, heads of 16, float32, holes": lambda: look((16,) * 3, 16, full, holes=True),
        "rotation, heads of 64, bf16, interleaved": lambda: rotate(64, half, interleaved=True),
        "rotation, heads of 64, bf16, half": lambda: rotate(64, half, interleaved=False),
        "rotation, heads of 64, float32, interleaved": lambda: rotate(64, full, interleaved=True),
    }
    for architecture in arguments.architectures:
        triton.runtime.driver.set_active(AbsentGPU(architecture))
        for compiler.case, compile_case in cases.items():
            if arguments.only not in compiler.case:
                continue
            print(f"\nsm_{architecture}: {compiler.case}")
            compile_case()
    # A kernel that treats every row on its own has nothing to choose.
    print("\n" + markdown([row for row in compiler.rows if row["kernel"] != "group_deltas"]))
    if arguments.json is not None:
        versions = {"triton": triton.__version__, "torch": torch.__version__}
        arguments.json.write_text(json.dumps({"versions": versions, "kernels": compiler.rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
