"""Crops are reproducible whoever makes them, and physical sizes in them are those of the image."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segmentation.augment import LARGEST_RESCALE, Piece, cut, normalise, relight, turn
from segmentation.crops import Crops
from segmentation.intensities import CLIPPED
from segmentation.pairs import Sample
from torch.utils.data import DataLoader

pytestmark = pytest.mark.training

SEEDS = st.integers(0, 2**32 - 1)
SPACINGS = {2: (0.5, 0.2), 3: (2.0, 0.5, 0.3)}
SHAPES = {2: (40, 60), 3: (30, 40, 36)}


def ramps(shape: tuple[int, ...], spacing: tuple[float, ...]) -> Piece:
    """An image whose channels are the physical coordinates of its pixels; labels that are 1 in an ellipsoid."""
    ones = [1] * len(shape)
    indices = np.indices(shape)
    outwards = indices / (np.array(shape).reshape(-1, *ones) - 1) * 2 - 1
    inside = (outwards**2).sum(0) < 0.7**2
    return Piece((indices * np.reshape(spacing, (-1, *ones))).astype(np.float32), inside.astype(np.int32), spacing)


def samples(count: int, shape: tuple[int, ...] = (40, 50), seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 255, (count, 2, *shape)).astype(np.uint8)
    labels = rng.integers(0, 9, (count, *shape)).astype(np.int32)
    return [Sample(str(i), pictures[i], labels[i], (1.0, 1.0)) for i in range(count)]


def same(first: dict, second: dict) -> bool:
    return all(torch.equal(torch.as_tensor(first[key]), torch.as_tensor(second[key])) for key in first)


class TestReproducibility:
    def test_an_item_depends_on_seed_epoch_and_index_alone(self):
        data = samples(3)
        one, other = (Crops(data, (16, 16), 10, seed=4) for _ in range(2))
        for epoch in (0, 1):
            one.set_epoch(epoch)
            other.set_epoch(epoch)
            forward = [one[i] for i in range(10)]
            backward = [other[i] for i in reversed(range(10))][::-1]
            assert all(same(a, b) for a, b in zip(forward, backward, strict=True))

    def test_everything_else_changes_it(self):
        data = samples(3)
        crops, other = Crops(data, (16, 16), 10, seed=4), Crops(data, (16, 16), 10, seed=5)
        first = [crops[i] for i in range(10)]
        assert not any(same(a, b) for a, b in pairwise(first))
        assert not any(same(a, other[i]) for i, a in enumerate(first))
        crops.set_epoch(1)
        assert not any(same(a, crops[i]) for i, a in enumerate(first))

    @pytest.mark.parametrize("persistent", [False, True])
    def test_workers_change_nothing(self, persistent):
        """Also those that outlive an epoch see the next one."""
        data = samples(3)
        alone, shared = (Crops(data, (16, 16), 8, seed=4) for _ in range(2))
        loader = DataLoader(shared, batch_size=2, num_workers=2, persistent_workers=persistent)
        for epoch in (0, 1, 5):
            alone.set_epoch(epoch)
            shared.set_epoch(epoch)
            assert shared.epoch == epoch
            for expected, batch in zip(DataLoader(alone, batch_size=2), loader, strict=True):
                assert same(expected, batch)

    def test_every_sample_comes_once_before_any_comes_twice(self):
        crops = Crops(samples(5), (16, 16), 8, seed=0)
        visited = []
        for epoch in range(5):
            crops.set_epoch(epoch)
            visited += [crops[i]["sample"] for i in range(8)]
        rounds = [visited[i : i + 5] for i in range(0, 40, 5)]
        assert all(sorted(one) == [0, 1, 2, 3, 4] for one in rounds)
        assert len({tuple(one) for one in rounds}) > 3

    def test_labels_come_from_the_sample_that_is_said(self):
        data = [s._replace(labels=np.full_like(s.labels, i)) for i, s in enumerate(samples(4))]
        crops = Crops(data, (16, 16), 12, seed=0)
        assert all((crops[i]["labels"] == crops[i]["sample"]).all() for i in range(12))


class TestItems:
    @pytest.mark.parametrize("augment", [True, False])
    def test_types(self, augment):
        item = Crops(samples(1), (16, 20), 4, seed=0, augment=augment)[0]
        assert (item["image"].dtype, item["image"].shape) == (torch.float32, (2, 16, 20))
        assert (item["labels"].dtype, item["labels"].shape) == (torch.int64, (16, 20))
        assert (item["spacing"].dtype, item["spacing"].shape) == (torch.float32, (2,))
        assert (item["valid"].dtype, item["valid"].shape) == (torch.bool, (16, 20))

    def test_without_augmentation_a_crop_is_a_part_of_the_image(self):
        (sample,) = samples(1)
        whole, places = normalise(sample.image), set()
        for item in (Crops([sample], (16, 20), 40, seed=0, augment=False)[i] for i in range(40)):
            windows = whole.unfold(1, 16, 1).unfold(2, 20, 1)
            (place,) = (windows == item["image"][:, None, None]).all(-1).all(-1).all(0).nonzero().tolist()
            places.add(tuple(place))
            top, left = place
            assert np.array_equal(item["labels"], sample.labels[top : top + 16, left : left + 20])
            assert item["spacing"].tolist() == [1.0, 1.0]
        assert len(places) > 30

    @pytest.mark.parametrize("augment", [True, False])
    def test_what_is_missing_lies_at_the_end_and_is_not_valid(self, augment):
        data = [s._replace(labels=s.labels + 1) for s in samples(1, (10, 50))]
        for item in (Crops(data, (24, 24), 20, seed=0, augment=augment)[i] for i in range(20)):
            valid = item["valid"]
            rows, columns = valid.any(1).sum(), valid.any(0).sum()
            assert valid[:rows, :columns].all()
            assert valid.sum() == rows * columns
            assert min(rows, columns) <= math.ceil(10 * LARGEST_RESCALE)
            assert torch.equal(item["labels"] > 0, valid)
            assert (item["image"][:, ~valid] == 0).all()
            if not augment:
                assert (rows, columns) == (10, 24)

    def test_an_image_that_fits_is_valid_everywhere(self):
        crops = Crops(samples(1, (40, 40)), (16, 16), 20, seed=0)
        assert all(crops[i]["valid"].all() for i in range(20))

    @pytest.mark.parametrize("augment", [True, False])
    def test_instances_are_numbered_in_every_crop(self, augment):
        data = [s._replace(labels=s.labels * 100) for s in samples(1)]
        crops = Crops(data, (3, 3), 30, seed=0, augment=augment, task="instances")
        for i in range(30):
            found = crops[i]["labels"].unique().tolist()
            assert found[0] in (0, 1)
            assert found == list(range(found[0], found[0] + len(found)))
        classes = Crops(data, (3, 3), 30, seed=0, augment=augment)
        assert all((classes[i]["labels"] % 100 == 0).all() for i in range(30))
        assert any(crops[i]["labels"].unique().numel() == classes[i]["labels"].unique().numel() > 2 for i in range(30))

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"samples": []}, ValueError, "samples must be at least one"),
            ({"size": (16,)}, ValueError, "size must have 2 ints"),
            ({"size": (16, 0)}, ValueError, r"size\[1\] must be at least 1"),
            ({"length": 0}, ValueError, "length must be at least 1"),
            ({"seed": -1}, ValueError, "seed must be at least 0"),
            ({"task": "panoptic"}, ValueError, "task must be one of"),
        ],
    )
    def test_arguments(self, change, error, message):
        with pytest.raises(error, match=message):
            Crops(**{"samples": samples(1), "size": (16, 16), "length": 4, "seed": 0, **change})

    def test_places_that_there_are_none(self):
        crops = Crops(samples(1), (16, 16), 4, seed=0)
        assert len(crops) == 4
        for index in (-1, 4):
            with pytest.raises(IndexError, match=r"index must be in 0 \.\. 3"):
                crops[index]
        with pytest.raises(ValueError, match="epoch must be at least 0"):
            crops.set_epoch(-1)


@pytest.mark.parametrize("dims", [2, 3])
class TestGeometry:
    @given(seed=SEEDS, rescale=st.booleans())
    @settings(max_examples=30, deadline=None)
    def test_a_step_in_a_crop_is_its_spacing(self, dims, seed, rescale):
        source = ramps(SHAPES[dims], SPACINGS[dims])
        piece = cut(source, [n // 2 for n in SHAPES[dims]], np.random.default_rng(seed), rescale)
        for axis in range(dims):
            steps = np.diff(piece.image[axis], axis=axis)
            assert np.allclose(steps, piece.spacing[axis], rtol=1e-3)
            others = [a for a in range(dims) if a != axis]
            assert all(np.allclose(np.diff(piece.image[axis], axis=a), 0, atol=1e-5) for a in others)
        factors = np.array(source.spacing) / piece.spacing
        assert np.allclose(factors, factors[0], rtol=1e-12)
        assert 1 / LARGEST_RESCALE <= factors[0] <= LARGEST_RESCALE
        assert rescale or piece.spacing == source.spacing

    @given(seed=SEEDS)
    @settings(max_examples=30, deadline=None)
    def test_an_object_keeps_its_physical_size(self, dims, seed):
        """Pixels times their size, of an object that lies in the crop as a whole."""
        source = ramps(SHAPES[dims], SPACINGS[dims])
        room = [math.ceil(n * LARGEST_RESCALE) for n in SHAPES[dims]]
        piece = cut(source, room, np.random.default_rng(seed), rescale=True)
        volumes = [p.labels.sum() * math.prod(p.spacing) for p in (source, piece)]
        extents = [(np.ptp(np.nonzero(p.labels), axis=1) + 1) * p.spacing for p in (source, piece)]
        # Its surface is known to half a pixel on either side, in both.
        uncertain = np.array(source.spacing) + piece.spacing
        assert (abs(extents[0] - extents[1]) <= uncertain).all()
        assert volumes[1] == pytest.approx(volumes[0], rel=(uncertain / extents[0]).sum())

    @given(seed=SEEDS)
    @settings(max_examples=30, deadline=None)
    def test_labels_are_never_mixed(self, dims, seed):
        source = ramps(SHAPES[dims], SPACINGS[dims])
        source = source._replace(labels=source.labels * 100 + 7)
        piece = cut(source, SHAPES[dims], np.random.default_rng(seed), rescale=True)
        assert set(np.unique(piece.labels)) == {7, 107}

    @given(seed=SEEDS)
    @settings(max_examples=30, deadline=None)
    def test_image_and_labels_stay_together(self, dims, seed):
        source = ramps(SHAPES[dims], SPACINGS[dims])
        source = source._replace(image=source.labels[None].astype(np.float32))
        rng = np.random.default_rng(seed)
        size = [n // 2 for n in SHAPES[dims]]
        piece = turn(cut(source, size, rng, rescale=True), size, rng)
        # Linear between two pixels and the nearer one of them are at most half a label apart, in dims steps.
        assert (abs(piece.image[0] - piece.labels) < 1 - 0.5**dims + 1e-5).all()

    @given(seed=SEEDS)
    @settings(max_examples=30, deadline=None)
    def test_spacing_goes_with_its_axis(self, dims, seed):
        """Where the axes are alike but for rounding, the one that a step of the image tells is the one that is said."""
        spacing = (1.0, 1.0 + 5e-4, 1.0 - 5e-4)[:dims]
        shape = (12,) * dims
        piece = turn(ramps(shape, spacing), shape, np.random.default_rng(seed))
        for axis in range(dims):
            steps = np.stack([np.diff(channel, axis=axis).mean() for channel in piece.image])
            assert abs(steps).max() == pytest.approx(piece.spacing[axis], abs=1e-5)
            assert sorted(abs(steps))[-2] < 1e-5

    @given(seed=SEEDS)
    @settings(max_examples=30, deadline=None)
    def test_axes_that_differ_are_not_exchanged(self, dims, seed):
        for spacing, shape in ((SPACINGS[dims], (12,) * dims), ((1.0,) * dims, SHAPES[dims])):
            source = ramps(shape, spacing)
            piece = turn(source, shape, np.random.default_rng(seed))
            assert piece.labels.shape == shape
            assert piece.spacing == spacing
            for axis in range(dims):
                assert np.allclose(abs(np.diff(piece.image[axis], axis=axis)), spacing[axis], atol=1e-5)

    def test_every_turn_and_mirror_image_is_as_likely(self, dims):
        shape, rng = (2,) * dims, np.random.default_rng(0)
        labels = np.arange(2**dims, dtype=np.int32).reshape(shape)
        source = Piece(labels[None].astype(np.float32), labels, (1.0,) * dims)
        count = 2**dims * math.factorial(dims)
        found = Counter(turn(source, shape, rng).labels.tobytes() for _ in range(100 * count))
        assert len(found) == count
        assert min(found.values()) > 50
        assert max(found.values()) < 150


class TestLight:
    @given(seed=SEEDS)
    @settings(max_examples=30, deadline=None)
    def test_darker_stays_darker_but_for_noise(self, seed):
        image = np.linspace(-2, 2, 4000, dtype=np.float32).reshape(1, 40, 100)
        lit = relight(image, np.random.default_rng(seed))
        assert lit.dtype == np.float32
        assert np.isfinite(lit).all()
        means = lit.reshape(20, 200).mean(1)
        assert (np.diff(means) > 0).all()
        assert abs(lit - image).max() < 2

    def test_an_image_of_one_value(self):
        assert np.isfinite(relight(np.zeros((1, 8, 8), np.float32), np.random.default_rng(0))).all()


class TestNormalise:
    IMAGE = np.random.default_rng(0).gamma(2, 30, (3, 40, 50))

    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32, np.float64])
    def test_mean_and_deviation(self, dtype):
        result = normalise(self.IMAGE.clip(0, 250).astype(dtype))
        assert result.dtype == torch.float32
        assert torch.allclose(result.mean((1, 2)), torch.zeros(3), atol=1e-5)
        assert torch.allclose(result.std((1, 2), correction=0), torch.ones(3), atol=1e-5)

    @given(gain=st.floats(1e-3, 1e6), offset=st.floats(-1e3, 1e3))
    def test_the_unit_of_the_image_does_not_matter(self, gain, offset):
        assert torch.allclose(normalise(self.IMAGE * gain + offset), normalise(self.IMAGE), atol=1e-4)

    def test_hot_and_dead_pixels_do_not_matter(self):
        image = np.random.default_rng(0).gamma(2, 30, (1, 200, 200))
        hot = image.copy()
        few = int(CLIPPED / 100 * image.size) // 2
        hot[0, 0, :few] = 1e9
        hot[0, 0, few : 2 * few] = -1e9
        usual = torch.from_numpy(image[:, 1:] < np.percentile(image, 99.5))
        assert torch.allclose(normalise(hot)[:, 1:][usual], normalise(image)[:, 1:][usual], atol=0.05)
        assert normalise(hot).abs().max() < 10

    def test_a_small_object_in_the_dark_stays_bright(self):
        """A quarter of a percent of the image: cutting off half a percent at either end would erase it."""
        image = np.random.default_rng(0).normal(5, 1, (1, 200, 200))
        image[0, :10, :10] += 100
        result = normalise(image)[0]
        assert result[:10, :10].mean() > 10 * result[10:].std()

    def test_one_value_becomes_zero(self):
        image = self.IMAGE.copy()
        image[1] = 0.1
        result = normalise(image)
        assert (result[1] == 0).all()
        assert torch.allclose(result[0], normalise(self.IMAGE)[0])

    def test_tensors_are_images_too(self):
        assert torch.equal(normalise(torch.from_numpy(self.IMAGE)), normalise(self.IMAGE))
