"""Images and labels from files: PNG, JPEG, TIFF, OME-TIFF, NIfTI and OME-Zarr.

Axes stay in the order of the file, and spacing has their order: rows before columns (y, x) and (z, y, x) in PNG,
TIFF and OME-Zarr, (x, y, z) in NIfTI, whose first axis is x. Spacing is in micrometres, in NIfTI in millimetres; a
file has one only where it says so in a unit of length (the dots per inch of a plain TIFF are about printing).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import nibabel
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from segmentation.axes import MICROMETRES, Axis, FileError, Loaded, arrange, describe, step_of, without_alpha
from segmentation.formats import FORMATS, checked_format, suffix_of
from segmentation.ome import open_zarr

__all__ = ["FileError", "Volume", "orientation_of", "read_image", "read_labels", "spatial_dims_of"]

TIFF_KINDS = {
    **dict.fromkeys("ZYX", "space"),
    **dict.fromkeys("CS", "channel"),
    "T": "time",
    **dict.fromkeys("QI", "unnamed"),
}
NIFTI_MILLIMETRES = {"unknown": 1.0, "mm": 1.0, "meter": 1e3, "micron": 1e-3}


class Volume(NamedTuple):
    """An image (channels, *size) or labels (*size), and the distance between neighbours along every axis of size."""

    array: NDArray
    spacing: tuple[float, ...] | None


def read_image(path: Path, spatial_dims: int) -> Volume:
    """Read an image in the type of the file.

    Channels are the colours of a PNG or JPEG (opacity is left out where it is the same everywhere), the axes C and S
    of a TIFF, the axis of type channel of OME-Zarr, the fourth axis of a NIfTI whose header gives it no unit of time,
    and an axis without a name that is not needed as space (see `arrange`).

    Args:
        path: file, or directory of OME-Zarr (0.4 or 0.5; the finest resolution).
        spatial_dims: 2 or 3.

    Returns:
        (channels, *size) with one channel where the file has no axis of channels; spacing or None.

    Raises:
        FileError: whatever is wrong with the file.
    """
    loaded = _load(path, labels=False)
    array, spacing = arrange(path, loaded, spatial_dims)
    return Volume(without_alpha(path, array) if loaded.alpha else array, spacing)


def read_labels(path: Path, spatial_dims: int) -> Volume:
    """Read labels: one whole number for every pixel.

    Numbers with a fraction part of zero become integers, a palette's indices are the labels (not its colours), and of
    several equal channels one is taken.

    Returns:
        Integers (*size); spacing or None.

    Raises:
        FileError: also on colours, on fractions, and on JPEG, which changes values.
    """
    loaded = _load(path, labels=True)
    array, spacing = arrange(path, loaded, spatial_dims)
    if loaded.alpha:
        array = without_alpha(path, array)
    if (array[1:] != array[:1]).any():
        found = f"{len(array)} channels that differ"
        if len(array) <= 4:
            found += f" ({len(np.unique(array.reshape(len(array), -1), axis=1).T)} colours)"
        raise FileError.of(path, "labels, one whole number for every pixel", found)
    labels = array[0]
    if labels.dtype.kind == "b":
        labels = labels.astype(np.uint8)
    if labels.dtype.kind == "f":
        fractions = labels[~(np.isfinite(labels) & (labels == np.round(labels)))]
        if fractions.size:
            found = f"{fractions.size} values that are not, such as {fractions[0]:g}"
            raise FileError.of(path, "labels that are whole numbers", found)
        labels = labels.astype(np.int64)
    return Volume(labels, spacing)


def spatial_dims_of(path: Path) -> int:
    """2 or 3: the number of axes of a file of labels, which have no channels; axes of length 1 do not count."""
    loaded = _load(path, labels=True)
    long = [
        axis for axis, length in zip(loaded.axes, loaded.array.shape, strict=True)
        if axis.kind in ("space", "unnamed") and length > 1
    ]  # fmt: skip
    if len(long) not in (2, 3):
        raise FileError.of(path, "labels with 2 or 3 axes of space", describe(loaded.axes, loaded.array.shape))
    return len(long)


def orientation_of(path: Path) -> str | None:
    """Where the axes of a NIfTI file point, such as "RAS" (right, anterior, superior); None for other formats."""
    if FORMATS.get(suffix_of(path).lower()) not in ("NIfTI", "gzip"):
        return None
    image: Any = nibabel.load(path)
    return "".join(code or "?" for code in nibabel.aff2axcodes(image.affine))


def _load(path: Path, labels: bool) -> Loaded:
    """The array in a file. What a library throws at a broken file is none of its contract, so all of it is caught."""
    kind = "image"
    try:
        kind = checked_format(path)
        if kind == "JPEG" and labels:
            raise FileError.of(path, "labels in a format that keeps values (PNG, TIFF, NIfTI, OME-Zarr)", "JPEG")
        loaded = LOADERS[kind](path, labels)
    except FileError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise FileError.of(path, f"a complete {kind} file", f"what cannot be read ({reason})") from error
    if loaded.array.dtype.kind not in "buif":
        raise FileError.of(path, "integers or real numbers", f"type {loaded.array.dtype}")
    if not loaded.array.size:
        raise FileError.of(path, "at least one pixel", describe(loaded.axes, loaded.array.shape))
    # torch knows the byte order of this machine only.
    native = loaded.array.dtype.newbyteorder("=")
    return loaded._replace(array=loaded.array.astype(native, copy=False))


def _load_picture(path: Path, labels: bool) -> Loaded:
    with Image.open(path) as picture:
        if getattr(picture, "n_frames", 1) > 1:
            raise FileError.of(path, "one picture", f"an animation of {picture.n_frames}")
        if picture.mode == "P" and not labels:
            picture = picture.convert("RGBA" if "transparency" in picture.info else "RGB")
        if picture.mode not in ("1", "L", "LA", "I", "I;16", "I;16B", "F", "P", "RGB", "RGBA"):
            raise FileError.of(path, "a picture in grey or RGB, with or without alpha", f"mode {picture.mode}")
        array = np.asarray(picture)
        alpha = picture.mode in ("LA", "RGBA")
    with path.open("rb") as file:
        start = file.read(26)
    # Bytes 24 and 25 of a PNG: bits per channel, and which channels. Pillow keeps 16 bits of grey alone.
    if start.startswith(b"\x89PNG") and start[24] == 16 and start[25] != 0:
        raise FileError.of(path, "8 bits per channel in a PNG with colours or alpha (TIFF keeps 16)", "16 bits")
    channel = (Axis("channel", "channels"),) if array.ndim == 3 else ()
    return Loaded(array, (Axis("space", "y"), Axis("space", "x"), *channel), alpha)


class _Complaints(logging.Handler):
    """What tifffile logs at errors that it passes over: a lost description, frames of files that are not there."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.levelno >= logging.ERROR or "Missing data are zeroed" in message:
            self.messages.append(message)


