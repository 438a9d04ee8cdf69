"""Images that are read piece by piece: OME-Zarr, and NIfTI that is not compressed."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import math
import shutil
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
import zarr
from numpy.typing import NDArray

from segmentation.axes import Axis, FileError, Layout, describe, layout
from segmentation.blocks import Window
from segmentation.checkpoint import remove_leftovers, replacing
from segmentation.formats import checked_format, suffix_of
from segmentation.ome import Place, open_zarr
from segmentation.readers import open_nifti

PIECE = 2**20  # voxels that are read at once to be counted, where chunks are not larger
SAMPLES, SAMPLE = 8, 16  # places that are compared, and voxels along their axes
UNITS = {"micron": "micrometer", "mm": "millimeter", "meter": "meter", "unknown": None}


class Source(NamedTuple):
    """An image that is not in memory."""

    path: Path
    array: Any
    """As the library opens it; what is asked for is read, and nothing else."""
    dtype: np.dtype
    """Of what :meth:`read` gives."""
    layout: Layout
    places: list[Place]
    """Of the axes of space, as in the file."""
    chunks: tuple[int, ...]
    """Voxels that are read together at the least, per axis of space."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, then sizes."""
        channels = 1 if self.layout.channel is None else self.array.shape[self.layout.channel]
        return channels, *(self.array.shape[axis] for axis in self.layout.space)

    def read(self, window: Window) -> NDArray:
        """A part (channels, *window).

        Raises:
            FileError: it cannot be read; names the files of OME-Zarr that are at fault.
        """
        try:
            return self._take(window)
        except Exception as error:  # what a library throws at a broken file is none of its contract
            raise self._complaint(window, error) from error

    def _take(self, window: Window) -> NDArray:
        array = np.asarray(self.array[self._index(window)])
        return self.layout.apply(array).astype(array.dtype.newbyteorder("="), copy=False)

    def _index(self, window: Window) -> Window:
        index = [slice(None)] * len(self.array.shape)
        for axis, part in zip(self.layout.space, window, strict=True):
            index[axis] = part
        return tuple(index)

    def _complaint(self, window: Window, error: Exception) -> FileError:
        part = ", ".join(f"{w.start}:{w.stop}" for w in window)
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if not isinstance(self.array, zarr.Array):
            return FileError.of(self.path, "a whole file", f"voxels [{part}] that cannot be read ({reason})")
        damaged = ", ".join(self._damaged(window)) or "one that can be read now"
        return FileError.of(self.path, f"whole chunks at [{part}]", f"{damaged} ({reason})")

    def _damaged(self, window: Window) -> Iterator[str]:
        """Files of chunks within a window that cannot be read by themselves."""
        chunks = self.array.shards or self.array.chunks
        ranges = [
            range((part.start or 0) // chunk, -(-min(n, n if part.stop is None else part.stop) // chunk))
            for part, chunk, n in zip(self._index(window), chunks, self.array.shape, strict=True)
        ]
        for place in itertools.product(*ranges):
            try:
                self.array[tuple(slice(k * c, (k + 1) * c) for k, c in zip(place, chunks, strict=True))]
            except Exception:
                yield f"{self.array.path}/{self.array.metadata.encode_chunk_key(place)}".lstrip("/")

    def pieces(self) -> Iterator[Window]:
        """Whole chunks, about :data:`PIECE` voxels in each piece, which are all voxels together."""
        size = self.shape[1:]
        piece = list(self.chunks)
        for axis in reversed(range(len(size))):
            room = PIECE // (math.prod(piece) * self.shape[0])
            piece[axis] *= max(1, min(room, -(-size[axis] // piece[axis])))
        starts = (range(0, n, p) for n, p in zip(size, piece, strict=True))
        for corner in itertools.product(*starts):
            yield tuple(slice(c, min(c + p, n)) for c, p, n in zip(corner, piece, size, strict=True))

    def sample(self) -> list[str | None]:
        """Sums over the contents of some places, by which another image is recognised; None where it is damaged."""
        sums: list[str | None] = []
        for k in range(SAMPLES):
            corners = (max(0, min(n * (2 * k + 1) // (2 * SAMPLES), n - SAMPLE)) for n in self.shape[1:])
            try:
                part = self.read(tuple(slice(c, c + SAMPLE) for c in corners))
            except FileError:
                sums.append(None)
            else:
                sums.append(hashlib.sha256(np.ascontiguousarray(part).tobytes()).hexdigest())
        return sums


def open_volume(path: Path, spatial_dims: int) -> Source:
    """Open an image of OME-Zarr 0.4 or 0.5 (the finest resolution) or NIfTI.

    Raises:
        FileError: another format, a compressed NIfTI, and whatever is wrong with the file.
    """
    kind = checked_format(path)
    if kind not in ("Zarr", "NIfTI") or is_compressed(path):
        raise FileError.of(path, "OME-Zarr or NIfTI that is not compressed", f"the suffix {suffix_of(path)}")
    try:
        array, dtype, axes, places, chunks = _open_zarr(path) if kind == "Zarr" else _open_nifti(path)
    except FileError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise FileError.of(path, f"a complete {kind} file", f"what cannot be read ({reason})") from error
    if dtype.kind not in "buif" or dtype.itemsize > 8:
        raise FileError.of(path, "integers or real numbers of up to 64 bits", f"type {dtype}")
    if not math.prod(array.shape):
        raise FileError.of(path, "at least one voxel", describe(axes, array.shape))
    found = layout(path, axes, array.shape, spatial_dims)
    space = found.space
    return Source(path, array, dtype, found, [places[axis] for axis in space], tuple(chunks[axis] for axis in space))


Opened = tuple[Any, np.dtype, tuple[Axis, ...], list[Place], Sequence[int]]


def _open_zarr(path: Path) -> Opened:
    array, axes, places = open_zarr(path)
    return array, array.dtype.newbyteorder("="), axes, places, array.chunks


def _open_nifti(path: Path) -> Opened:
    """Its first axis is together in the file. The origin is kept where the axes are those of the scanner."""
    array, axes = open_nifti(path)
    image: Any = nibabel.load(path)
    unit = UNITS[image.header.get_xyzt_units()[0]]
    affine = image.affine
    straight = np.array_equal(affine[:3, :3], np.diag(np.diag(affine)[:3])) and (np.diag(affine) > 0).all()
    origin = affine[:3, 3].tolist() if straight else [0.0] * 3
    # str() finds the shortest decimal that is this 32-bit number: 0.1, not 0.10000000149.
    steps = [float(str(zoom)) for zoom in image.header.get_zooms()]
    places = [Place(name, unit, *rest) for name, *rest in zip("xyz", steps, origin, strict=False)]
    places += [Place(axis.name) for axis in axes[3:]]
    # With scaling, what is read is of another type than the file.
    dtype = np.asarray(array[(slice(0, 1),) * len(array.shape)]).dtype.newbyteorder("=")
    return array, dtype, axes, places, (array.shape[0], *[1] * (len(array.shape) - 1))


def is_compressed(path: Path) -> bool:
    """Whether it must be unpacked before parts of it can be read."""
    return suffix_of(path).lower() == ".nii.gz"


def unpack(path: Path, target: Path) -> None:
    """Write the contents of a compressed NIfTI; a file of that name is always a whole one.

    Raises:
        FileError: it is damaged. An OSError where the disk is full.
    """
    if target.exists():
        return
    checked_format(path)
    remove_leftovers(target)
    with replacing(target) as file, gzip.open(path) as packed:
        try:
            shutil.copyfileobj(packed, file, 2**20)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise FileError.of(path, "a complete NIfTI file", f"what cannot be read ({error})") from error
