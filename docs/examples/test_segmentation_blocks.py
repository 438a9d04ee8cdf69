"""Tiles and blocks: a voxel has one owner, and blocks change nothing but what is within a halo of their borders."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from segmentation.augment import normalise
from segmentation.blocks import Blocks, Row, grow, tile_shape
from segmentation.intensities import Intensities, Search, count, from_keys, to_keys
from segmentation.prediction import Predictor, bell, blend
from torch import nn

pytestmark = pytest.mark.training

sizes = st.lists(st.integers(1, 40), min_size=1, max_size=2) | st.lists(st.integers(1, 9), min_size=3, max_size=3)


@st.composite
def cuts(draw):
    """A volume, tiles and blocks of any size."""
    size = tuple(draw(sizes))
    tile = tuple(draw(st.integers(min(n, 4), n)) for n in size)
    return Blocks(size, tile, tuple(draw(st.integers(1, 5)) for _ in size))


@given(cuts())
def test_every_voxel_has_one_owner_and_is_seen_by_a_tile_of_the_owner(blocks):
    owners, seen = np.zeros(blocks.size, int), np.zeros(blocks.size, bool)
    for block in (blocks[i] for i in range(len(blocks))):
        owners[block.owned] += 1
        for tile in block.tiles:
            assert [w.stop - w.start for w in tile.window] == list(blocks.tile)
            for w, u, around, n in zip(tile.window, tile.used, block.window, blocks.size, strict=True):
                assert 0 <= around.start <= w.start <= u.start < u.stop <= w.stop <= around.stop <= n
            seen[tile.used] = True
    assert (owners == 1).all()
    assert seen.all()


@given(cuts())
def test_no_tile_is_seen_twice_unless_two_stand_at_the_end_of_an_axis(blocks):
    for row in blocks.rows:
        starts = [span.start for block in range(row.blocks) for span in row.spans(block)]
        assert len(set(starts)) >= len(starts) - 1
        assert row.tiles <= math.ceil(row.length / row.stride)


@given(st.integers(8, 400), st.integers(8, 64))
def test_tiles_overlap_by_a_quarter(length, tile):
    row = Row(length, min(length, tile), 1)
    if row.tile < length:
        assert 2 * row.halo == pytest.approx(row.tile / 4, abs=1)
        assert row.stride == row.tile - 2 * row.halo


@given(cuts())
def test_blocks_fill_whole_files_of_the_output(blocks):
    for i in range(len(blocks)):
        for own, extent, n in zip(blocks[i].owned, blocks.extent, blocks.size, strict=True):
            assert own.start % extent == 0
            assert own.stop == min(own.start + extent, n)


class Lookaround(nn.Module):
    """A network whose logits depend on all that a tile contains, in float64."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, image, spacing):
        axes = tuple(range(2, image.ndim))
        image = image.double()
        shifted = image.roll((1,) * len(axes), axes) * spacing[0]
        places = sum(
            torch.arange(n).sin().view(-1, *[1] * (image.ndim - axis - 1)) for axis, n in enumerate(image.shape)
        )
        logits = torch.cat([image - image.mean(axes, keepdim=True), shifted, 0.3 * places + 0 * image], 1)
        return SimpleNamespace(logits=logits * self.scale, assignments=())


def labels_in(blocks, image):
    predictor = Predictor(Lookaround(), "semantic", "float32", 1)
    spacing = (0.7, *[1.0] * (len(blocks.size) - 1))
    labels = np.full(blocks.size, 255, np.uint8)
    for block in (blocks[i] for i in range(len(blocks))):
        labels[block.owned] = blend(
            lambda window: predictor.logits(image[(0, slice(None), *window)].numpy(), spacing), block
        )
    return labels


def far_from_borders(blocks):
    """Voxels that are at least a halo away from every border between blocks."""
    far = np.ones(blocks.size, bool)
    for axis, row in enumerate(blocks.rows):
        for border in range(1, row.blocks):
            at = border * row.per_block * row.stride
            far[(slice(None),) * axis + (slice(max(0, at - row.halo), at + row.halo),)] = False
    return far


