"""Two real volumes that come with libraries: nothing is downloaded."""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import NamedTuple

import nibabel
import numpy as np
from nilearn import datasets
from numpy.typing import NDArray
from skimage.filters import threshold_multiotsu


class Brain(NamedTuple):
    """A volume (x, y, z), whose axes run to the right, to the front and up, with a class per voxel."""

    image: NDArray[np.float32]
    labels: NDArray[np.uint8]
    affine: NDArray[np.float64]
    """From voxels to millimetres."""
    classes: tuple[str, ...]
    label_source: str

    @property
    def spacing(self) -> tuple[float, ...]:
        """Of voxels along every axis, in millimetres."""
        return tuple(float(s) for s in nibabel.affines.voxel_sizes(self.affine))


def mni152() -> Brain:
    """The ICBM 152 template at 1 mm with its tissue maps (Fonov et al., NeuroImage 54, 2011), as nilearn ships it.

    A voxel belongs to the tissue of the highest probability; what is neither grey nor white matter is the rest.
    """
    image = datasets.load_mni152_template(resolution=1)
    grey, white = (
        np.asarray(tissue(resolution=1).dataobj)
        for tissue in (datasets.load_mni152_gm_template, datasets.load_mni152_wm_template)
    )
    labels = np.argmax([1 - grey - white, grey, white], axis=0).astype(np.uint8)
    pixels = np.asarray(image.dataobj, np.float32)
    return Brain(pixels, labels, image.affine, ("rest", "grey matter", "white matter"), "tissue maps of the template")


def example4d() -> Brain:
    """The first of the two volumes of nibabel's ``example4d.nii.gz``, voxels of 2 x 2 x 2.2 mm.

    Nobody has labelled it. The classes are multi-Otsu's of its own intensities (Liao et al., Journal of Information
    Science and Engineering 17, 2001): pseudo labels, which show that a program runs and not that a method is good.
    """
    with as_file(files("nibabel") / "tests" / "data" / "example4d.nii.gz") as path:
        image = nibabel.as_closest_canonical(nibabel.load(path))
        pixels = np.asarray(image.dataobj[..., 0], np.float32)
    labels = np.digitize(pixels, threshold_multiotsu(pixels, classes=3)).astype(np.uint8)
    return Brain(pixels, labels, image.affine, ("dark", "middle", "bright"), "pseudo labels: multi-Otsu")


BRAINS = {"mni152": mni152, "example4d": example4d}
