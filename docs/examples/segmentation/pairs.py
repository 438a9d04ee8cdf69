"""A folder of images and a folder of their labels, checked as a whole before anything is trained on them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from RoSE.validation import require_choice, require_int, require_per_axis, require_real
from skimage.segmentation import relabel_sequential

from segmentation.axes import FileError
from segmentation.checks import DataError, Pair, check_folder, check_pair
from segmentation.formats import FORMATS, list_files, stem_of, suffix_of
from segmentation.readers import read_image, read_labels

__all__ = ["DataError", "Sample", "find_pairs", "load_samples", "number_of_classes", "split"]

# What the name of a file of labels may have behind the name of its image.
LABEL_NAMES = re.compile(r"[ _.-]?(cp_)?(masks?|labels?|seg|segmentation|gt|instances?)$", re.IGNORECASE)


class Sample(NamedTuple):
    """An image (channels, *size) in the type of its file, its labels (*size), and its spacing per axis of size."""

    name: str
    image: NDArray
    labels: NDArray[np.int32]
    spacing: tuple[float, ...]


def find_pairs(images: Path, labels: Path) -> list[tuple[str, Path, Path]]:
    """Images and the files of labels that belong to them, in the order of names.

    A file of labels has the name of its image (without suffix), or this and one of _mask, _label, _seg, _gt,
    _instances or a word like them.

    Returns:
        Name, path of the image, path of the labels.

    Raises:
        DataError: names every image without labels, every file of labels without an image, and names that more than
            one file has; and says what there was where nothing fits together.
    """
    pairs, problems = _pair_up(images, labels)
    if problems:
        raise DataError(problems)
    return pairs


def load_samples(
    images: Path,
    labels: Path,
    *,
    spatial_dims: int,
    task: str,
    num_classes: int | None = None,
    spacing: Sequence[float] | None = None,
) -> list[Sample]:
    """Read and check all pairs of two folders. Everything that is wrong with any of them comes in one error.

    Spacing is the given one, else that of the image's file, else that of the labels', else (in 2-D, where no file has
    one) 1 along every axis.

    Args:
        images: folder; see `find_pairs`.
        labels: folder.
        spatial_dims: 2 or 3.
        task: "semantic" (labels are classes) or "instances" (every object has a number of its own, 0 is background;
            they are re-numbered 1, 2, ...).
        num_classes: classes are 0 .. num_classes - 1; None: all that occur, which must be 0, 1, 2, ... without gaps.
            Only for semantic labels.
        spacing: distance between neighbours per axis, for all files.

    Returns:
        In the order of names.

    Raises:
        DataError: lists file by file what was expected and what was found (at most 20; `problems` has all).
        ValueError, TypeError: an argument is none of the above.
    """
    require_choice("spatial_dims", spatial_dims, (2, 3))
    require_choice("task", task, ("semantic", "instances"))
    if num_classes is not None:
        require_int("num_classes", num_classes, minimum=2)
        if task == "instances":
            raise ValueError(f"num_classes must be None for instances; got {num_classes}")
    given = None if spacing is None else require_per_axis("spacing", spacing, spatial_dims, positive=True)
    paths, problems = _pair_up(images, labels)
    pairs: list[Pair] = []
    for name, image_path, labels_path in paths:
        read = []
        for reader, path in ((read_image, image_path), (read_labels, labels_path)):
            try:
                read.append(reader(path, spatial_dims))
            except FileError as error:
                problems.append(str(error))
        if len(read) == 2:
            pairs.append(Pair(name, image_path, labels_path, *read))
            problems += check_pair(pairs[-1], task, num_classes, given is not None)
    problems += check_folder(pairs, task, num_classes, given is not None)
    if problems:
        raise DataError(problems)
    return [_sample(pair, task, given) for pair in pairs]


def number_of_classes(samples: Sequence[Sample]) -> int:
    """The largest label and 0: two at least."""
    return max(1, *(int(sample.labels.max()) for sample in samples)) + 1


def split(samples: Sequence[Sample], fraction: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Samples to train on and samples to validate on, by chance; each in the order it had.

    Args:
        samples: two at least.
        fraction: share to validate on, rounded, at least one sample on either side.
        seed: the same one gives the same split.
    """
    require_real("fraction", fraction, above=0.0, maximum=1.0)
    if len(samples) < 2:
        raise ValueError(f"samples must be at least 2, to train on one and validate on the other; got {len(samples)}")
    count = min(max(round(fraction * len(samples)), 1), len(samples) - 1)
    chosen = set(np.random.default_rng(seed).permutation(len(samples))[:count].tolist())
    return [s for i, s in enumerate(samples) if i not in chosen], [s for i, s in enumerate(samples) if i in chosen]


