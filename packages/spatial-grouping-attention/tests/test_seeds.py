"""The examples that users know, exactly as they stand in seed_blocks.md, with the shapes that they promise."""

import re
from pathlib import Path

import pytest
import spatial_grouping_attention
import torch

DOCUMENT = Path(__file__).with_name("seed_blocks.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"^### ([^\n]+)\n.*?^```python\n(.*?)^```$", DOCUMENT, flags=re.DOTALL | re.MULTILINE))

# Printed shape and, per layer output, the grid and spacing that the comments promise.
PROMISES = {
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


def test_every_block_is_promised_something() -> None:
    assert list(BLOCKS) == list(PROMISES)


@pytest.mark.parametrize("title", PROMISES)
def test_block(title: str, capsys: pytest.CaptureFixture[str]) -> None:
    # What the first block imports, the later ones take for granted.
    names = {
        "torch": torch,
        "DenseSpatialGroupingAttention": spatial_grouping_attention.DenseSpatialGroupingAttention,
        "__name__": "example",
    }
    torch.manual_seed(0)
    with torch.inference_mode():
        exec(compile(BLOCKS[title], title, "exec"), names)
    printed, grids = PROMISES[title]
    assert capsys.readouterr().out.splitlines() == printed
    for name, (shape, spacing) in grids.items():
        assert names[name].out_grid_shape == shape
        assert names[name].out_spacing == pytest.approx(spacing)
        assert names[name]["x_out"].isfinite().all()
