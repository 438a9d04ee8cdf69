"""Labels into files, so that a file of that name is always a whole one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from segmentation.axes import FileError
from segmentation.formats import FORMATS, suffix_of
from segmentation.ome import Place, create_group


def write_labels(path: Path, labels: NDArray, spacing: Sequence[float] | None, *, like: Path | None = None) -> None:
    """Write labels in the format of the suffix, in the smallest type of unsigned integers that holds them.

    Everything is written beside ``path`` under a hidden name that then takes its place: a full disk or a kill leaves
    what was there before.

    Args:
        path: PNG (2-D, at most 65535), TIFF (written as OME-TIFF), NIfTI or OME-Zarr (0.5).
        labels: integers (*size), none below zero.
        spacing: distance between neighbours per axis, in the unit of the format (micrometres; NIfTI millimetres);
            None where it is unknown. A PNG has no place for it.
        like: the image that the labels belong to. A NIfTI takes its place in the scanner (the affine) from it, so
            that viewers lay both over each other.

    Raises:
        FileError: on a suffix that keeps no labels, and on labels that the format cannot keep.
    """
    kind = FORMATS.get(suffix_of(path).lower())
    write = {"PNG": _png, "TIFF": _tiff, "Zarr": _zarr, "NIfTI": _nifti, "gzip": _nifti}.get(kind or "")
    if write is None:
        raise FileError.of(path, "a suffix of PNG, TIFF, NIfTI or OME-Zarr", f"{''.join(path.suffixes)!r}")
    largest = int(labels.max(initial=0))
    if labels.dtype.kind not in "iu" or labels.min(initial=0) < 0 or largest > np.iinfo(np.int32).max:
        found = f"{labels.dtype} from {labels.min()} to {labels.max()}"
        raise FileError.of(path, "labels that are whole numbers from 0 to 2147483647", found)
    partial = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        write(partial, path, labels.astype(np.min_scalar_type(largest)), spacing, like)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(partial, path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)


def _png(partial: Path, path: Path, labels: NDArray, spacing: Any, like: Path | None) -> None:
    if labels.ndim != 2 or labels.dtype.itemsize > 2:
        found = f"{labels.ndim} axes, values up to {labels.max()}"
        raise FileError.of(path, "labels of 2 axes up to 65535 for a PNG (TIFF keeps others)", found)
    Image.fromarray(labels).save(partial)


def _tiff(partial: Path, path: Path, labels: NDArray, spacing: Any, like: Path | None) -> None:
    axes = "ZYX"[-labels.ndim :]
    metadata: dict[str, Any] = {"axes": axes}
    for axis, step in zip(axes, spacing or (), strict=False):
        metadata |= {f"PhysicalSize{axis}": step, f"PhysicalSize{axis}Unit": "µm"}
    tifffile.imwrite(partial, labels, ome=True, photometric="minisblack", compression="zlib", metadata=metadata)


def _nifti(partial: Path, path: Path, labels: NDArray, spacing: Any, like: Path | None) -> None:
    if like is not None and FORMATS.get(suffix_of(like).lower()) in ("NIfTI", "gzip"):
        original: Any = nibabel.load(like)
        image = nibabel.Nifti1Image(labels, original.affine, original.header)
        image.set_data_dtype(labels.dtype)
    else:
        steps = tuple(spacing or (1.0,) * labels.ndim)
        image = nibabel.Nifti1Image(labels, np.diag([*steps, *[1.0] * (4 - len(steps))]))
        image.header.set_xyzt_units("mm")
    nibabel.save(image, partial)


def _zarr(partial: Path, path: Path, labels: NDArray, spacing: Any, like: Path | None) -> None:
    unit = None if spacing is None else "micrometer"
    steps = spacing or (1.0,) * labels.ndim
    places = [Place(name, unit, step) for name, step in zip("zyx"[-labels.ndim :], steps, strict=True)]
    create_group(partial, places).create_array("0", data=labels)
