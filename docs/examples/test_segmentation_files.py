"""Broken files are named with what is wrong; what is written is read; channels come first and space keeps its order."""

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile
import zarr
from files_for_tests import COLOURS, PLANE, VOLUME, saved
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from segmentation.axes import MICROMETRES, Axis, Loaded, arrange
from segmentation.formats import list_files, stem_of
from segmentation.readers import FileError, read_image, read_labels
from segmentation.writers import write_labels

pytestmark = pytest.mark.training

FILES = {
    "a.png": lambda path: saved(path, np.random.default_rng(0).integers(0, 255, (60, 60)).astype(np.uint8)),
    "a.tif": lambda path: saved(path, PLANE),
    "b.tif": lambda path: saved(path, PLANE, compression="zlib"),
    "a.ome.tif": lambda path: saved(path, PLANE, ome=True),
    "a.nii": lambda path: saved(path, PLANE),
    "a.nii.gz": lambda path: saved(path, PLANE),
    "a.jpg": lambda path: saved(path, np.random.default_rng(0).integers(0, 255, (60, 60)).astype(np.uint8)),
}


class TestBrokenFiles:
    @pytest.mark.parametrize("name", FILES)
    def test_empty(self, tmp_path, name):
        (tmp_path / name).touch()
        with pytest.raises(FileError, match=rf"{name}: expected a .* file; found an empty file"):
            read_image(tmp_path / name, 2)

    @pytest.mark.parametrize("name", FILES)
    @pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
    def test_truncated(self, tmp_path, name, share):
        whole = FILES[name](tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(FileError, match=rf"{name}: expected a complete .* file; found what cannot be read"):
            read_image(tmp_path / name, 2)

    @pytest.mark.parametrize("name", [name for name in FILES if name != "a.nii"])
    def test_other_content(self, tmp_path, name):
        (tmp_path / name).write_bytes(b"no image at all, but enough bytes to be one")
        with pytest.raises(FileError, match=rf"{name}: expected the content of a .* file, as its suffix says"):
            read_image(tmp_path / name, 2)

    def test_a_suffix_that_lies(self, tmp_path):
        saved(tmp_path / "a.png", COLOURS).rename(tmp_path / "a.tif")
        with pytest.raises(FileError, match="expected the content of a TIFF file, as its suffix says; found PNG"):
            read_image(tmp_path / "a.tif", 2)
        (tmp_path / "b.nii").write_bytes(gzip.compress(b"a" * 400))
        with pytest.raises(FileError, match="expected the content of a NIfTI file, as its suffix says; found gzip"):
            read_image(tmp_path / "b.nii", 2)

    def test_pointer_in_place_of_a_file(self, tmp_path):
        (tmp_path / "a.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        with pytest.raises(FileError, match="found Git LFS pointer"):
            read_image(tmp_path / "a.png", 2)

    def test_what_is_no_file(self, tmp_path):
        (tmp_path / "a.png").mkdir()
        (tmp_path / "a.zarr").touch()
        for name, message in {
            "a.png": "expected a file; found a directory",
            "a.zarr": "expected a directory; found a file",
            "b.tif": "expected a file; found nothing of that name",
            "a.bmp": r"expected one of .*\.png.*; found suffix '\.bmp'",
        }.items():
            with pytest.raises(FileError, match=f"{name}: {message}"):
                read_image(tmp_path / name, 2)

    def test_a_file_that_may_not_be_opened(self, tmp_path, monkeypatch):
        path = saved(tmp_path / "a.png", COLOURS)

        def refuse(*_, **__):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", refuse)
        with pytest.raises(FileError, match=r"a\.png: expected a complete image file; found .*Permission denied"):
            read_image(path, 2)

    def test_complex_numbers(self, tmp_path):
        with pytest.raises(FileError, match="expected integers or real numbers; found type complex64"):
            read_image(saved(tmp_path / "a.nii", VOLUME.astype(np.complex64)), 3)


class TestArrange:
    @given(st.permutations([("space", "y", 4), ("space", "x", 5), ("channel", "c", 3), ("time", "t", 1)]))
    def test_channels_come_first_and_space_keeps_its_order(self, order):
        steps = {"y": 0.5, "x": 0.25}
        names = [name for _, name, _ in order]
        array = np.arange(60).reshape([n for _, _, n in order])
        axes = tuple(Axis(kind, name, steps.get(name)) for kind, name, _ in order)
        result, spacing = arrange(Path("a"), Loaded(array, axes), 2)
        spatial = [name for name in names if name in steps]
        assert spacing == tuple(steps[name] for name in spatial)
        assert np.array_equal(result, array.transpose([names.index(name) for name in ["t", "c", *spatial]])[0])

    def test_two_axes_of_channels(self):
        axes = tuple(
            Axis(kind, name) for kind, name in [("channel", "C"), ("space", "Y"), ("space", "X"), ("channel", "S")]
        )
        with pytest.raises(FileError, match="expected one axis of channels at the most; found C 2, Y 4, X 5, S 3"):
            arrange(Path("a"), Loaded(np.zeros((2, 4, 5, 3)), axes), 2)

    def test_axes_of_other_kinds(self):
        axes = (Axis("other", "H"), Axis("space", "Y"), Axis("space", "X"))
        with pytest.raises(FileError, match="expected axes of space and of channels; found axis 'H' of length 2"):
            arrange(Path("a"), Loaded(np.zeros((2, 4, 5)), axes), 2)

    def test_a_volume_is_no_picture(self):
        axes = tuple(Axis("space", name) for name in "zyx")
        with pytest.raises(FileError, match="expected 2 axes of space; found z 3, y 4, x 5"):
            arrange(Path("a"), Loaded(np.zeros((3, 4, 5)), axes), 2)


class TestWriting:
    @pytest.mark.parametrize("largest", [1, 255, 256, 70000])
    @pytest.mark.parametrize("shape", [(9, 13), (5, 9, 13)])
    @pytest.mark.parametrize("suffix", [".png", ".tif", ".ome.tif", ".nii", ".nii.gz", ".zarr", ".ome.zarr"])
    def test_what_is_written_is_read(self, tmp_path, suffix, shape, largest):
        if suffix == ".png" and (len(shape) == 3 or largest > 65535):
            with pytest.raises(FileError, match="expected labels of 2 axes up to 65535 for a PNG"):
                write_labels(tmp_path / "a.png", np.full(shape, largest), None)
            assert not list(tmp_path.iterdir())
            return
        labels = np.random.default_rng(0).integers(0, largest + 1, shape)
        labels.flat[0] = largest
        spacing = (0.3, 0.1, 0.7)[-len(shape) :]
        write_labels(tmp_path / f"a{suffix}", labels, spacing)
        again, found = read_labels(tmp_path / f"a{suffix}", len(shape))
        assert np.array_equal(again, labels)
        assert again.dtype == np.min_scalar_type(largest)
        assert found == (None if suffix == ".png" else spacing)
        assert [path.name for path in tmp_path.iterdir()] == [f"a{suffix}"]

    @pytest.mark.parametrize("suffix", [".tif", ".zarr"])
    def test_unknown_spacing_stays_unknown(self, tmp_path, suffix):
        write_labels(tmp_path / f"a{suffix}", PLANE, None)
        assert read_labels(tmp_path / f"a{suffix}", 2).spacing is None

    @pytest.mark.parametrize("suffix", [".png", ".tif", ".nii.gz", ".zarr"])
    def test_a_failure_leaves_what_was_there(self, tmp_path, suffix, monkeypatch):
        path = tmp_path / f"a{suffix}"
        write_labels(path, np.ones((4, 5), np.uint8), None)
        full = OSError(28, "No space left on device")

        def fail(*_, **__):
            raise full

        for place, name in (
            (Image.Image, "save"),
            (tifffile, "imwrite"),
            (nibabel, "save"),
            (zarr.Group, "create_array"),
        ):
            monkeypatch.setattr(place, name, fail)
        with pytest.raises(OSError, match="No space left"):
            write_labels(path, np.zeros((4, 5), np.uint8), None)
        assert (read_labels(path, 2).array == 1).all()
        assert [p.name for p in tmp_path.iterdir()] == [path.name]

    @pytest.mark.parametrize("suffix", [".png", ".zarr"])
    def test_writing_again_replaces(self, tmp_path, suffix):
        for value in (1, 2):
            write_labels(tmp_path / f"a{suffix}", np.full((4, 5), value), None)
        assert (read_labels(tmp_path / f"a{suffix}", 2).array == 2).all()

    def test_labels_lie_where_their_image_lies(self, tmp_path):
        affine = np.array([[0, -0.5, 0, 10], [0.7, 0, 0, -20], [0, 0, 3, 30], [0, 0, 0, 1.0]])
        nibabel.save(nibabel.Nifti1Image(VOLUME.astype(np.float32), affine), tmp_path / "image.nii.gz")
        write_labels(tmp_path / "a.nii.gz", VOLUME % 3, (0.7, 0.5, 3.0), like=tmp_path / "image.nii.gz")
        written = nibabel.load(tmp_path / "a.nii.gz")
        assert np.allclose(written.affine, affine)
        assert written.get_data_dtype() == np.uint8
        assert np.array_equal(read_labels(tmp_path / "a.nii.gz", 3).array, VOLUME % 3)

    @pytest.mark.parametrize("labels", [np.array([[-1, 0]]), np.array([[2**31, 0]]), np.array([[0.5, 0]])])
    def test_what_labels_cannot_be(self, tmp_path, labels):
        with pytest.raises(FileError, match="expected labels that are whole numbers from 0 to 2147483647; found"):
            write_labels(tmp_path / "a.tif", labels, None)

    @pytest.mark.parametrize("name", ["a.jpg", "a.txt"])
    def test_suffixes_that_keep_no_labels(self, tmp_path, name):
        with pytest.raises(FileError, match="expected a suffix of PNG, TIFF, NIfTI or OME-Zarr"):
            write_labels(tmp_path / name, PLANE, None)


def test_names(tmp_path):
    names = {"a.ome.tif": "a", "b.c.nii.gz": "b.c", "d.OME.ZARR": "d", "e.PNG": "e", "f.txt": "f"}
    assert {name: stem_of(Path(name)) for name in names} == names
    for name in (*names, ".hidden.png"):
        (tmp_path / name).touch()
    assert [path.name for path in list_files(tmp_path)] == ["a.ome.tif", "b.c.nii.gz", "d.OME.ZARR", "e.PNG"]


def test_both_letters_for_micro():
    assert MICROMETRES["\u00b5m"] == MICROMETRES["\u03bcm"] == 1.0
