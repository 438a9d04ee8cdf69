"""Every problem in a folder of images and labels is found before training, and named."""

import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tifffile
from files_for_tests import blobs, picture, saved
from segmentation.pairs import DataError, find_pairs, load_samples, number_of_classes, split
from skimage.measure import label

pytestmark = pytest.mark.training

NAMES = ("a", "b", "c")
METADATA = {"axes": "YX", "PhysicalSizeY": 0.5, "PhysicalSizeX": 0.25}


class Folders:
    """A folder of images and one of labels; every pair is in order until something is done to it."""

    def __init__(self, root: Path) -> None:
        self.images, self.labels = root / "images", root / "labels"
        self.images.mkdir()
        self.labels.mkdir()
        for seed, name in enumerate(NAMES):
            saved(self.images / f"{name}.png", picture(seed))
            saved(self.labels / f"{name}.png", blobs(seed))

    def load(self, **keywords) -> list:
        return load_samples(self.images, self.labels, **{"spatial_dims": 2, "task": "semantic", **keywords})

    def problems(self, **keywords) -> list[str]:
        with pytest.raises(DataError) as caught:
            self.load(**keywords)
        return caught.value.problems


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path)


def the_one(problems: list[str], *words: str) -> None:
    """There is one problem, and it says this."""
    assert len(problems) == 1, problems
    for word in words:
        assert word in problems[0], problems


class TestPairing:
    @pytest.mark.parametrize(
        "behind", ["", "_mask", "_masks", "_label", "-labels", "_seg", ".gt", "_cp_masks", "_Mask"]
    )
    def test_names_of_labels(self, folders, behind):
        for path in sorted(folders.labels.iterdir()):
            path.rename(path.with_stem(path.stem + behind))
        pairs = find_pairs(folders.images, folders.labels)
        assert [name for name, _, _ in pairs] == list(NAMES)
        assert [path.name for _, path, _ in pairs] == [f"{name}.png" for name in NAMES]
        assert [path.name for _, _, path in pairs] == [f"{name}{behind}.png" for name in NAMES]

    def test_formats_may_differ(self, folders):
        (folders.labels / "b.png").unlink()
        saved(folders.labels / "b.ome.tif", blobs(1))
        assert [s.name for s in folders.load()] == list(NAMES)

    def test_an_image_may_be_called_mask(self, folders):
        for folder in (folders.images, folders.labels):
            shutil.copy(folder / "a.png", folder / "a_mask.png")
        assert [name for name, _, _ in find_pairs(folders.images, folders.labels)] == ["a", "a_mask", "b", "c"]

    def test_fewer_labels_than_images(self, folders):
        (folders.labels / "a.png").unlink()
        (folders.labels / "c.png").unlink()
        folder = folders.images
        assert folders.problems() == [
            f"{folders.labels}: expected labels of 3 images; found none for 2 of them",
            *(
                f"{folder / name}.png: expected labels named {name} or {name}_mask in {folders.labels}; found none"
                for name in "ac"
            ),
        ]

    def test_labels_without_an_image(self, folders):
        (folders.images / "b.png").unlink()
        the_one(folders.problems(), str(folders.labels / "b.png"), f"expected an image named b in {folders.images}")

    def test_a_suffix_that_cannot_be_read(self, folders):
        (folders.labels / "b.png").rename(folders.labels / "b.bmp")
        problems = [problem for problem in folders.problems() if "b.png" in problem]
        the_one(problems, "b.png: expected labels named b", "found b.bmp, whose suffix is none of")

    def test_two_files_of_one_name(self, folders):
        saved(folders.images / "a.tif", picture(0))
        saved(folders.labels / "b_mask.png", blobs(1))
        first, second = folders.problems()
        assert "a.png: expected one image; found also a.tif" in first
        assert "b.png: expected one file of labels of that image; found also b_mask.png" in second

    def test_nothing_fits_together(self, folders):
        for path in sorted(folders.labels.iterdir()):
            path.rename(path.with_stem("x" + path.stem))
        (folders.labels / "notes.txt").touch()
        the_one(
            folders.problems(), "with _mask, _label, _seg", ".nii.gz",
            f"3 files in {folders.images} (a.png, b.png, c.png", "(xa.png, xb.png, xc.png", "1 .txt",
        )  # fmt: skip

    def test_folders_that_are_none(self, folders, tmp_path):
        with pytest.raises(DataError, match="nowhere: expected a folder; found none"):
            find_pairs(folders.images, tmp_path / "nowhere")
        with pytest.raises(DataError, match="expected images and labels in two folders; found one for both"):
            find_pairs(folders.images, folders.images)

    def test_other_files_are_passed_over(self, folders):
        for name in (".DS_Store", "._a.png", "LICENSE", "notes.txt"):
            (folders.images / name).touch()
        assert len(folders.load()) == 3


