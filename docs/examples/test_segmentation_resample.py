"""Images that are brought to one spacing: what the network sees, and what comes back."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st
from predict_segmentation import main as predict
from segment_volume import main as segment_volume
from segmentation import prediction
from segmentation.checkpoint import read
from segmentation.crops import Crops
from segmentation.pairs import Sample
from segmentation.prediction import Predictor, tile_of
from segmentation.resample import resize, resize_labels, size_at
from segmentation.settings import Settings, complete
from spatial_grouping_attention.models import GroupingViT
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
    # The pixel in which the centre lies; the one behind it where that is a border.
    centres = [[(2 * k + 1) * o // (2 * n) for k in range(n)] for o, n in zip(old, new, strict=True)]
    assert np.array_equal(resize_labels(labels, new), np.ravel_multi_index(np.ix_(*map(np.array, centres)), old))
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


@given(SIZES, st.data())
def test_the_network_never_sees_more_than_is_allowed(size: list[int], data: st.DataObject) -> None:
    own, seen = (tuple(data.draw(st.floats(0.1, 10)) for _ in size) for _ in range(2))
    size = [9 * n for n in size]
    tile = tile_of(size, own, 1000, seen)
    assert all(1 <= t <= n for t, n in zip(tile, size, strict=True))
    assert np.prod(size_at(tile, own, seen)) <= 1000 or np.prod(tile) == 1
    assert tile_of(size, own, 1000, own) == tile_of(size, own, 1000, None)


def test_tiles_give_what_the_whole_gives() -> None:
    network = Witness()
    image = np.random.default_rng(0).normal(size=(1, 60, 240)).cumsum(2)
    tiled = Predictor(network, "semantic", "float32", 1600, (1.0, 1.0))(image, (4.0, 1.0)).labels
    assert len(network.seen) > 4
    assert all(800 < height * width <= 1600 for height, width, *_ in network.seen)
    whole = Predictor(network, "semantic", "float32", 10**6, (1.0, 1.0))(image, (4.0, 1.0)).labels
    assert np.mean(tiled == whole) > 0.99


def test_objects_are_numbered_as_they_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    found = torch.zeros(40, 8, dtype=torch.int64)
    found[2:8], found[12], found[20:30] = 1, 2, 3  # the second is lower than a pixel of the image
    monkeypatch.setattr(prediction, "panoptic_segments", lambda *_, **__: [SimpleNamespace(instances=found)])
    predictor = Predictor(Witness(), "instances", "float32", 10**6, (1.0, 1.0))
    labels = predictor(np.zeros((1, 10, 8)), (4.0, 1.0)).labels
    assert np.unique(labels).tolist() == [0, 1, 2]


def test_crops_are_no_longer_than_resampled_images() -> None:
    samples = [Sample(str(n), np.zeros((1, n, 64, 64)), np.ones((n, 64, 64), np.int32), (s, 1.0, 1.0)) for n, s in
               ((24, 1.0), (24, 1.0), (24, 1.0), (6, 4.0), (6, 4.0), (6, 4.0))]  # fmt: skip
    settings = complete({"resample": True}, samples)
    assert settings.spacing == (2.5, 1.0, 1.0)
    assert settings.crop == (10, 48, 48)


def test_a_checkpoint_of_before_is_not_resampled() -> None:
    samples = [Sample("0", np.zeros((1, 32, 32)), np.ones((32, 32), np.int32), (1.0, 1.0))]
    data = complete({}, samples).as_data()
    del data["resample"]
    assert Settings.from_data(data).seen_spacing is None


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, ...]]:
    """The sizes and spacings that any network of ours is shown from now on, and whether it trains."""
    shown: list[tuple[float, ...]] = []
    forward = GroupingViT.forward

    def watched(self: GroupingViT, image: torch.Tensor, spacing: Any, *rest: Any) -> Any:
        if not self.training:
            shown.append((*image.shape[2:], *spacing))
        return forward(self, image, spacing, *rest)

    monkeypatch.setattr(GroupingViT, "forward", watched)
    return shown


@pytest.mark.slow
def test_volumes_of_two_spacings(tmp_path: Path, seen: list[tuple[float, ...]]) -> None:
    """Wherever a network looks: at validation, for pictures, in a folder of images, and in one larger than memory."""
    folder = tmp_path / "set"
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for i, thick in enumerate((1, 1, 2)):
        for kind, array in zip(("images", "labels"), blobs((24, 26, 25), i), strict=True):
            array = (array > 0).astype(np.uint8) if kind == "labels" else array
            made = nibabel.Nifti1Image(array[::thick], np.diag([0.5 * thick, 0.5, 0.5, 1.0]))
            nibabel.save(made, folder / kind / f"head{i}.nii")
    options = ["--images", str(folder / "images"), "--labels", str(folder / "labels"), *QUICK, "--resample"]
    train([*options, "--out", str(tmp_path / "out")])
    settings = read(tmp_path / "out" / "best.pt", ())["settings"]
    assert settings["resample"] is True
    assert settings["spacing"] == (0.5, 0.5, 0.5)
    assert {shown[3:] for shown in seen} == {(0.5, 0.5, 0.5)}
    seen.clear()
    best = ["--checkpoint", str(tmp_path / "out" / "best.pt"), "--device", "cpu"]
    written = predict([*best, "--images", str(folder / "images"), "--out", str(tmp_path / "predicted")])
    assert [nibabel.load(path).shape for path in written] == [(24, 26, 25), (24, 26, 25), (12, 26, 25)]
    assert seen == [(24, 26, 25, 0.5, 0.5, 0.5)] * 3
    # Where the weights of a network are the first that there were, classes differ from place to place.
    thick = folder / "images" / "head2.nii"
    job = segment_volume([*best, "--image", str(thick), "--out", str(tmp_path / "big.ome.zarr"), "--workers", "1"])
    assert job.blocks == 1
    big = zarr.open_array(tmp_path / "big.ome.zarr" / "0", mode="r")[...]
    assert np.array_equal(big, np.asarray(nibabel.load(written[2]).dataobj))
