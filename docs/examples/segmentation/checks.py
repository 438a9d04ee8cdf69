"""What can be wrong with images and labels that can be read, in words that say what to do about it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from skimage.measure import label

from segmentation.readers import Volume, orientation_of

MOST_SHOWN = 20  # problems in the text of an error
MANY_CLASSES = 16  # more may be objects that were numbered; they are looked at
FEW_OBJECTS = 8  # in every image; more are hardly classes
SAME_SPACING = 1e-3  # relative; formats round differently


class DataError(ValueError):
    """What is wrong with a folder of images and labels; ``problems`` lists all, the message the first of them."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        lines = [f"{_plural(len(problems), 'problem')} with the data:", *(f"- {p}" for p in problems[:MOST_SHOWN])]
        if len(problems) > MOST_SHOWN:
            lines.append(f"... and {len(problems) - MOST_SHOWN} more")
        super().__init__("\n".join(lines))


class Pair(NamedTuple):
    """An image and its labels as read."""

    name: str
    image_path: Path
    labels_path: Path
    image: Volume
    labels: Volume

    @property
    def spacing(self) -> tuple[float, ...] | None:
        """The image's, or where its file has none, the labels'."""
        return self.image.spacing or self.labels.spacing


def check_pair(pair: Pair, task: str, num_classes: int | None, spacing_given: bool) -> Iterator[str]:
    """What is wrong with one pair."""
    yield from _check_pixels(pair)
    size, labelled = pair.image.array.shape[1:], pair.labels.array.shape
    if size != labelled:
        hint = " (the labels' axes are in the reverse order)" if size == labelled[::-1] else ""
        found = f"{_size(labelled)}{hint}"
        yield f"{pair.labels_path}: expected labels of the size of their image, {_size(size)}; found {found}"
    ours, theirs = pair.image.spacing, pair.labels.spacing
    if not spacing_given and ours and theirs and not np.allclose(ours, theirs, rtol=SAME_SPACING, atol=0):
        yield f"{pair.labels_path}: expected the spacing of its image, {_size(ours)}; found {_size(theirs)}"
    yield from _check_orientation(pair)
    values = _values(pair)
    if task == "semantic" and num_classes is not None:
        yield from _check_classes(pair, values, num_classes)
    elif values[0] < 0:
        yield f"{pair.labels_path}: expected labels from 0; found {values[0]}"
    elif task == "instances" and len(values) > 1 and values[-1] == 255 == values[values > 0][0]:
        yield (
            f"{pair.labels_path}: expected a number for every object; found a mask of 0 and 255: number its objects, "
            "such as by skimage.measure.label"
        )


def check_folder(pairs: Sequence[Pair], task: str, num_classes: int | None, spacing_given: bool) -> Iterator[str]:
    """What does not fit together in all pairs, or is wrong with all of them."""
    if not pairs:
        return
    yield from _check_channels(pairs)
    if not spacing_given:
        yield from _check_spacing(pairs)
    yield from _check_copies(pairs)
    values = np.unique(np.concatenate([_values(pair) for pair in pairs]))
    if len(values) == 1:
        yield f"{pairs[0].labels_path.parent}: expected two labels at least; found {values[0]} everywhere in all files"
    elif task == "instances":
        yield from _check_numbering(pairs)
    elif num_classes is None and values[0] >= 0:
        yield from _check_gaps(pairs, values)


def _check_pixels(pair: Pair) -> Iterator[str]:
    image = pair.image.array
    if image.dtype.kind == "f":
        bad = np.count_nonzero(~np.isfinite(image))
        if bad:
            yield f"{pair.image_path}: expected finite numbers; found {bad} of {image.size} that are NaN or infinite"
            return
    if image.min() == image.max():
        yield f"{pair.image_path}: expected an image; found {image.flat[0]} at every pixel"


def _check_orientation(pair: Pair) -> Iterator[str]:
    """Axes of NIfTI files may point either way; labels that point another way than their image are mirrored."""
    ours, theirs = orientation_of(pair.image_path), orientation_of(pair.labels_path)
    if ours and theirs and ours != theirs:
        hint = "bring both into one, such as by nibabel.as_closest_canonical"
        yield f"{pair.labels_path}: expected the orientation of its image, {ours}; found {theirs}: {hint}"


def _check_classes(pair: Pair, values: NDArray, num_classes: int) -> Iterator[str]:
    """A file's labels where the number of classes is known."""
    outside = values[(values < 0) | (values >= num_classes)]
    if not len(outside):
        return
    count = np.count_nonzero(np.isin(pair.labels.array, outside))
    found = f"{_listed(outside)} at {count} of {pair.labels.array.size} pixels"
    yield f"{pair.labels_path}: expected labels 0 to {num_classes - 1}; found {found}{_mapping(values, num_classes)}"