class TestGoodFolders:
    def test_samples(self, folders):
        samples = folders.load()
        for seed, sample in enumerate(samples):
            assert np.array_equal(sample.image, picture(seed)[None])
            assert sample.image.dtype == np.uint8
            assert np.array_equal(sample.labels, blobs(seed))
            assert sample.labels.dtype == np.int32
            assert sample.spacing == (1.0, 1.0)
        assert number_of_classes(samples) == 3

    def test_instances_are_numbered_anew(self, folders):
        saved(folders.labels / "b.png", blobs(1).astype(np.uint16) * 300)
        for sample in folders.load(task="instances"):
            assert np.unique(sample.labels).tolist() == [0, 1, 2]

    def test_spacing_of_the_file_or_the_given_one(self, folders):
        for seed, name in enumerate(NAMES):
            (folders.images / f"{name}.png").unlink()
            saved(folders.images / f"{name}.ome.tif", picture(seed), metadata=METADATA)
        assert {s.spacing for s in folders.load()} == {(0.5, 0.25)}
        assert {s.spacing for s in folders.load(spacing=(2, 3))} == {(2.0, 3.0)}

    def test_spacing_of_the_labels_where_the_image_has_none(self, folders):
        for seed, name in enumerate(NAMES):
            (folders.labels / f"{name}.png").unlink()
            saved(folders.labels / f"{name}.ome.tif", blobs(seed), metadata=METADATA)
        assert {s.spacing for s in folders.load()} == {(0.5, 0.25)}

    def test_an_empty_label_file_among_others(self, folders):
        saved(folders.labels / "b.png", np.zeros((24, 32), np.uint8))
        assert not folders.load()[1].labels.any()
        assert not folders.load(task="instances")[1].labels.any()


def rewrite(
    folder: str, array: Callable[[], np.ndarray], suffix: str = ".png", **keywords
) -> Callable[[Folders], None]:
    """Put another array into the file of pair b."""

    def change(folders: Folders) -> None:
        path = getattr(folders, folder) / "b.png"
        path.unlink()
        saved(path.with_suffix(suffix), array(), **keywords)

    return change


def with_value(value: float) -> Callable[[], np.ndarray]:
    def array() -> np.ndarray:
        image = picture(1).astype(np.float32)
        image[3, 4:6] = value
        return image

    return array


def truncate(folders: Folders) -> None:
    path = folders.images / "b.png"
    path.write_bytes(path.read_bytes()[:200])


# What is done to pair b, which of its files is named, and what is said.
BAD = {
    "truncated": (truncate, "images/b.png", "expected a complete PNG file"),
    "size": (rewrite("labels", lambda: blobs(1, (24, 30))), "labels/b.png", "of their image, 24 x 32; found 24 x 30"),
    "transposed": (rewrite("labels", lambda: blobs(1).T), "labels/b.png", "32 x 24 (the labels' axes are in the rev"),
    "channels": (
        rewrite("images", lambda: picture(1, (24, 32, 3))), "images/b.png",
        "expected 1 channel, as 2 of 3 images have; found 3 channels",
    ),
    "colours": (rewrite("labels", lambda: picture(1, (24, 32, 3))), "labels/b.png", "3 channels that differ"),
    "fractions": (rewrite("labels", lambda: blobs(1) / 2, ".tif"), "labels/b.tif", "found 100 values that are not"),
    "nan": (rewrite("images", with_value(np.nan), ".tif"), "images/b.tif", "found 2 of 768 that are NaN or infinite"),
    "infinite": (rewrite("images", with_value(np.inf), ".tif"), "images/b.tif", "expected finite numbers; found 2"),
    "constant": (rewrite("images", lambda: picture(1) * 0 + 7), "images/b.png", "an image; found 7 at every pixel"),
    "copy": (rewrite("images", lambda: picture(0)), "images/b.png", "an image of its own; found the pixels of a.png"),
    "spacing": (
        rewrite("images", lambda: picture(1), ".ome.tif", metadata=METADATA), "images/a.png",
        "expected a spacing, as 1 of 3 files have; found none in the file: give one for all files",
    ),
}  # fmt: skip


