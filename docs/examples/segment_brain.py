"""Segment a head in three dimensions: train on two thirds of a volume, look at the third that was not seen.

    python docs/examples/segment_brain.py
    python docs/examples/segment_brain.py --data example4d --out scan

The volume is written into folders as anybody's would be, and the programs for one's own images do the rest.
See docs/segment-brain.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import predict_segmentation
import train_segmentation
from brain_data import BRAINS, Brain
from brain_plot import draw
from numpy.typing import NDArray
from segmentation.metrics import semantic_scores
from segmentation.pairs import Sample, split
from sklearn.tree import DecisionTreeClassifier

PARTS = ("back", "front", "middle")  # as files are sorted
PLACES = {"back": 0, "middle": 1, "front": 2}
UNSEEN = 0.34  # of the parts: one of three


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Run the program; returns the scores in the part that was not trained on, by method."""
    options = parse(arguments)
    brain = BRAINS[options.data]()
    out = options.out or Path(options.data)
    if (out / "training").exists():
        sys.exit(f"{Path(__file__).name}: {out / 'training'} is there already; another --out begins anew")
    places = thirds(brain)
    write(brain, places, out)
    train_segmentation.main(
        [
            *("--images", str(out / "images"), "--labels", str(out / "labels"), "--out", str(out / "training")),
            *("--validation", str(UNSEEN), "--seed", str(options.seed)),
            *("--epochs", str(options.epochs), "--steps", str(options.steps)),
        ]
    )
    best = out / "training" / "best.pt"
    common = ["--checkpoint", str(best), "--images", str(out / "whole"), "--out", str(out / "segmented")]
    predict_segmentation.main(common)
    predicted = np.asarray(nibabel.load(out / "segmented" / "head.nii.gz").dataobj)

    samples = [Sample(name, brain.image[places[name]], brain.labels[places[name]], brain.spacing) for name in PARTS]
    seen, (unseen,) = split(samples, UNSEEN, options.seed)
    place = places[unseen.name]
    scores = {
        name: semantic_scores([labels], [unseen.labels], len(brain.classes))
        for name, labels in (("network", predicted[place]), ("intensity alone", by_intensity(seen, unseen)))
    }
    report(scores, unseen.name, brain)
    _, predictor = predict_segmentation.load(predict_segmentation.parse([*common, "--device", "cpu"]))
    draw(brain, predicted, place, predictor, out / "slices.png")
    print(f"{out / 'slices.png'} written")
    return scores


def thirds(brain: Brain) -> dict[str, tuple[slice, slice, slice]]:
    """Three parts, one behind the other."""
    ends = [round(i * brain.image.shape[1] / 3) for i in range(4)]
    return {name: (slice(None), slice(ends[i], ends[i + 1]), slice(None)) for name, i in PLACES.items()}


def by_intensity(seen: Sequence[Sample], unseen: Sample) -> NDArray[np.integer]:
    """What is to be beaten: classes from thresholds, as many as it takes, fitted to the seen parts."""
    image, labels = (np.concatenate([part[i].ravel() for part in seen]) for i in (1, 2))
    tree = DecisionTreeClassifier(max_leaf_nodes=int(labels.max()) + 1).fit(image[:, None], labels)
    return tree.predict(unseen.image.reshape(-1, 1)).reshape(unseen.labels.shape)


def report(scores: Mapping[str, Mapping[str, Any]], part: str, brain: Brain) -> None:
    """A line per method."""
    print(f"the unseen part ({part}), Dice in %, by {brain.label_source}:")
    for method, row in scores.items():
        values = zip(brain.classes, row["Dice per class"], strict=True)
        print(f"  {method:16}" + ", ".join(f"{name} {100 * dice:.1f}" for name, dice in values))


def write(brain: Brain, places: dict[str, tuple[slice, slice, slice]], out: Path) -> None:
    """The parts as images and labels, and the whole to be segmented, as NIfTI files with their place in the head."""
    for folder in ("images", "labels", "whole"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for name, place in places.items():
        for folder, volume in (("images", brain.image), ("labels", brain.labels)):
            save(out / folder / f"{name}.nii.gz", volume[place], brain.affine, start=place[1].start)
    save(out / "whole" / "head.nii.gz", brain.image, brain.affine, start=0)


def save(path: Path, volume: NDArray[Any], affine: NDArray[np.float64], start: int) -> None:
    """One file; ``start`` is where the volume begins along the second axis of the head's."""
    moved = affine.copy()
    moved[:3, 3] += affine[:3, 1] * start
    nibabel.save(nibabel.Nifti1Image(volume, moved), path)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options; ends the program with a message where they make no sense."""
    parser = argparse.ArgumentParser(description="Train on two thirds of a head and segment all of it.")
    parser.add_argument("--data", choices=sorted(BRAINS), default="mni152", help="which (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for everything (default: the name of the data)")
    parser.add_argument("--epochs", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="of an epoch (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="also of which part is unseen (default: %(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
