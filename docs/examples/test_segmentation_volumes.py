"""Images that are read piece by piece give what is read at once."""

import gzip

import nibabel
import numpy as np
import pytest
import zarr
from files_for_tests import PLANE, VOLUME, ome_zarr, saved, space
from segmentation.axes import FileError
from segmentation.ome import Place
from segmentation.readers import read_image
from segmentation.volumes import open_volume, unpack

pytestmark = pytest.mark.training


def assembled(source):
    """All pieces in their places."""
    image, seen = np.zeros(source.shape, source.dtype), np.zeros(source.shape[1:], int)
    for window in source.pieces():
        image[(slice(None), *window)] = source.read(window)
        seen[window] += 1
    assert (seen == 1).all()
    return image


def channels_last(path):
    array = np.moveaxis(np.stack([VOLUME, VOLUME // 2]), 0, -1)
    axes = [*space("zyx", unit="micrometer"), {"name": "c", "type": "channel"}]
    return ome_zarr(path / "a.ome.zarr", array, axes, [2.0, 0.5, 0.5, 1.0])


def one_time_point(path):
    axes = [{"name": "t", "type": "time"}, *space("zyx", unit="nanometer")]
    return ome_zarr(path / "a.zarr", VOLUME[None], axes, [1.0, 40.0, 4.0, 4.0], version="0.4", outer=2)


def nifti(path):
    image = nibabel.Nifti1Image(VOLUME.astype(np.int16), np.diag([2.0, 0.1, 0.3, 1.0]))
    image.header.set_slope_inter(0.5, 3)
    nibabel.save(image, path / "a.nii")
    return path / "a.nii"


def nifti_with_channels(path):
    return saved(path / "a.nii", np.stack([VOLUME, VOLUME + 1], -1).astype(np.float32))


@pytest.mark.parametrize("make", [channels_last, one_time_point, nifti, nifti_with_channels])
def test_pieces_are_the_image(make, tmp_path, monkeypatch):
    monkeypatch.setattr("segmentation.volumes.PIECE", 100)
    path = make(tmp_path)
    whole, source = read_image(path, 3), open_volume(path, 3)
    assert np.array_equal(assembled(source), whole.array)
    assert (source.layout.spacing, source.dtype) == (whole.spacing, whole.array.dtype)
    window = slice(1, 4), slice(2, 3), slice(5, 13)
    assert np.array_equal(source.read(window), whole.array[(slice(None), *window)])


def test_planes_too(tmp_path):
    source = open_volume(ome_zarr(tmp_path / "a.zarr", PLANE, space("yx"), [0.5, 0.5]), 2)
    assert np.array_equal(assembled(source)[0], PLANE)


def test_places_are_kept_in_the_words_of_the_file(tmp_path):
    assert open_volume(one_time_point(tmp_path), 3).places[0] == Place("z", "nanometer", 80.0, 0.0)
    places = open_volume(nifti(tmp_path), 3).places
    assert [(place.name, place.unit, place.scale) for place in places] == [
        ("x", None, 2.0),
        ("y", None, 0.1),
        ("z", None, 0.3),
    ]


def test_a_place_in_the_scanner_is_kept_where_axes_are_the_scanners(tmp_path):
    affine = np.array([[2.0, 0, 0, -7], [0, 0.5, 0, 3], [0, 0, 1, 4], [0, 0, 0, 1]])
    for turned, expected in ((False, [-7, 3, 4]), (True, [0, 0, 0])):
        matrix = affine[[1, 0, 2, 3]] if turned else affine
        nibabel.save(nibabel.Nifti1Image(VOLUME.astype(np.int16), matrix), tmp_path / "a.nii")
        assert [place.translation for place in open_volume(tmp_path / "a.nii", 3).places] == expected


def test_other_images_are_recognised_and_damaged_places_are_not_compared(tmp_path):
    path = ome_zarr(tmp_path / "a.zarr", VOLUME, space("zyx"), [1.0] * 3)
    before = open_volume(path, 3).sample()
    zarr.open_array(path / "0", mode="r+")[:] += 1
    assert all(a != b for a, b in zip(before, open_volume(path, 3).sample(), strict=True))
    (path / "0" / "c" / "0" / "0" / "0").write_bytes(b"no chunk")
    assert open_volume(path, 3).sample() == [None] * len(before)


def test_unpacked_once(tmp_path):
    original = nifti(tmp_path)
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(original.read_bytes()))
    unpack(tmp_path / "b.nii.gz", tmp_path / "c.nii")
    assert (tmp_path / "c.nii").read_bytes() == original.read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(b"nothing of use")
    unpack(tmp_path / "b.nii.gz", tmp_path / "c.nii")


def test_damaged_compressed_files_leave_nothing(tmp_path):
    packed = gzip.compress(nifti(tmp_path).read_bytes())
    (tmp_path / "b.nii.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(FileError, match=r"b.nii.gz: expected a complete NIfTI file; found what cannot be read"):
        unpack(tmp_path / "b.nii.gz", tmp_path / "c.nii")
    assert not list(tmp_path.glob("*c.nii*"))


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.nii.gz"])
def test_other_formats_are_refused(name, tmp_path):
    path = saved(tmp_path / name, PLANE.astype(np.uint8) if name == "a.png" else PLANE)
    with pytest.raises(FileError, match="expected OME-Zarr or NIfTI that is not compressed"):
        open_volume(path, 2)


def test_a_cut_off_file_says_which_voxels(tmp_path):
    path = nifti(tmp_path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(
        FileError, match=r"a.nii: expected a whole file; found voxels \[0:5, 0:9, 12:13\] that cannot be read"
    ):
        open_volume(path, 3).read((slice(0, 5), slice(0, 9), slice(12, 13)))
