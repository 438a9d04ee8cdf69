"""Segment a photograph by grouping its pixels: train, compare, and draw what the groups are.

    python docs/examples/segment_coins.py
    python docs/examples/segment_coins.py --image cells.tif --labels cells_labels.png --spacing 0.5 0.5

A network of three grouping layers is trained on the upper part of one image and judged on the lower part, beside
the same network with bilinear upsampling and beside strided convolutions of equal size. See docs/segment-coins.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from coins_data import SMALLEST_PART, Crops, Scene, coins, from_files
from coins_metrics import Scores, score
from coins_models import Coarse, GroupingNetwork, StridedNetwork, count
from coins_plot import Prediction, draw
from coins_training import predict, train
from tqdm import tqdm


def main(arguments: Sequence[str] | None = None) -> dict[str, Scores]:
    """Run the program; returns the scores by the name of the method."""
    began = time.perf_counter()
    options = parse(arguments)
    try:
        scene = load(options)
        seen, unseen = scene.split(options.train_fraction)
    except (OSError, TypeError, ValueError) as problem:
        sys.exit(f"{Path(__file__).name}: {problem}")
    torch.set_num_threads(options.threads)
    describe(scene, seen, unseen, options)
    num_classes = len(scene.classes)

    torch.manual_seed(options.seed)
    native = GroupingNetwork(num_classes, scene.spacing)
    torch.manual_seed(options.seed)
    retrained = GroupingNetwork(num_classes, scene.spacing)
    torch.manual_seed(options.seed)
    strided = StridedNetwork(native)
    with tqdm(total=3 * options.steps, unit="step", disable=None) as bar:
        for name, network, upsample in (
            ("grouping, native", native, Coarse.native),
            ("grouping, bilinear", retrained, Coarse.bilinear),
            ("strided, bilinear", strided, Coarse.bilinear),
        ):
            bar.set_description(name)

            def show(loss: float) -> None:
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update()

            train(network, upsample, Crops(seen, options.crop, options.seed), options.steps, options.batch, show)

    predictions = []
    for name, network, upsample in (
        ("(a) grouping, native masks", native, Coarse.native),
        ("(b) weights of (a), bilinear masks", native, Coarse.bilinear),
        ("(b') grouping trained for bilinear masks", retrained, Coarse.bilinear),
        ("(c) strided convolutions, bilinear masks", strided, Coarse.bilinear),
    ):
        labels = predict(network, upsample, unseen.image)
        scores = score(labels, unseen.labels, num_classes)
        predictions.append(Prediction(name, labels, scores, count(network)))
    report(predictions, scene.classes)
    draw(scene, seen, unseen, predictions, native, options.crop, options.output)
    print(f"\n{options.output} written; {time.perf_counter() - began:.0f} s in all")
    return {p.name: p.scores for p in predictions}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options; ends the program with a message where they make no sense."""
    parser = argparse.ArgumentParser(
        description="Segment an image by grouping its pixels, and compare with bilinear upsampling.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--image", type=Path, help="image file; without it, scikit-image's coins")
    parser.add_argument("--labels", type=Path, help="integer image of the same size, its values are the classes")
    parser.add_argument(
        "--spacing", type=float, nargs=2, metavar=("Y", "X"), default=(1.0, 1.0),
        help="physical distance between rows and between columns",
    )  # fmt: skip
    parser.add_argument("--train-fraction", type=float, default=0.5, help="upper part of the image to train on")
    parser.add_argument("--steps", type=int, default=400, help="training steps of each of the three networks")
    parser.add_argument("--batch", type=int, default=4, help="crops per step")
    parser.add_argument("--crop", type=int, default=64, help="height and width of the crops trained on")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the crops")
    parser.add_argument("--threads", type=int, default=2, help="of torch; other numbers round differently")
    parser.add_argument("--output", type=Path, default=Path("segment_coins.png"), help="picture to write")
    options = parser.parse_args(arguments)
    if (options.image is None) != (options.labels is None):
        parser.error("--image and --labels go together")
    for name in ("steps", "batch", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if options.crop < SMALLEST_PART:
        parser.error(f"--crop must be at least {SMALLEST_PART}, got {options.crop}")
    if not all(np.isfinite(s) and s > 0 for s in options.spacing):
        parser.error(f"--spacing must be two positive numbers, got {options.spacing}")
    return options


def load(options: argparse.Namespace) -> Scene:
    """The scene that the options name."""
    spacing = tuple(options.spacing)
    return coins(spacing) if options.image is None else from_files(options.image, options.labels, spacing)


def describe(scene: Scene, seen: Scene, unseen: Scene, options: argparse.Namespace) -> None:
    """Say what is learned from what."""
    height, width = scene.image.shape
    spacing = " x ".join(f"{s:g}" for s in scene.spacing)
    print(f"image      {scene.image_source}, {height} x {width} pixels, spacing {spacing}")
    print(f"labels     {scene.label_source}")
    print(f"training   upper {len(seen.image)} rows: {share(seen)}")
    print(f"judged on  lower {len(unseen.image)} rows, never seen: {share(unseen)}")
    print(
        f"recipe     {options.steps} steps of {options.batch} crops of {options.crop} x {options.crop} pixels, "
        f"seed {options.seed}, {options.threads} threads"
    )


def share(scene: Scene) -> str:
    """How much of a scene every class takes."""
    counts = np.bincount(scene.labels.ravel(), minlength=len(scene.classes)) / scene.labels.size
    return ", ".join(f"{name} {100 * c:.1f} %" for name, c in zip(scene.classes, counts, strict=True))


def report(predictions: Sequence[Prediction], classes: Sequence[str]) -> None:
    """Print the comparison: means, then IoU of every class."""
    width = max(len(p.name) for p in predictions)
    columns = [f"IoU {name}" for name in classes]
    header = f"{'':{width}}  parameters   mIoU  BF@1px"
    print("\n" + "   ".join([header, *columns]))
    for p in predictions:
        figures = f"{p.parameters:10d}  {100 * p.scores.mean_iou:5.1f}  {100 * p.scores.mean_boundary:6.1f}"
        per_class = [f"{100 * v:{len(c)}.1f}" for v, c in zip(p.scores.iou, columns, strict=True)]
        print("   ".join([f"{p.name:{width}}  {figures}", *per_class]))
    print("\nmIoU and boundary F-score within 1 pixel: %, means over classes, on the unseen part.")
    print("(a), (b') and (c) were trained alike, each for its own masks; (b) only reads (a) in another way.")


if __name__ == "__main__":
    main()