@pytest.mark.parametrize(
    ("size", "tile"),
    [
        ((61, 45), (16, 16)), ((100,), (24,)), ((47, 90), (47, 24)), ((33, 34), (16, 5)), ((25, 97), (24, 40)),
        ((20, 41, 37), (8, 16, 16)), ((9, 30, 31), (3, 16, 16)), ((5, 7, 100), (5, 7, 16)), ((15, 15), (15, 15)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("per_block", [1, 2, 3])
def test_far_from_borders_blocks_change_nothing(size, tile, per_block):
    image = torch.randn(1, 1, *size, generator=torch.Generator().manual_seed(0))
    blocks = Blocks(size, tile, (per_block,) * len(size))
    whole, cut = labels_in(Blocks.single(size, tile), image), labels_in(blocks, image)
    far = far_from_borders(blocks)
    assert np.array_equal(whole[far], cut[far])
    assert set(np.unique(whole)) == {0, 1, 2}
    if per_block == 1 and whole.size > 2000 and len(blocks) > 1:
        assert (whole != cut).any()  # close to them they do


def test_weights_are_those_of_monai():
    from monai.data.utils import compute_importance_map

    for tile in ((17,), (16, 9), (8, 5, 24)):
        assert torch.allclose(bell(tile), compute_importance_map(tile, mode="gaussian"), rtol=1e-5)


class TestTileShape:
    @given(
        st.lists(st.integers(1, 300), min_size=2, max_size=3), st.lists(st.floats(0.1, 5), min_size=3, max_size=3),
        st.integers(1, 10**5),
    )  # fmt: skip
    @example([1, 2], [1.0, 0.25, 1.0], 1)  # one axis would be shorter than a voxel, the other longer than the volume
    def test_tiles_are_not_larger_than_allowed(self, size, spacing, largest):
        tile = tile_shape(size, spacing[: len(size)], largest)
        assert math.prod(tile) <= largest
        assert all(1 <= t <= n for t, n in zip(tile, size, strict=True))
        assert tile == tuple(size) or math.prod(size) > largest

    def test_as_long_in_all_directions(self):
        assert tile_shape((10**6,) * 3, (1.0, 1.0, 1.0), 64**3) == (64, 64, 64)
        assert tile_shape((10**6,) * 3, (4.0, 1.0, 1.0), 64**3) == (24, 96, 96)
        assert tile_shape((10**6,) * 2, (2.0, 1.0), 20000) == (96, 200)

    def test_what_a_short_axis_leaves_goes_to_the_others(self):
        assert tile_shape((10, 10**6, 10**6), (1.0, 1.0, 1.0), 10 * 128 * 128) == (10, 128, 128)
        assert tile_shape((10**6, 10**6), (1000.0, 1.0), 128) == (1, 128)

    def test_not_larger_than_so_many_must_be(self):
        assert tile_shape((300, 300), (1.0, 1.0), 256 * 256) == (200, 200)
        assert tile_shape((257, 256), (1.0, 1.0), 256 * 256) == (176, 256)


def test_blocks_grow_where_they_are_short_until_they_fit_no_more():
    def fits(blocks):
        return math.prod(blocks.extent) <= 10**5

    blocks = grow((1000, 1000, 50), (16, 16, 16), (3.0, 1.0, 1.0), fits)
    assert blocks.grid[2] == 1
    assert blocks.per_block[1] > 2 * blocks.per_block[0]
    assert 5 * 10**4 < math.prod(blocks.extent) <= 10**5
    assert grow((1000, 1000), (400, 400), (1.0, 1.0), fits).per_block == (1, 1)
    assert grow((1000, 1000), (500, 500), (1.0, 1.0), fits) is None


class TestIntensities:
    """Passes over pieces find what is found of the whole."""

    @staticmethod
    def in_pieces(image, pieces):
        search = Search(image.dtype, len(image), image[0].size)
        parts = np.array_split(image.reshape(len(image), -1), pieces, axis=1)
        return search.run([count(part, question) for part in parts] for question in search.questions())

    @pytest.mark.parametrize("pieces", [1, 7])
    @pytest.mark.parametrize(
        "dtype",
        ["bool", "uint8", "int8", "uint16", "int16", "int32", "uint32", "uint64", "float16", "float32", "float64"],
    )
    @pytest.mark.parametrize("shape", [(2, 40, 50), (1, 3), (1, 1)])
    def test_equal_to_those_of_the_whole(self, dtype, shape, pieces):
        values = np.random.default_rng(0).standard_t(2, size=shape) * 30
        values[0, 0] = 7
        image = (
            (values > 0).astype(bool)
            if dtype == "bool"
            else np.abs(values).astype(dtype)
            if "u" in dtype
            else values.astype(dtype)
        )
        whole, found = Intensities.of(image), self.in_pieces(image, pieces)
        assert (found.low, found.high) == (whole.low, whole.high)
        assert np.allclose(found.mean, whole.mean, rtol=1e-12, atol=1e-15)
        assert np.allclose(found.deviation, whole.deviation, rtol=1e-10, atol=1e-15)
        assert np.allclose(found.apply(image), normalise(image), rtol=1e-6, atol=1e-7)

    def test_a_constant_has_no_contrast(self):
        image = np.full((1, 5, 400), 0.1, np.float32)
        found = self.in_pieces(image, 3)
        assert found.deviation == [0.0]
        assert not found.apply(image).any()

    def test_small_contrast_far_from_zero(self):
        # A value of 1e9 in float64 is known to 1e-7.
        image = (1e9 + np.random.default_rng(0).normal(size=(1, 5000))).astype(np.float64)
        assert self.in_pieces(image, 4).deviation == pytest.approx(Intensities.of(image).deviation, rel=1e-7)

    def test_what_is_no_number_is_counted(self):
        image = np.array([[1.0, np.nan, np.inf, 2.0]], np.float32)
        (tally,) = count(image, next(Search(image.dtype, 1, 4).questions()))
        assert tally.unreal == 2

    @given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=9))
    def test_keys_have_the_order_of_values(self, values):
        values = np.array(values, np.float32)
        keys = to_keys(values)
        assert np.array_equal(values[np.argsort(keys, kind="stable")], np.sort(values))
        assert np.array_equal(from_keys(keys.tolist(), values.dtype), values)