def _check_gaps(pairs: Sequence[Pair], values: NDArray) -> Iterator[str]:
    """All files' labels where the number of classes follows from them."""
    gaps = len(values) != values[-1] + 1
    instances = len(values) > MANY_CLASSES and _counted_anew(pairs)
    if not gaps and not instances:
        return
    largest = max(pairs, key=lambda pair: pair.labels.array.max())
    found = f"{_listed(values)} in all files, {values[-1]} in this one"
    if instances:
        hint = (
            "; these look like instances, numbered anew in every file; say how many classes there are if they are not"
        )
    else:
        hint = _mapping(values, len(values)) or "; say how many classes there are, or number them without gaps"
    yield f"{largest.labels_path}: expected classes 0, 1, 2, ... without gaps; found {found}{hint}"


def _counted_anew(pairs: Sequence[Pair]) -> bool:
    """Whether labels are 0, 1, ... up to a different number in every file: so objects are numbered, hardly classes."""
    values = [_values(pair) for pair in pairs]
    last = {int(v[-1]) for v in values}
    return len(last) > 1 and all(len(v[v > 0]) == v[-1] for v in values)


def _check_numbering(pairs: Sequence[Pair]) -> Iterator[str]:
    """Classes in place of instances: few numbers in every file, each for several objects that do not touch."""
    numbers = [int(np.count_nonzero(_values(pair))) for pair in pairs]
    if max(numbers) > FEW_OBJECTS:
        return
    pieces = [int(label(pair.labels.array).max()) for pair in pairs]
    if sum(pieces) >= 2 * sum(numbers):
        most = int(np.argmax(pieces))
        yield (
            f"{pairs[most].labels_path}: expected a number for every object; found {pieces[most]} separate ones with "
            f"{_plural(numbers[most], 'number')}, and others alike: number them, such as by skimage.measure.label, or "
            "train on classes"
        )


def _check_channels(pairs: Sequence[Pair]) -> Iterator[str]:
    counts = Counter(len(pair.image.array) for pair in pairs)
    usual, number = counts.most_common(1)[0]
    for pair in pairs:
        channels = len(pair.image.array)
        if channels != usual:
            yield (
                f"{pair.image_path}: expected {_plural(usual, 'channel')}, as {number} of {len(pairs)} images have; "
                f"found {_plural(channels, 'channel')}"
            )


def _check_spacing(pairs: Sequence[Pair]) -> Iterator[str]:
    """Either every file says its spacing, or (in 2-D) none does."""
    silent = [pair for pair in pairs if pair.spacing is None]
    volumes = pairs[0].labels.array.ndim == 3
    if len(silent) == len(pairs) and not volumes:
        return
    for pair in silent:
        why = "that volumes need" if volumes else f"as {len(pairs) - len(silent)} of {len(pairs)} files have"
        yield f"{pair.image_path}: expected a spacing, {why}; found none in the file: give one for all files"


def _check_copies(pairs: Sequence[Pair]) -> Iterator[str]:
    """The same pixels twice: one of them may be trained on and the other validated on."""
    seen: dict[tuple, Path] = {}
    for pair in pairs:
        image = pair.image.array
        key = (image.shape, image.dtype, hashlib.sha256(np.ascontiguousarray(image)).digest())
        if key in seen:
            yield f"{pair.image_path}: expected an image of its own; found the pixels of {seen[key].name}"
        seen.setdefault(key, pair.image_path)


def _values(pair: Pair) -> NDArray[np.int64]:
    """Of the labels, in a type that can be calculated with."""
    return np.unique(pair.labels.array).astype(np.int64)


def _mapping(values: NDArray, num_classes: int) -> str:
    """What to do about labels that are shades of grey."""
    if values[-1] <= num_classes or len(values) > min(num_classes, 8):
        return ""
    if values.tolist() == [0, 255]:
        return ": a mask of 0 and 255; divide it by 255 to have classes 0 and 1"
    classes = ", ".join(f"{value} -> {i}" for i, value in enumerate(values))
    return f": shades of grey in place of classes; map them, such as {classes}"


def _listed(values: NDArray) -> str:
    return ", ".join(map(str, values[:8].tolist())) + (f", ... ({len(values)} values)" if len(values) > 8 else "")


def _size(numbers: Sequence[float]) -> str:
    return " x ".join(f"{number:g}" for number in numbers)


def _plural(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