class TestBadFolders:
    @pytest.mark.parametrize("case", BAD)
    def test_a_bad_pair_is_named(self, folders, case):
        change, path, message = BAD[case]
        change(folders)
        problems = [p for p in folders.problems(num_classes=3) if path in p]
        the_one(problems, message)
        # Nothing is said of a file that is in order.
        assert not [p for p in folders.problems(num_classes=3) if "c.png:" in p and case != "spacing"]

    def test_all_problems_come_at_once(self, folders):
        saved(folders.images / "d.png", picture(3))
        truncate(folders)
        saved(folders.labels / "b.png", picture(1, (24, 32, 3)))
        saved(folders.labels / "a.png", blobs(0, (20, 32)))
        saved(folders.images / "c.png", picture(1) * 0)
        with pytest.raises(DataError, match=r"^6 problems with the data:\n- ") as caught:
            folders.load()
        assert all(
            any(name in p for p in caught.value.problems) for name in ("images/b", "labels/b", "labels/a", "images/c")
        )

    def test_a_long_list_is_cut(self, tmp_path):
        (tmp_path / "images").mkdir()
        (tmp_path / "labels").mkdir()
        for i in range(23):
            for folder in ("images", "labels"):
                (tmp_path / folder / f"{i:02}.png").touch()
        with pytest.raises(DataError, match=r"46 problems with the data:\n(- .*\n){20}\.\.\. and 26 more$") as caught:
            load_samples(tmp_path / "images", tmp_path / "labels", spatial_dims=2, task="semantic")
        assert len(caught.value.problems) == 46

    @pytest.mark.parametrize("num_classes", [2, None])
    def test_masks_of_0_and_255(self, folders, num_classes):
        for seed, name in enumerate(NAMES):
            saved(folders.labels / f"{name}.png", (blobs(seed) > 0).astype(np.uint8) * 255)
        problems = folders.problems(num_classes=num_classes)
        assert len(problems) == (1 if num_classes is None else 3)
        assert all("a mask of 0 and 255; divide it by 255 to have classes 0 and 1" in p for p in problems)

    @pytest.mark.parametrize("num_classes", [3, None])
    def test_shades_of_grey(self, folders, num_classes):
        for seed, name in enumerate(NAMES):
            saved(folders.labels / f"{name}.png", np.array([0, 127, 255], np.uint8)[blobs(seed)])
        assert "map them, such as 0 -> 0, 127 -> 1, 255 -> 2" in folders.problems(num_classes=num_classes)[0]

    def test_values_out_of_range(self, folders):
        labels = blobs(1)
        labels[0, :5] = 9
        saved(folders.labels / "b.png", labels)
        the_one(folders.problems(num_classes=3), "labels/b.png: expected labels 0 to 2; found 9 at 5 of 768 pixels")
        the_one(
            folders.problems(),
            "labels/b.png: expected classes 0, 1, 2, ... without gaps",
            "found 0, 1, 2, 9 in all files",
        )

    def test_negative_labels(self, folders):
        rewrite("labels", lambda: blobs(1).astype(np.int16) - 1, ".tif")(folders)
        the_one(folders.problems(num_classes=3), "labels/b.tif: expected labels 0 to 2; found -1 at ")
        the_one(folders.problems(), "labels/b.tif: expected labels from 0; found -1")
        the_one(folders.problems(task="instances"), "labels/b.tif: expected labels from 0; found -1")

    def test_instances_in_place_of_classes(self, folders):
        for seed, name in enumerate(NAMES):
            numbered = np.arange(768).reshape(24, 32) // 4 % (20 + seed)
            saved(folders.labels / f"{name}.png", numbered.astype(np.uint8))
        the_one(
            folders.problems(), "labels/c.png", "(22 values)", "these look like instances, numbered anew in every file"
        )
        assert len(folders.load(num_classes=22)) == 3
        # As many in every file may well be classes.
        for seed, name in enumerate(NAMES):
            saved(folders.labels / f"{name}.png", ((np.arange(768).reshape(24, 32) + seed) % 20).astype(np.uint8))
        assert number_of_classes(folders.load()) == 20

    @pytest.mark.parametrize("value", [0, 1])
    def test_one_label_everywhere(self, folders, value):
        for name in NAMES:
            saved(folders.labels / f"{name}.png", np.full((24, 32), value, np.uint8))
        for task in ("semantic", "instances"):
            the_one(folders.problems(task=task), f"expected two labels at least; found {value} everywhere in all files")

    def test_classes_in_place_of_instances(self, folders):
        for masks, number in ((True, "1 number"), (False, "2 numbers")):
            for seed, name in enumerate(NAMES):
                labels = np.tile(blobs(seed), (2, 2))
                saved(folders.images / f"{name}.png", picture(seed, labels.shape))
                saved(folders.labels / f"{name}.png", (labels > 0).astype(np.uint8) if masks else labels)
            problems = folders.problems(task="instances")
            the_one(problems, f"separate ones with {number}, and others alike", "skimage.measure.label")
        for name in NAMES:
            saved(folders.labels / f"{name}.png", label(labels).astype(np.uint8))
        assert len(folders.load(task="instances")) == 3

    def test_masks_of_0_and_255_in_place_of_instances(self, folders):
        saved(folders.labels / "b.png", (blobs(1) > 0).astype(np.uint8) * 255)
        the_one(
            folders.problems(task="instances"),
            "labels/b.png: expected a number for every object; found a mask of 0 and",
        )

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"spatial_dims": 1}, ValueError, "spatial_dims must be one of 2, 3; got 1"),
            ({"task": "panoptic"}, ValueError, "task must be one of 'semantic', 'instances'"),
            ({"num_classes": 1}, ValueError, "num_classes must be at least 2; got 1"),
            ({"num_classes": 3, "task": "instances"}, ValueError, "num_classes must be None for instances; got 3"),
            ({"spacing": (1.0, 0.0)}, ValueError, "spacing"),
            ({"spacing": (1.0,)}, ValueError, "spacing must have one value for each of the 2 axes"),
        ],
    )
    def test_arguments(self, folders, arguments, error, message):
        with pytest.raises(error, match=message):
            folders.load(**arguments)


