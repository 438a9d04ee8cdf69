"""A head cut into thirds, trained on, segmented and drawn."""

import nibabel
import numpy as np
import pytest
from brain_data import BRAINS, Brain
from brain_plot import across, around, extent, middle
from matplotlib.image import imread
from segment_brain import main, thirds, write
from segmentation.readers import read_image

pytestmark = pytest.mark.training

SPACING = (2.0, 1.0, 3.0)
ROTATED = np.array([[0, -1, 0, 5], [2, 0, 0, -7], [0, 0, 3, 11], [0, 0, 0, 1.0]])  # its columns have these lengths


@pytest.fixture
def small() -> Brain:
    image = np.random.default_rng(0).random((6, 11, 5)).astype(np.float32)
    return Brain(image, (image > 0.5).astype(np.uint8), ROTATED, ("dark", "bright"), "a threshold")


@pytest.mark.parametrize(
    ("name", "shape", "spacing"), [("mni152", (197, 233, 189), (1, 1, 1)), ("example4d", (128, 96, 24), (2, 2, 2.2))]
)
def test_volumes_come_with_labels_and_spacing(name: str, shape: tuple, spacing: tuple) -> None:
    brain = BRAINS[name]()
    assert brain.image.shape == brain.labels.shape == shape
    np.testing.assert_allclose(brain.spacing, spacing, rtol=1e-6)
    assert nibabel.aff2axcodes(brain.affine) == ("R", "A", "S")
    assert np.array_equal(np.unique(brain.labels), np.arange(len(brain.classes)))
    # The classes are of the tissue: brighter and brighter.
    means = [brain.image[brain.labels == c].mean() for c in range(len(brain.classes))]
    assert means == sorted(means)


def test_thirds_are_everything_once(small: Brain) -> None:
    seen = np.zeros(small.image.shape, int)
    for place in thirds(small).values():
        seen[place] += 1
    assert (seen == 1).all()


def test_files_keep_their_place_in_the_head(small: Brain, tmp_path) -> None:
    places = thirds(small)
    write(small, places, tmp_path)
    for name, place in places.items():
        volume = read_image(tmp_path / "images" / f"{name}.nii.gz", 3)
        np.testing.assert_allclose(volume.spacing, SPACING)
        np.testing.assert_array_equal(volume.array[0], small.image[place])
        affine = nibabel.load(tmp_path / "images" / f"{name}.nii.gz").affine
        first = [part.start or 0 for part in place]
        np.testing.assert_allclose(affine @ (0, 0, 0, 1), small.affine @ (*first, 1))


def test_slices_lie_as_the_head_does(small: Brain) -> None:
    assert np.array_equal(across(small.image, 0, 2)[4, 3], small.image[2, 3, 4])
    assert np.array_equal(across(small.image, 1, 2)[4, 3], small.image[3, 2, 4])
    assert np.array_equal(across(small.image, 2, 2)[4, 3], small.image[3, 4, 2])
    assert extent(1, small, None) == (0, 12, 0, 15)
    assert extent(1, small, (slice(1, 3), slice(0, 1), slice(2, 5))) == (2, 6, 6, 15)


def test_windows_stay_inside(small: Brain) -> None:
    for centre in ([0, 0, 0], [5, 10, 4], [3, 5, 2]):
        assert [s.stop - s.start for s in around(centre, small)] == [6, 11, 5]
    large = small._replace(image=np.zeros((100, 200, 50), np.float32))
    assert around([50, 190, 0], large) == (slice(32, 68), slice(128, 200), slice(0, 24))


def test_the_middle_is_that_of_what_is_labelled(small: Brain) -> None:
    labels = np.zeros((6, 11, 5), np.uint8)
    labels[1, 8, 2] = labels[3, 9, 3] = labels[4, 10, 4] = labels[0, 0, 0] = 1
    assert middle(labels, (slice(None), slice(7, 11), slice(None))) == [3, 9, 3]


def test_from_a_scan_to_a_picture(tmp_path, monkeypatch) -> None:
    scores = main(["--data", "example4d", "--out", str(tmp_path / "scan"), "--epochs", "1", "--steps", "2"])
    assert [len(row["Dice per class"]) for row in scores.values()] == [3, 3]
    assert min(scores["intensity alone"]["Dice per class"]) > 0.99  # the labels were made from it
    image, labels = (nibabel.load(tmp_path / "scan" / folder / "head.nii.gz") for folder in ("whole", "segmented"))
    assert labels.shape == image.shape == (128, 96, 24)
    np.testing.assert_allclose(labels.affine, image.affine)
    height, width, _ = imread(tmp_path / "scan" / "slices.png").shape
    assert width > height > 300
    with pytest.raises(SystemExit, match="another --out begins anew"):
        main(["--data", "example4d", "--out", str(tmp_path / "scan")])
