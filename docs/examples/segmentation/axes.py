"""What the axes of a file are, and the one order in which the rest of the program sees them: channels first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Both letters that stand for micro are in use: the micro sign (B5) and the Greek one (3BC).
MICROMETRES = {
    **dict.fromkeys(("µm", "\u03bcm", "um", "micron", "microns", "micrometer", "micrometre"), 1.0),
    **dict.fromkeys(("nm", "nanometer", "nanometre"), 1e-3),
    **dict.fromkeys(("Å", "angstrom"), 1e-4),
    **dict.fromkeys(("mm", "millimeter", "millimetre"), 1e3),
    **dict.fromkeys(("cm", "centimeter", "centimetre"), 1e4),
    **dict.fromkeys(("m", "meter", "metre"), 1e6),
}


class FileError(ValueError):
    """A file that cannot be used. The message names it, says what was expected, and what was found."""

    @classmethod
    def of(cls, path: Path, expected: str, found: str) -> FileError:
        return cls(f"{path}: expected {expected}; found {found}")


class Axis(NamedTuple):
    """An axis as a file describes it.

    ``kind`` is "space", "channel", "time", "unnamed" (the file does not say) or "other" (what nothing here can use);
    ``step`` is the distance between neighbours, None where the file does not say.
    """

    kind: str
    name: str
    step: float | None = None


class Loaded(NamedTuple):
    """An array as it lies in a file; ``alpha``: the last channel is opacity."""

    array: NDArray
    axes: tuple[Axis, ...]
    alpha: bool = False


def step_of(value: float | str | None, factor: float | None = 1.0) -> float | None:
    """A distance times the factor of its unit, or None where either is missing or makes no sense."""
    if value is None or factor is None:
        return None
    step = float(value) * factor
    return step if math.isfinite(step) and step > 0 else None


def arrange(path: Path, loaded: Loaded, spatial_dims: int) -> tuple[NDArray, tuple[float, ...] | None]:
    """Bring an array into the order (channels, *size), size in the order of the file, and say its spacing.

    Axes without a name are space where the file names fewer axes of space than ``spatial_dims`` (the last ones
    first), and channels otherwise: a nameless stack of planes is a volume in 3-D and a picture with channels in 2-D.

    Returns:
        The array and the distance between neighbours along every axis of space; None where one of them is unknown.

    Raises:
        FileError: on several time points, on axes that are neither space nor channels, on two axes of channels, and
            where there are not ``spatial_dims`` axes of space (axes of length 1 are left out where that helps).
    """
    array, axes = loaded.array, loaded.axes
    array, axes = _select(array, axes, [a.kind == "space" or n > 1 for a, n in zip(axes, array.shape, strict=True)])
    for axis, length in zip(axes, array.shape, strict=True):
        if axis.kind == "time":
            raise FileError.of(path, "one point in time, a file for each", f"{length} of them along axis {axis.name!r}")
        if axis.kind == "other":
            raise FileError.of(path, "axes of space and of channels", f"axis {axis.name!r} of length {length}")
    axes = _name_the_nameless(axes, spatial_dims)
    surplus = _count(axes, "space") - spatial_dims
    thin = [i for i, axis in enumerate(axes) if axis.kind == "space" and array.shape[i] == 1][: max(surplus, 0)]
    array, axes = _select(array, axes, [i not in thin for i in range(len(axes))])
    found = describe(axes, array.shape)
    if _count(axes, "space") != spatial_dims:
        raise FileError.of(path, f"{spatial_dims} axes of space", found)
    if _count(axes, "channel") > 1:
        raise FileError.of(path, "one axis of channels at the most", found)
    channels = next((i for i, axis in enumerate(axes) if axis.kind == "channel"), None)
    array = array[None] if channels is None else np.moveaxis(array, channels, 0)
    steps = tuple(axis.step for axis in axes if axis.kind == "space")
    return array, None if None in steps else steps  # type: ignore[return-value]


def describe(axes: Sequence[Axis], shape: Sequence[int]) -> str:
    """Names and lengths of axes in the words of a message."""
    return ", ".join(f"{axis.name} {length}" for axis, length in zip(axes, shape, strict=True)) or "a single number"


def without_alpha(path: Path, array: NDArray) -> NDArray:
    """Leave out the last channel, which is opacity, if it hides nothing: if it is the same everywhere."""
    alpha = array[-1]
    if alpha.min() != alpha.max():
        found = f"opacity from {alpha.min()} to {alpha.max()} in its alpha channel"
        raise FileError.of(path, "a picture without transparent parts", found)
    return array[:-1]


def _name_the_nameless(axes: tuple[Axis, ...], spatial_dims: int) -> tuple[Axis, ...]:
    missing = spatial_dims - _count(axes, "space")
    named = []
    for axis in reversed(axes):
        if axis.kind == "unnamed":
            axis = axis._replace(kind="space" if missing > 0 else "channel")
            missing -= 1
        named.append(axis)
    return tuple(reversed(named))


def _count(axes: Sequence[Axis], kind: str) -> int:
    return sum(axis.kind == kind for axis in axes)


def _select(array: NDArray, axes: Sequence[Axis], kept: Sequence[bool]) -> tuple[NDArray, tuple[Axis, ...]]:
    """Only the axes that are kept; the others have length 1."""
    return array.reshape([n for n, keep in zip(array.shape, kept, strict=True) if keep]), tuple(
        axis for axis, keep in zip(axes, kept, strict=True) if keep
    )
