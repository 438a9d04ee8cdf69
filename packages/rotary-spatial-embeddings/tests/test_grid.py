import copy
import dataclasses
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from RoSE import Grid, RotarySpatialEmbedding


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.floats(0.1, 9), st.floats(-9, 9))
def test_points_are_origin_plus_index_times_spacing_last_axis_fastest(shape, spacing, origin) -> None:
    grid = Grid(shape, spacing, origin)
    index = torch.cartesian_prod(*(torch.arange(n) for n in shape)).view(-1, len(shape))
    torch.testing.assert_close(grid.coordinates(), origin + index.double() * spacing, rtol=1e-12, atol=1e-12)
    assert grid.size == math.prod(shape) == len(index)
    assert grid.ndim == len(shape)


def test_scalars_hold_for_every_axis_and_forms_agree() -> None:
    by_tuple = Grid((2, 3), (0.5, 2.0), (1.0, -1.0))
    by_tensor = Grid([2, 3], torch.tensor([0.5, 2.0]), torch.tensor([1.0, -1.0]))
    assert torch.equal(by_tuple.coordinates(), by_tensor.coordinates())
    assert Grid((2, 3), 0.5) == Grid((2, 3), (0.5, 0.5))
    assert Grid(5).shape == (5,)
    assert Grid((2, 3), torch.tensor(0.5)).coordinates().shape == (6, 2)


def test_numbers_of_numpy_are_numbers() -> None:
    numpy = pytest.importorskip("numpy", reason="headers of image files give NumPy numbers where it is installed")
    for kind in (numpy.float32, numpy.float64):
        grid = Grid(numpy.array([2, 3]), numpy.array([0.5, 2.0], dtype=kind), kind(1.0))
        assert grid == Grid((2, 3), (0.5, 2.0), 1.0)
        assert all(type(v) is float for v in (*grid.spacing, *grid.origin))
        assert torch.equal(grid.coordinates(), Grid((2, 3), (0.5, 2.0), 1.0).coordinates())


def test_per_sample_spacing_and_origin() -> None:
    spacing = torch.tensor([[1.0, 2.0], [0.5, 0.25]])
    both = Grid((2, 3), spacing, torch.tensor([[0.0, 0.0], [5.0, 7.0]])).coordinates(dtype=torch.float32)
    assert both.shape == (2, 6, 2)
    assert both.dtype == torch.float32
    single = Grid((2, 3), (0.5, 0.25), (5.0, 7.0)).coordinates(dtype=torch.float32)
    torch.testing.assert_close(both[1], single)
    assert Grid((2, 3), spacing, 1.0).coordinates().shape == (2, 6, 2)
    assert Grid((2, 3), 1.0, spacing).coordinates().shape == (2, 6, 2)


def test_gradients_reach_a_tensor_spacing() -> None:
    spacing = torch.tensor([0.5, 0.25], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: Grid((2, 3), s, s).coordinates(), (spacing,))


