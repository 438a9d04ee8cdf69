"""What the axes of a file are, and the one order in which the rest of the program sees them: channels first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

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


class Layout(NamedTuple):
    """Which axes of a file are channels and space; all others have length 1."""

    channel: int | None
    space: tuple[int, ...]
    spacing: tuple[float, ...] | None
    """Distance between neighbours along every axis of space; None where one of them is unknown."""

    def apply(self, array: NDArray) -> NDArray:
        """Bring an array of the file into the order (channels, *size), size in the order of the file."""
        kept = self.space if self.channel is None else (self.channel, *self.space)
        thin = (axis for axis in range(array.ndim) if axis not in kept)
        shape = [array.shape[axis] for axis in kept]
        array = array.transpose(*kept, *thin).reshape(shape)
        return array[None] if self.channel is None else array


def arrange(path: Path, loaded: Loaded, spatial_dims: int) -> tuple[NDArray, tuple[float, ...] | None]:
    """The array in the order (channels, *size), and its spacing; see `layout`."""
    found = layout(path, loaded.axes, loaded.array.shape, spatial_dims)
    return found.apply(loaded.array), found.spacing


def layout(path: Path, axes: Sequence[Axis], shape: Sequence[int], spatial_dims: int) -> Layout:
    """Which axes are channels and which are space.

    Axes without a name are space where the file names fewer axes of space than ``spatial_dims`` (the last ones
    first), and channels otherwise: a nameless stack of planes is a volume in 3-D and a picture with channels in 2-D.

    Raises:
        FileError: on several time points, on axes that are neither space nor channels, on two axes of channels, and
            where there are not ``spatial_dims`` axes of space (axes of length 1 are left out where that helps).
    """
    kept = [i for i, (axis, length) in enumerate(zip(axes, shape, strict=True)) if axis.kind == "space" or length > 1]
    for axis, length in ((axes[i], shape[i]) for i in kept):
        if axis.kind == "time":
            raise FileError.of(path, "one point in time, a file for each", f"{length} of them along axis {axis.name!r}")
        if axis.kind == "other":
            raise FileError.of(path, "axes of space and of channels", f"axis {axis.name!r} of length {length}")
    kinds = dict(
        zip(kept, (axis.kind for axis in _name_the_nameless([axes[i] for i in kept], spatial_dims)), strict=True)
    )
    surplus = list(kinds.values()).count("space") - spatial_dims
    for thin in [i for i in kept if kinds[i] == "space" and shape[i] == 1][: max(surplus, 0)]:
        del kinds[thin]
    space = tuple(i for i, kind in kinds.items() if kind == "space")
    channels = [i for i, kind in kinds.items() if kind == "channel"]
    found = describe([axes[i] for i in kinds], [shape[i] for i in kinds])
    if len(space) != spatial_dims:
        raise FileError.of(path, f"{spatial_dims} axes of space", found)
    if len(channels) > 1:
        raise FileError.of(path, "one axis of channels at the most", found)
    steps = tuple(axes[i].step for i in space)
    return Layout(channels[0] if channels else None, space, None if None in steps else steps)  # type: ignore[arg-type]


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


def _name_the_nameless(axes: Sequence[Axis], spatial_dims: int) -> tuple[Axis, ...]:
    missing = spatial_dims - sum(axis.kind == "space" for axis in axes)
    named = []
    for axis in reversed(axes):
        if axis.kind == "unnamed":
            axis = axis._replace(kind="space" if missing > 0 else "channel")
            missing -= 1
        named.append(axis)
    return tuple(reversed(named))