def _load_tiff(path: Path, labels: bool) -> Loaded:
    complaints, logger = _Complaints(), logging.getLogger("tifffile")
    logger.addHandler(complaints)
    try:
        loaded = _load_tiff_as_it_is(path)
    finally:
        logger.removeHandler(complaints)
    if complaints.messages:
        raise ValueError(complaints.messages[0])
    return loaded


def _load_tiff_as_it_is(path: Path) -> Loaded:
    with tifffile.TiffFile(path) as tiff:
        if len(tiff.series) != 1:
            sizes = ", ".join(" x ".join(map(str, series.shape)) for series in tiff.series[:4])
            raise FileError.of(path, "one image", f"{len(tiff.series)} of sizes {sizes}")
        series = tiff.series[0]
        steps = _ome_steps(tiff.ome_metadata) if tiff.is_ome else _imagej_steps(tiff) if tiff.is_imagej else {}
        axes = (
            Axis(TIFF_KINDS.get(a, "other"), a if a not in "QI" else "(no name)", steps.get(a)) for a in series.axes
        )
        alpha = any(sample in (1, 2) for sample in series.keyframe.extrasamples)
        return Loaded(series.asarray(), tuple(axes), alpha)


def _ome_steps(xml: str | None) -> dict[str, float | None]:
    """PhysicalSizeX, Y and Z of the first image; the unit is micrometres where none is given."""
    pixels = ElementTree.fromstring(xml or "").find("{*}Image/{*}Pixels")
    sizes = {} if pixels is None else pixels.attrib
    units = {a: sizes.get(f"PhysicalSize{a}Unit", "µm") for a in "XYZ"}
    return {a: step_of(sizes.get(f"PhysicalSize{a}"), MICROMETRES.get(units[a])) for a in "XYZ"}


def _imagej_steps(tiff: tifffile.TiffFile) -> dict[str, float | None]:
    """Pixels per unit in the resolution tags of the first page, planes in `spacing`, one unit for all."""
    metadata = tiff.imagej_metadata or {}
    factor = MICROMETRES.get(str(metadata.get("unit", "")).replace("\\u00B5", "µ"))
    tags = tiff.pages.first.tags
    rates = {a: tags[f"{a}Resolution"].value for a in "XY" if f"{a}Resolution" in tags}
    steps = {a: step_of(units / pixels, factor) for a, (pixels, units) in rates.items() if pixels}
    return {**steps, "Z": step_of(metadata.get("spacing"), factor)}


def _load_nifti(path: Path, labels: bool) -> Loaded:
    array, axes = open_nifti(path)
    return Loaded(np.asanyarray(array), axes)


def open_nifti(path: Path) -> tuple[Any, tuple[Axis, ...]]:
    """The array, of which only what is asked for is read, and its axes."""
    image: Any = nibabel.load(path)
    length, time = image.header.get_xyzt_units()
    # str() finds the shortest decimal that is this 32-bit number: 0.1, not 0.10000000149.
    steps = [step_of(str(zoom), NIFTI_MILLIMETRES[length]) for zoom in image.header.get_zooms()[:3]]
    fourth = Axis("channel" if time == "unknown" else "time", "the fourth")
    axes = [
        *(Axis("space", a, step) for a, step in zip("xyz", steps, strict=False)),
        fourth,
        Axis("channel", "the fifth"),
    ]
    axes += [Axis("other", "the sixth or seventh")] * 2
    return image.dataobj, tuple(axes[: len(image.shape)])


def _load_zarr(path: Path, labels: bool) -> Loaded:
    array, axes, _ = open_zarr(path)
    return Loaded(np.asarray(array[...]), axes)


LOADERS: dict[str, Callable[[Path, bool], Loaded]] = {
    "PNG": _load_picture,
    "JPEG": _load_picture,
    "TIFF": _load_tiff,
    "Zarr": _load_zarr,
    "NIfTI": _load_nifti,
}
