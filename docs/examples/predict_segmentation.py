"""Segment the images of a folder with a network that ``train_segmentation.py`` has trained.

    python docs/examples/predict_segmentation.py --checkpoint training/best.pt --images cells/new --out cells/segmented

See docs/train-on-your-images.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from segmentation import checkpoint
from segmentation.axes import FileError
from segmentation.checkpoint import CheckpointError
from segmentation.formats import list_files, stem_of, suffix_of
from segmentation.prediction import Predictor, largest_piece
from segmentation.readers import read_image
from segmentation.settings import Settings, SettingsError, build_network
from segmentation.writers import write_labels
from tqdm import tqdm


def main(arguments: Sequence[str] | None = None) -> list[Path]:
    """Run the program; returns the files that it wrote."""
    options = parse(arguments)
    try:
        return run(options)
    except (CheckpointError, FileError, SettingsError, OSError) as problem:
        sys.exit(f"{Path(__file__).name}: {problem}")


def run(options: argparse.Namespace) -> list[Path]:
    """Read, predict and write one image after another; those that cannot be read are named in the end."""
    settings, predictor = load(options)
    paths = list_files(options.images)
    if not paths:
        raise FileError.of(options.images, "a folder of images (PNG, TIFF, OME-TIFF, NIfTI, OME-Zarr)", "none")
    options.out.mkdir(parents=True, exist_ok=True)
    written, problems = [], []
    for path in tqdm(paths, unit="image", disable=None):
        target = options.out / label_name(path)
        try:
            segment(path, target, settings, predictor, options.spacing)
        except FileError as problem:
            problems.append(str(problem))
        else:
            written.append(target)
    print(f"{len(written)} of {len(paths)} images segmented; labels are in {options.out}")
    if problems:
        sys.exit("\n".join(problems))
    return written


def load(options: argparse.Namespace) -> tuple[Settings, Predictor]:
    """The network with its averaged weights."""
    kept = checkpoint.read(options.checkpoint, ("settings", "weights"), options.device)
    settings = Settings.from_data(kept["settings"])
    network = build_network(settings)
    checkpoint.fill(network, kept["weights"], options.checkpoint)
    precision = settings.precision if options.device.type == "cuda" else "float32"
    largest = largest_piece(settings.crop, options.largest)
    network.to(options.device)
    return settings, Predictor(network, settings.task, precision, largest, settings.seen_spacing)


def segment(path: Path, target: Path, settings: Settings, predictor: Predictor, given: Sequence[float] | None) -> None:
    """Labels of one image, into a file of its format with its spacing."""
    image = read_image(path, settings.spatial_dims)
    if image.array.shape[0] != settings.in_channels:
        raise FileError.of(path, f"{settings.in_channels} channels, as in training", str(image.array.shape[0]))
    spacing = given or image.spacing or settings.given_spacing or settings.spacing
    if len(spacing) != settings.spatial_dims:
        raise SettingsError(f"spacing must be {settings.spatial_dims} numbers; got {tuple(spacing)}")
    prediction = predictor(image.array, spacing)
    write_labels(target, prediction.labels, given or image.spacing, like=path)
    found = f"{prediction.labels.max()} objects" if settings.task == "instances" else shares(prediction.labels)
    tqdm.write(f"{path.name}: spacing {' x '.join(f'{s:g}' for s in spacing)}, {found}")


def shares(labels: NDArray[np.integer]) -> str:
    """How much of an image every class takes."""
    counts = np.bincount(labels.ravel()) / labels.size
    return ", ".join(f"class {label} {share:.1%}" for label, share in enumerate(counts) if share)


def label_name(path: Path) -> str:
    """The name of the image; a JPEG cannot keep labels, so they become a PNG."""
    suffix = suffix_of(path)
    return stem_of(path) + (".png" if suffix.lower() in (".jpg", ".jpeg") else suffix)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options; ends the program with a message where they make no sense."""
    parser = argparse.ArgumentParser(description="Segment images with a trained network.")
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="best.pt of a training")
    add("--images", type=Path, required=True, help="folder of images")
    add("--out", type=Path, required=True, help="folder for the labels, in the format of the images")
    add("--spacing", type=float, nargs="+", help="distance of pixels along every axis, (default: as the "
        "files say, or as in training where they do not)")  # fmt: skip
    add("--device", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    add("--largest", type=int, help="pixels, as the network sees them, of an image that is predicted in one piece; "
        "larger ones in overlapping tiles, which instances never are (default: those of four crops)")  # fmt: skip
    options = parser.parse_args(arguments)
    options.device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if not all(number > 0 for number in (options.largest, *(options.spacing or ())) if number is not None):
        parser.error(f"--largest and --spacing must be positive; got {options.largest}, {options.spacing}")
    if not options.images.is_dir():
        parser.error(f"--images must be a folder; got {options.images}")
    if options.out.resolve() == options.images.resolve():
        parser.error("--out must be another folder than --images: labels would take the place of images")
    return options


if __name__ == "__main__":
    main()