@pytest.mark.parametrize("wrong", [0.0, -2.0, math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_spacing_that_nobody_could_look_at_does_not_go_unnoticed(dtype: torch.dtype, wrong: float) -> None:
    """A function transform sees no values; the positions of what would be refused are NaN, and of no other sample."""
    spacing = torch.tensor([[1.0, wrong], [1.0, 2.0]], dtype=dtype)
    with pytest.raises(ValueError, match="spacing must be finite and greater than 0"):
        Grid((2, 3), spacing)
    placed = torch.func.vmap(lambda row: Grid((2, 3), row).coordinates())(spacing)
    embedding = RotarySpatialEmbedding(8, 1, 2)
    turned = torch.func.vmap(lambda row: embedding(torch.ones(1, 6, 8), row, (2, 3)))(spacing)
    assert placed[0, :, 1].isnan().any()
    assert turned[0].isnan().all()
    assert torch.equal(placed[1], Grid((2, 3), spacing[1]).coordinates())
    assert turned[1].isfinite().all()


def test_is_frozen_and_compares_by_value() -> None:
    grid = Grid((2, 3), 0.5)
    with pytest.raises(AttributeError):
        grid.shape = (3, 3)
    assert grid != Grid((2, 3), 0.6)
    assert grid != "grid"
    assert len({grid, Grid((2, 3), (0.5, 0.5))}) == 1
    tensors = Grid((2, 3), torch.tensor([0.5, 0.5]))
    assert tensors == Grid((2, 3), torch.tensor([0.5, 0.5]))
    assert tensors != Grid((2, 3), 0.5) != tensors, "numbers and tensors are not the same grid"
    assert len({hash(g) for g in (grid, Grid((3, 2), 0.5), Grid((2, 3), 0.4), Grid((2, 3), 0.5, 1.0))}) == 4
    with pytest.raises(TypeError, match=r"^a Grid with tensor spacing or origin is not hashable; use plain numbers$"):
        hash(tensors)


def test_far_origins_keep_their_voxels() -> None:
    near, far = Grid((4,), 0.004).coordinates(), Grid((4,), 0.004, origin=1e5).coordinates()
    torch.testing.assert_close(far - 1e5, near, rtol=0, atol=1e-10)


def test_grids_do_not_change_and_survive_containers() -> None:
    grid = Grid((2, 3), torch.tensor([[0.5, 0.7]]), origin=1.0)
    for change in (
        lambda: setattr(grid, "shape", (1,)),
        lambda: setattr(grid, "new", 1),
        lambda: delattr(grid, "shape"),
    ):
        with pytest.raises(dataclasses.FrozenInstanceError, match="immutable"):
            change()
    assert not dataclasses.is_dataclass(grid)  # whose fields batch-moving code would set
    for other in (copy.deepcopy(grid), pickle.loads(pickle.dumps(grid)), copy.copy(grid), grid.to("cpu")):
        assert other == grid
    moved = grid.to("meta", non_blocking=True)
    assert moved.spacing.is_meta
    assert moved.origin == (1.0, 1.0)
    assert eval(repr(Grid((2, 3), 0.5)), {"Grid": Grid}) == Grid((2, 3), 0.5)


def test_a_derived_grid_is_the_grid() -> None:
    spacing = torch.tensor([[0.5, 0.7], [1.0, 2.0]])
    assert Grid.derived((2, 3), (0.5, 0.7), (0.0, 1.0)) == Grid((2, 3), (0.5, 0.7), (0.0, 1.0))
    assert Grid.derived((2, 3), spacing, (0.0, 0.0)) == Grid((2, 3), spacing)
    assert Grid((2, 3), spacing).batch == Grid((2, 3), 1.0, spacing).batch == 2
    assert Grid((2, 3), spacing[0]).batch is None


def test_positions_are_float64_whatever_holds_them() -> None:
    """Widened before anything is computed from them, in the grid and in what is derived from it."""
    shape, step, start = (100_000,), torch.tensor([0.1]), torch.tensor([1e6 / 3])
    exact = start.double() + torch.arange(shape[0])[:, None] * step.double()
    for grid in (
        Grid(shape, step, start),
        Grid(shape, step.double(), start),
        Grid(shape, step[0], start[0]),
        Grid(shape, float(step), float(start)),
        Grid.derived(shape, step, start),
    ):
        assert grid.coordinates().dtype == torch.float64
        torch.testing.assert_close(grid.coordinates(), exact, rtol=0, atol=1e-9)
        rounded = grid.coordinates(dtype=torch.float32)
        assert torch.equal(rounded, exact.float())
    kept = Grid(shape, step, start)
    assert kept.spacing.dtype == kept.origin.dtype == torch.float64
    per_sample = Grid(shape, step.expand(2, 1), start.expand(2, 1)).coordinates()
    torch.testing.assert_close(per_sample, exact.expand(2, -1, -1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("transform", [None, "identity", "power", "log"])
def test_a_spacing_in_float32_turns_features_as_its_value_does(transform: str | None) -> None:
    torch.manual_seed(0)
    embedding = RotarySpatialEmbedding(16, 1, 1, spacing_transform=transform)
    x, step = torch.randn(1, 20_000, 16), torch.tensor([0.1])
    torch.testing.assert_close(embedding(x, step, (20_000,)), embedding(x, float(step), (20_000,)), rtol=0, atol=1e-6)


def test_coordinates_lie_where_they_are_wanted_or_where_the_grid_does() -> None:
    assert Grid((2, 3)).coordinates("meta").device.type == "meta"
    there = torch.empty(2, device="meta")
    for spacing, origin in ((there, (0.0, 0.0)), ((1.0, 1.0), there)):
        grid = Grid.derived((2, 3), spacing, origin)
        assert grid.coordinates().device.type == "meta"
    with torch.device("meta"):
        assert Grid((2, 3)).coordinates().device.type == "meta"
        assert Grid((2, 3)).coordinates("cpu").device.type == "cpu"
    with pytest.raises(TypeError, match=r"dtype must be torch\.float64 or torch\.float32; got torch\.float16"):
        Grid((2, 3)).coordinates(dtype=torch.float16)
