"""What may be said to ``train_segmentation.py``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from segmentation.processes import local_rank
from segmentation.settings import LEARNING_RATES, PRECISIONS, TASKS, Settings
from segmentation.sharing import WAYS


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options; None for what the data or the checkpoint decide."""
    parser = argparse.ArgumentParser(description="Train a segmentation network on images and their labels.")
    add = parser.add_argument
    add("--images", type=Path, required=True, help="folder of images: PNG, TIFF, OME-TIFF, NIfTI, OME-Zarr")
    add("--labels", type=Path, required=True, help="folder of label images of the same names")
    add("--out", type=Path, default=Path("training"), help="folder to write into (default: %(default)s)")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--task", choices=TASKS, help="classes of pixels, or separate objects (default: semantic)")
    add("--preset", choices=tuple(LEARNING_RATES), help="which network (default: nano)")
    add("--spacing", type=float, nargs="+", help="distance of pixels along every axis (default: as the files say)")
    add("--resample", action="store_const", const=True, help="bring all images to their typical spacing before they "
        "are cropped and varied, and predictions back")  # fmt: skip
    add("--dims", type=int, choices=(2, 3), help="axes of the images (default: as the labels have)")
    add("--classes", type=int, help="number of classes, background included (default: as the labels have)")
    add("--crop", type=int, nargs="+", help="pixels of a crop along every axis (default: from spacing and sizes)")
    add("--epochs", type=int, help=f"validations (default: {Settings.epochs})")
    add("--steps", type=int, help=f"steps between two validations (default: {Settings.steps})")
    add("--batch", type=int, help="crops per step, of all processes together (default: 4 in 2-D, 2 in 3-D)")
    add("--learning-rate", type=float, help="at its highest (default: by preset)")
    add("--validation", type=float, help=f"part of the images kept for validation (default: {Settings.validation})")
    add("--seed", type=int, help=f"of weights, crops and split (default: {Settings.seed})")
    add("--amp", choices=tuple(PRECISIONS), help="precision of the forward pass (default: bf16 on a GPU that has it, "
        "fp16 on one that has not, float32 on a CPU)")  # fmt: skip
    add("--device", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    add("--workers", type=int, help="processes that cut crops (default: none on a CPU, 4 beside a GPU)")
    add("--parallel", choices=WAYS, default=WAYS[0], help="what several processes, started by torchrun, have of the "
        "network: each all of it (ddp), or each a part of every parameter (fsdp) (default: %(default)s)")  # fmt: skip
    add("--checkpoint-activations", action="store_true", help="less memory and more time in training: compute what "
        "lies within blocks and groupings again in the backward pass")  # fmt: skip
    add("--largest", type=int, help="pixels predicted in one piece (default: those of four crops)")
    options = parser.parse_args(arguments)
    options.device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if options.device == torch.device("cuda"):
        if local_rank() >= torch.cuda.device_count():
            parser.error(f"--nproc-per-node must be at most the number of GPUs, {torch.cuda.device_count()}")
        options.device = torch.device("cuda", local_rank())
        torch.cuda.set_device(options.device)
    if options.workers is None:
        options.workers = 4 if options.device.type == "cuda" else 0
    if options.workers < 0:
        parser.error(f"--workers must be at least 0; got {options.workers}")
    if options.largest is not None and options.largest < 1:
        parser.error(f"--largest must be at least 1; got {options.largest}")
    if options.amp == "fp16" and options.device.type == "cpu":
        parser.error("--amp fp16 needs a GPU; a CPU has bf16 and float32")
    return options


def suitable_precision(device: torch.device) -> str:
    """The fastest that is safe on a device."""
    if device.type != "cuda":
        return "float32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def chosen(options: argparse.Namespace) -> dict[str, Any]:
    """Settings that the options say; those that they leave open are not in it."""
    names = ("task", "preset", "epochs", "steps", "batch", "learning_rate", "validation", "seed", "resample")
    asked = {name: getattr(options, name) for name in names}
    asked |= {
        "spatial_dims": options.dims,
        "num_classes": options.classes,
        "crop": options.crop and tuple(options.crop),
        "given_spacing": options.spacing and tuple(options.spacing),
        "precision": options.amp or (None if options.resume else suitable_precision(options.device)),
    }
    return {name: value for name, value in asked.items() if value is not None}