class TestVolumes:
    SHAPE = (6, 24, 32)

    def write(self, root: Path, suffix: str, affines: tuple = (None, None), **keywords) -> None:
        for folder, make, affine in zip(("images", "labels"), (picture, blobs), affines, strict=True):
            (root / folder).mkdir()
            for seed, name in enumerate(NAMES):
                array, path = make(seed, self.SHAPE), root / folder / f"{name}{suffix}"
                if affine is None:
                    saved(path, array, **keywords)
                else:
                    nibabel.save(nibabel.Nifti1Image(array, affine), path)

    def load(self, root: Path, **keywords) -> list:
        return load_samples(root / "images", root / "labels", spatial_dims=3, task="semantic", **keywords)

    def test_volumes_need_a_spacing(self, tmp_path):
        self.write(tmp_path, ".tif")
        with pytest.raises(DataError, match="expected a spacing, that volumes need; found none in the file") as caught:
            self.load(tmp_path)
        assert len(caught.value.problems) == 3
        assert self.load(tmp_path, spacing=(3, 1, 1))[0].spacing == (3.0, 1.0, 1.0)

    def test_spacing_of_nifti(self, tmp_path):
        self.write(tmp_path, ".nii.gz", (np.diag([3, 0.5, 0.7, 1]),) * 2)
        assert {s.spacing for s in self.load(tmp_path)} == {(3.0, 0.5, 0.7)}

    def test_spacing_of_labels_differs(self, tmp_path):
        self.write(tmp_path, ".nii.gz", (np.diag([3, 0.5, 0.7, 1]), np.diag([3, 0.5, 0.8, 1])))
        with pytest.raises(
            DataError, match=r"labels.*: expected the spacing of its image, 3 x 0\.5 x 0\.7; found 3 x 0\.5 x 0"
        ):
            self.load(tmp_path)

    def test_mirrored_labels(self, tmp_path):
        self.write(tmp_path, ".nii.gz", (np.eye(4), np.diag([-1, 1, 1, 1])))
        with pytest.raises(
            DataError, match="expected the orientation of its image, RAS; found LAS: bring both into one"
        ):
            self.load(tmp_path)

    def test_a_volume_among_planes(self, tmp_path):
        self.write(tmp_path, ".tif")
        for folder, make in (("images", picture), ("labels", blobs)):
            tifffile.imwrite(tmp_path / folder / "b.tif", make(1))
        with pytest.raises(DataError, match=r"images/b\.tif: expected 3 axes of space; found Y 24, X 32"):
            self.load(tmp_path, spacing=1.0)


class TestSplit:
    @pytest.mark.parametrize(
        ("count", "fraction", "expected"), [(10, 0.2, 2), (7, 0.2, 1), (2, 0.01, 1), (2, 1.0, 1), (9, 0.5, 4)]
    )
    def test_every_sample_is_on_one_side(self, count, fraction, expected):
        samples = list(range(count))
        train, validation = split(samples, fraction, 0)
        assert len(validation) == expected
        assert sorted(train + validation) == samples
        assert train == sorted(train)
        assert (train, validation) == split(samples, fraction, 0)

    def test_the_seed_decides(self):
        assert len({tuple(split(list(range(10)), 0.2, seed)[1]) for seed in range(20)}) > 5

    def test_too_few(self):
        with pytest.raises(ValueError, match="samples must be at least 2"):
            split([0], 0.2, 0)
        with pytest.raises(ValueError, match="fraction must be"):
            split([0, 1], 0.0, 0)
