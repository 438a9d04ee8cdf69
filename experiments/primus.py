"""Primus, nnU-Net's transformer, with its own rotations and with RoSE in their place, on the hippocampus.

    python experiments/primus.py --data DIR

Its own rotations are axial and by index. RoSE with these settings gives the same outputs (a test of RoSE's adapters
holds that) and stands for them here, because they cannot be made beside the present timm.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import architectures
import main as program
import torch
import torch.nn.functional as F
from monai.inferers import sliding_window_inference
from networks import CLASSES
from RoSE.adapters import PrimusRope
from runs import Run
from spacing import STEPS, hippocampus, measured
from torch import Tensor, nn

SIDE, PATCH, HEADS = 32, 4, 4
SETS = ("hippocampus", "hippocampus, mixed")
AXIAL = {"learnable": False, "directions": "axial", "frequency_scaling": "none"}
METHODS: dict[str, tuple[bool, dict[str, Any]]] = {
    "Primus, its own rotations": (False, AXIAL),
    "Primus, RoSE": (True, {}),
    "Primus, RoSE, axial and fixed": (True, AXIAL),
}


class Primus(nn.Module):
    """A small one; larger volumes are taken in tiles of the size of training.

    Args:
        knows: whether it is told the spacing; else every patch is 1 from the next.
        rotary: options of RoSE.
    """

    def __init__(self, knows: bool, rotary: dict[str, Any]) -> None:
        super().__init__()
        self.knows = knows
        self.model = architectures.Primus(
            1, 96, (PATCH,) * 3, CLASSES, eva_depth=4, eva_numheads=HEADS, input_shape=(SIDE,) * 3,
            use_abs_pos_embed=False, rope_impl=PrimusRope, rope_kwargs={"num_heads": HEADS, **rotary},
        )  # fmt: skip

    def forward(self, image: Tensor, spacing: tuple[float, ...]) -> Tensor:
        """Images (B, C, *size) -> (B, classes, *size)."""
        size = image.shape[2:]
        # Its positions are those of a whole tile: thick slices, of which there are fewer, are followed by nothing.
        image = F.pad(image, [n for length in reversed(size) for n in (0, max(SIDE - length, 0))])
        # In units of a patch of 1 mm, in which its own rotations count.
        with self.model.eva.rope.at(torch.tensor(spacing if self.knows else (1.0,) * 3)):
            if self.training:
                logits: Tensor = self.model(image)
            else:
                logits = sliding_window_inference(image, (SIDE,) * 3, 4, self.model, overlap=0.5, mode="gaussian")
        return logits[(..., *(slice(length) for length in size))]


def runs(steps: int = STEPS) -> list[Run]:
    """Three seeds."""
    return [Run("primus", d, m, s, steps) for s in range(3) for d in SETS for m in METHODS]


def do(run: Run, data: Path | None) -> dict[str, Any]:
    """Train and score, as :mod:`spacing` does."""
    torch.manual_seed(run.seed)
    return measured(Primus(*METHODS[run.method]), hippocampus(run.data, data), run)


if __name__ == "__main__":
    program.main(experiments={"primus": sys.modules[__name__]})
