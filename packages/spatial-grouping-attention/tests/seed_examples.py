"""The examples that users know, read from seed_blocks.md, and what they promise to print and to return."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import spatial_grouping_attention
import torch

DOCUMENT = Path(__file__).with_name("seed_blocks.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^### ([^\n]+)\n.*?^```python\n(.*?)^```$", DOCUMENT, flags=re.DOTALL | re.MULTILINE))

# What is printed and, for every output of a layer, the grid and the spacing that the comments compute.
PROMISES: dict[str, tuple[list[str], dict[str, tuple[tuple[int, ...], tuple[float, ...]]]]] = {
    "Basic 2D Dense Attention": (
        ["Output shape: torch.Size([2, 1024, 128])"],
        {"output": ((32, 32), (0.5, 0.5))},
    ),
    "2D Attention with Spatial Downsampling": (
        ["Downsampled output: torch.Size([1, 4096, 256])", "Compression ratio: 4.0x"],
        {"output_hires": ((64, 64), (0.2, 0.2))},
    ),
    "3D Sparse Attention (GPU Required)": (
        ["3D sparse output: torch.Size([1, 16384, 128])"],
        {"output_3d": ((16, 32, 32), (0.5, 0.2, 0.2))},
    ),
    "Multi-Scale Processing": (
        ["Global context: torch.Size([1, 256, 64])", "Fine details: torch.Size([1, 4096, 64])"],
        {"global_output": ((16, 16), (4.0, 4.0)), "fine_output": ((64, 64), (1.0, 1.0))},
    ),
    "Integration with Neural Networks": (["Predictions: torch.Size([4, 1000])"], {}),
}

# Run forward and backward, in a process of their own, where their memory is measured.
MEASURED = {"2D Attention with Spatial Downsampling": 2.0, "3D Sparse Attention (GPU Required)": 4.0}


def run_block(title: str) -> dict[str, Any]:
    """Execute a block as it stands and check what it returns; its variables."""
    # What the first block imports, the later ones take for granted.
    names: dict[str, Any] = {
        "torch": torch,
        "DenseSpatialGroupingAttention": spatial_grouping_attention.DenseSpatialGroupingAttention,
        "__name__": "example",
    }
    torch.manual_seed(0)
    exec(compile(BLOCKS[title], title, "exec"), names)
    for name, (shape, spacing) in PROMISES[title][1].items():
        output = names[name]
        assert output.out_grid_shape == shape
        assert max(abs(a - b) for a, b in zip(output.out_spacing, spacing, strict=True)) < 1e-9
        assert output["x_out"].isfinite().all()
    return names
