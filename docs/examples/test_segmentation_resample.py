"""Images that are brought to one spacing: what the network sees, and what comes back."""

from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from predict_segmentation import main as predict
from segmentation.checkpoint import read
from segmentation.crops import Crops
from segmentation.pairs import Sample
from segmentation.prediction import Predictor
from segmentation.resample import resize, resize_labels, size_at
from test_segmentation_training import QUICK, blobs
from torch import nn
from train_segmentation import main as train

pytestmark = pytest.mark.training

SIZES = st.lists(st.integers(1, 12), min_size=2, max_size=3)


@given(SIZES, st.data())
def test_what_varies_linearly_does_so_in_other_pixels(old: list[int], data: st.DataObject) -> None:
    new = [data.draw(st.integers(1, 12)) for _ in old]
    places = torch.stack(torch.meshgrid(*[(torch.arange(n) + 0.5) / n for n in old], indexing="ij"))
    wanted = torch.stack(torch.meshgrid(*[(torch.arange(n) + 0.5) / n for n in new], indexing="ij"))
    got = resize(places[None], new)[0]
    for axis, (o, n) in enumerate(zip(old, new, strict=True)):
        inside = (wanted[axis] > max(1 / o, 1 / n)) & (wanted[axis] < 1 - max(1 / o, 1 / n))
        # Averages of few pixels are not taken around exactly the place of the new one.
        assert ((got - wanted)[axis][inside].abs() <= (1e-6 if n >= o else 0.2 / n)).all()
    assert torch.equal(resize(places[None], old)[0], places)
    labels = np.arange(np.prod(old), dtype=np.int32).reshape(old)
    cells = np.ravel_multi_index([(w * o).long().numpy() for w, o in zip(wanted, old, strict=True)], old)
    assert np.mean(resize_labels(labels, new) != cells) <= 0.5  # ties lie on a border
    assert np.array_equal(resize_labels(labels, old), labels)


def test_fewer_pixels_are_averages() -> None:
    stripes = torch.tensor([0.0, 1.0]).repeat(20)[None, None, :, None, None].expand(1, 1, 40, 3, 2)
    assert (resize(stripes, (10, 3, 2))[:, :, 1:-1] - 0.5).abs().max() < 0.05


def test_sizes_at_a_spacing() -> None:
    assert size_at((10, 40), (4.0, 0.5), (1.0, 1.0)) == (40, 20)
    assert size_at((1, 3), (0.1, 1.0), (1.0, 1.0)) == (1, 3)


def test_crops_are_of_one_spacing() -> None:
    rng = np.random.default_rng(0)
    given = [
        Sample(str(step), rng.normal(size=(1, round(40 / step), 40)), np.ones((round(40 / step), 40), np.int32), step_)
        for step, step_ in ((1.0, (1.0, 1.0)), (4.0, (4.0, 1.0)))
    ]
    crops = Crops(given, (16, 16), 8, 0, augment=False, spacing=(1.0, 1.0))
    assert [piece.image.shape for piece in crops.pieces] == [(1, 40, 40)] * 2
    for item in crops:
        assert item["spacing"].tolist() == [1.0, 1.0]
        assert bool(item["valid"].all())


class Witness(nn.Module):
    """Remembers what it was shown; its logits are the image and its negative."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.seen: list[tuple[float, ...]] = []

    def forward(self, image: torch.Tensor, spacing: tuple[float, ...]) -> SimpleNamespace:
        self.seen.append((*image.shape[2:], *spacing))
        return SimpleNamespace(logits=torch.cat([-image, image], 1) * self.scale, assignments=())


def test_a_network_sees_one_spacing_and_labels_are_of_the_image() -> None:
    network = Witness()
    predictor = Predictor(network, "semantic", "float32", 10**6, (1.0, 1.0))
    image = np.zeros((1, 12, 30))
    image[:, 4:, 10:] = 1
    labels = predictor(image, (4.0, 0.5)).labels
    assert network.seen == [(48, 15, 1.0, 1.0)]
    assert np.array_equal(labels, image[0])
    assert predictor.logits(image.astype(np.float32), (4.0, 0.5)).shape == (2, 12, 30)


def test_tiles_are_as_large_as_the_network_can_see() -> None:
    network = Witness()
    image = np.random.default_rng(0).normal(size=(1, 60, 240)).cumsum(2)
    predictor = Predictor(network, "semantic", "float32", 1600, (1.0, 1.0))
    tiled = predictor(image, (4.0, 1.0)).labels
    assert len(network.seen) > 4
    assert all(800 < height * width <= 2000 for height, width, *_ in network.seen)
    whole = Predictor(network, "semantic", "float32", 10**6, (1.0, 1.0))(image, (4.0, 1.0)).labels
    assert np.mean(tiled == whole) > 0.99


def test_volumes_of_two_spacings(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for i, thick in enumerate((1, 1, 2)):
        for kind, array in zip(("images", "labels"), blobs((24, 26, 25), i), strict=True):
            array = (array > 0).astype(np.uint8) if kind == "labels" else array
            made = nibabel.Nifti1Image(array[::thick], np.diag([0.5 * thick, 0.5, 0.5, 1.0]))
            nibabel.save(made, folder / kind / f"head{i}.nii.gz")
    options = ["--images", str(folder / "images"), "--labels", str(folder / "labels"), *QUICK, "--resample"]
    train([*options, "--out", str(tmp_path / "out")])
    settings = read(tmp_path / "out" / "best.pt", ())["settings"]
    assert settings["resample"] is True
    assert settings["spacing"] == (0.5, 0.5, 0.5)
    best = ["--checkpoint", str(tmp_path / "out" / "best.pt"), "--device", "cpu"]
    written = predict([*best, "--images", str(folder / "images"), "--out", str(tmp_path / "predicted")])
    assert [nibabel.load(path).shape for path in written] == [(24, 26, 25), (24, 26, 25), (12, 26, 25)]
