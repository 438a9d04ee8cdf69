"""Pictures of results: what networks say of one image, their segments, and scores over spacing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from evidence_tables import ORDER, Results, methods_of, of_score
from masks import MADE, STEPS, of_family
from networks import NETWORKS
from reporting import COLOURS, figure, save
from runs import Run
from scipy import ndimage
from scores import superpixels
from skimage.segmentation import mark_boundaries

SHADES = np.array([[0.93, 0.93, 0.93], [0.0, 0.45, 0.7], [0.84, 0.37, 0.0]])  # of classes
DASHES = ("-", "--", ":")


def predictions(folder: Path, path: Path) -> None:
    """Rows are families of images; columns the image, its classes, and what the methods make of it."""
    shown = _families(folder)
    made, axes = figure(len(shown), 2 + len(NETWORKS), 1.6 * (2 + len(NETWORKS)), 1.7 * len(shown))
    for row, family in zip(axes, shown, strict=True):
        picture = of_family(family)[0]
        row[0].imshow(picture.image[0].numpy(), cmap="gray")
        row[1].imshow(SHADES[picture.labels.numpy()])
        row[0].set_ylabel(family, fontsize=8)
        for axis, method in zip(row[2:], NETWORKS, strict=True):
            axis.imshow(SHADES[_arrays(folder, family, method)["classes"]])
    for axis, title in zip(axes[0], ("image", "classes", *NETWORKS), strict=True):
        axis.set_title(title.replace(", ", ",\n"), fontsize=8)
    _bare(axes)
    save(made, path)


def segments(folder: Path, path: Path) -> None:
    """Rows are families; columns an image, and its segments of the last stage of networks that group, and SLIC's."""
    methods = [m for m in NETWORKS if m.startswith("grouping")]
    shown = _families(folder)
    made, axes = figure(len(shown), 2 + len(methods), 2.6 * (2 + len(methods)), 2.6 * len(shown))
    for row, family in zip(axes, shown, strict=True):
        picture = of_family(family)[0]
        found = {m: _arrays(folder, family, m)["stage 2"] for m in methods}
        number = len(np.unique(found[methods[0]]))
        found["SLIC, as many as of native masks"] = superpixels(picture, number)
        row[0].imshow(picture.image[0].numpy(), cmap="gray")
        row[0].set_ylabel(family, fontsize=8)
        for axis, (name, labels) in zip(row[1:], found.items(), strict=True):
            axis.imshow(_outlined(picture.image[0].numpy(), np.unique(labels, return_inverse=True)[1]))
            axis.set_title(f"{name} ({len(np.unique(labels))})", fontsize=8)
    _bare(axes)
    save(made, path)


def _outlined(image: np.ndarray, labels: np.ndarray, enlarged: int = 6) -> np.ndarray:
    """Every segment in its mean brightness, with thin outlines."""
    means = ndimage.mean(image, labels, np.arange(labels.max() + 1))
    light = np.clip((means[labels] - image.min()) / np.ptp(image), 0, 1)
    large = np.kron(light, np.ones((enlarged, enlarged)))
    lines = np.kron(labels, np.ones((enlarged, enlarged), int))
    outlined: np.ndarray = mark_boundaries(large, lines, color=(1, 0.8, 0), mode="inner")
    return outlined


def over_spacing(results: Results, x: Mapping[str, Sequence[str]], path: Path) -> None:
    """One panel per training set: mIoU over what is tested; as it is, and resampled to the training's spacing."""
    names = [name for name in x if methods_of(results, "spacing", [name])]
    made, axes = figure(2, max(1, len(names)), 3.6 * max(1, len(names)), 7.5)
    lines: dict[str, Any] = {}
    for column, name in enumerate(names):
        axes[1][column].sharey(axes[0][column])
        for row, (end, title) in enumerate((("", "as it is"), (", resampled", "resampled"))):
            axis = axes[row][column]
            for method in methods_of(results, "spacing", [name]):
                index = ORDER["spacing"].index(method)
                values = [of_score(results, "spacing", name, method, f"{test}{end}") for test in x[name]]
                middle = [mean(v) for v in values]
                error = [stdev(v) if len(v) > 1 else 0.0 for v in values]
                style = {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index // len(COLOURS)]}
                at = [test.removeprefix("spacing ") for test in x[name]]
                lines[method] = axis.errorbar(at, middle, error, capsize=2, lw=1.3, **style)
            axis.set(title=f"{name}: {title}", ylabel="mIoU, %")
            axis.grid(alpha=0.3)
    named = {m: lines[m] for m in ORDER["spacing"] if m in lines}
    made.legend([*named.values()], [*named], loc="outside lower center", ncols=3, fontsize=8)
    save(made, path)


def _families(folder: Path) -> list[str]:
    """Those of which every method's image has been recorded."""
    return [f for f in MADE if all(_file(folder, f, m).exists() for m in NETWORKS)]


def _file(folder: Path, family: str, method: str) -> Path:
    return folder / Run("masks", family, method, 0, STEPS).file


def _arrays(folder: Path, family: str, method: str) -> dict[str, Any]:
    return dict(np.load(_file(folder, family, method)))


def _bare(axes: Any) -> None:
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