def _pair_up(images: Path, labels: Path) -> tuple[list[tuple[str, Path, Path]], list[str]]:
    """All pairs, and what is wrong with the rest."""
    problems = [f"{folder}: expected a folder; found none" for folder in (images, labels) if not folder.is_dir()]
    if not problems and images.resolve() == labels.resolve():
        problems = [f"{images}: expected images and labels in two folders; found one for both"]
    if problems:
        return [], problems
    pictures, masks = list_files(images), list_files(labels)
    stems = {stem_of(path) for path in pictures}
    by_name = [(stem_of(path), path) for path in pictures], [(_image_name(path, stems), path) for path in masks]
    first, second = (dict(named) for named in by_name)
    if not first.keys() & second.keys():
        return [], [_nothing_found(images, labels, pictures, masks)]
    problems += [*_duplicates(by_name[0], "image"), *_duplicates(by_name[1], "file of labels of that image")]
    lacking = sorted(first.keys() - second.keys())
    if lacking:
        problems.append(f"{labels}: expected labels of {len(first)} images; found none for {len(lacking)} of them")
    for name in lacking:
        expected = f"labels named {name} or {name}_mask in {labels}"
        problems.append(f"{first[name]}: expected {expected}; {_others(labels, name)}")
    for name in sorted(second.keys() - first.keys()):
        problems.append(f"{second[name]}: expected an image named {name} in {images}; {_others(images, name)}")
    return [(name, first[name], second[name]) for name in sorted(first.keys() & second.keys())], problems


def _sample(pair: Pair, task: str, given: Sequence[float] | None) -> Sample:
    labels = pair.labels.array
    if task == "instances":
        labels = relabel_sequential(labels.astype(np.int64))[0]
    spacing = given or pair.spacing or (1.0,) * labels.ndim
    return Sample(pair.name, pair.image.array, labels.astype(np.int32), tuple(spacing))


def _image_name(path: Path, stems: set[str]) -> str:
    """The name of the image that labels belong to, by their own name."""
    name = stem_of(path)
    short = LABEL_NAMES.sub("", name)
    return short if name not in stems and short in stems else name


def _duplicates(named: Sequence[tuple[str, Path]], what: str) -> Iterator[str]:
    for name, count in Counter(name for name, _ in named).items():
        if count > 1:
            paths = [path for other, path in named if other == name]
            yield f"{paths[0]}: expected one {what}; found also {', '.join(path.name for path in paths[1:])}"


def _others(folder: Path, name: str) -> str:
    """What a folder has of a name in a format that cannot be read."""
    unread = sorted(p.name for p in folder.iterdir() if p.stem == name and not suffix_of(p))
    return f"found {', '.join(unread)}, whose suffix is none of {', '.join(FORMATS)}" if unread else "found none"


def _nothing_found(images: Path, labels: Path, pictures: Sequence[Path], masks: Sequence[Path]) -> str:
    return (
        f"expected images in {images} and labels of the same names, or with _mask, _label, _seg and the like behind, "
        f"in {labels}, both with a suffix of {', '.join(FORMATS)}; found no such pair among "
        f"{_contents(images, pictures)} and {_contents(labels, masks)}"
    )


def _contents(folder: Path, paths: Sequence[Path]) -> str:
    names = "".join(f" {path.name}," for path in paths[:3])
    rest = Counter(path.suffix or path.name for path in folder.iterdir() if not suffix_of(path))
    others = "".join(f", {count} {suffix}" for suffix, count in rest.most_common(4))
    return f"{len(paths)} files in {folder}" + (f" ({names[1:]} ...)" if names else "") + others
