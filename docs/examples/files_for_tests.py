"""Small images, and files of them, that the tests of the training programs write."""

from pathlib import Path

import nibabel
import numpy as np
import tifffile
import zarr
from PIL import Image

PLANE = np.random.default_rng(0).integers(0, 60000, (9, 13)).astype(np.uint16)
VOLUME = np.random.default_rng(1).integers(0, 60000, (5, 9, 13)).astype(np.uint16)
COLOURS = np.random.default_rng(2).integers(0, 255, (9, 13, 3)).astype(np.uint8)


def saved(path: Path, array: np.ndarray, **keywords) -> Path:
    """A file in the format of the suffix."""
    if path.suffix in (".png", ".jpg"):
        Image.fromarray(array).save(path, **keywords)
    elif path.suffix == ".tif":
        tifffile.imwrite(path, array, **keywords)
    else:
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)
    return path


def ome_zarr(path: Path, array: np.ndarray, axes: list, scale: list, version: str = "0.5", outer: float = 1) -> Path:
    """Two resolutions, the finest first, as the specifications 0.4 and 0.5 say."""

    def scaled(by: int) -> list[dict]:
        return [{"type": "scale", "scale": [step * by for step in scale]}]

    datasets = [{"path": str(i), "coordinateTransformations": scaled(2**i)} for i in (0, 1)]
    multiscales = [{"axes": axes, "datasets": datasets}]
    if outer != 1:
        multiscales[0]["coordinateTransformations"] = [{"type": "scale", "scale": [outer] * len(scale)}]
    old = version == "0.4"
    attributes = {"multiscales": multiscales} if old else {"ome": {"version": version, "multiscales": multiscales}}
    group = zarr.create_group(path, zarr_format=2 if old else 3, attributes=attributes)
    for i in (0, 1):
        group.create_array(str(i), data=array[(..., *[slice(None, None, 2**i)] * 2)])
    return path


def space(names: str, **more) -> list[dict]:
    return [{"name": name, "type": "space", **more} for name in names]


def picture(seed: int, shape: tuple[int, ...] = (24, 32)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, shape).astype(np.uint8)


def blobs(seed: int, shape: tuple[int, ...] = (24, 32)) -> np.ndarray:
    """Classes 0, 1 and 2, the last two in several pieces."""
    labels = np.zeros(shape, np.uint8)
    labels[2:8, 3:9] = labels[12:20, 4:12] = 1
    labels[5:15, 20:28] = 2
    return np.roll(labels, seed, -1)
