"""Which fine token sees which group, and where groups lie: every rule against an independent statement of it."""

import itertools
import math
import pickle

import pytest
import torch
from grouping_cases import axes, cell_by_distance, neighbourhoods, window_entries
from hypothesis import assume, example, given
from hypothesis import strategies as st
from RoSE import Grid
from spatial_grouping_attention import Neighbourhood
from spatial_grouping_attention.geometry import coarse_shape, coarsen
from spatial_grouping_attention.geometry.axis import Axis

CONVOLUTIONS = {
    1: torch.nn.functional.conv1d,
    2: torch.nn.functional.conv2d,
    3: torch.nn.functional.conv3d,
}
one_axis = axes(30, covering=False)


def axis_of(values: tuple[int, ...]) -> Axis:
    size, groups, stride, kernel, padding, window, dilation = values
    return Axis(size, groups, stride, kernel, padding, window, dilation)


@given(one_axis)
def test_a_cell_is_the_nearest_block(values: tuple[int, ...]) -> None:
    axis = axis_of(values)
    size, groups, stride, kernel, padding, *_ = values
    for index in range(size):
        assert axis.cell(index) == cell_by_distance(index, size, groups, stride, kernel, padding)


@pytest.mark.parametrize(
    ("stride", "cells"),
    [
        (1, [0, 1, 2, 3, 4, 5, 6, 7]),
        (2, [0, 0, 1, 1, 2, 2, 3, 3]),
        (3, [0, 0, 1, 1, 1, 2, 2, 2]),
        (4, [0, 0, 0, 1, 1, 1, 1, 1]),
    ],
)
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_cells_of_centred_odd_kernels(kernel: int, stride: int, cells: list[int]) -> None:
    """{2j, 2j+1} at stride 2, {4j-1 .. 4j+2} at stride 4, whatever the kernel; the border owns what is left."""
    padding = (kernel - 1) // 2
    groups = (8 + 2 * padding - kernel) // stride + 1
    axis = Axis(8, groups, stride, kernel, padding, 3, 1)
    assert [axis.cell(i) for i in range(8)] == cells


@given(one_axis)
def test_blocks_are_the_inverse_of_cells(values: tuple[int, ...]) -> None:
    axis = axis_of(values)
    cells = [axis.cell(i) for i in range(axis.size)]
    assert cells == sorted(cells)
    for first, last in itertools.combinations_with_replacement(range(axis.groups), 2):
        start, stop = axis.block(first, last)
        assert 0 <= start <= stop <= axis.size
        assert list(range(start, stop)) == [i for i, cell in enumerate(cells) if first <= cell <= last]


@given(neighbourhoods())
def test_the_mask_is_the_window_around_the_cell(neighbourhood: Neighbourhood) -> None:
    entries = window_entries(neighbourhood)
    mask = neighbourhood.mask()
    assert mask.dtype == torch.bool
    assert torch.equal(mask, entries >= 0)
    assert torch.equal(neighbourhood.window_index(), entries.clamp(min=0))


@given(neighbourhoods())
def test_the_relation_is_symmetric(neighbourhood: Neighbourhood) -> None:
    """A token sees exactly the groups that lie within a window around its cell, so a group's members are the
    tokens whose cells lie within the same window around it: nothing is shifted at borders."""
    mask = neighbourhood.mask()
    cells = list(itertools.product(*([axis.cell(i) for i in range(axis.size)] for axis in neighbourhood.axes)))
    groups = list(itertools.product(*(range(axis.groups) for axis in neighbourhood.axes)))
    window_of = {
        group: {
            other
            for other in groups
            if all(
                abs(a - b) <= axis.dilation * (axis.window // 2) and (a - b) % axis.dilation == 0
                for a, b, axis in zip(group, other, neighbourhood.axes, strict=True)
            )
        }
        for group in groups
    }
    for j, group in enumerate(groups):
        members = [i for i, cell in enumerate(cells) if cell in window_of[group]]
        assert mask[:, j].nonzero().flatten().tolist() == members
    for i, cell in enumerate(cells):
        assert mask[i, groups.index(cell)], "every token sees its own cell"
        seen = {groups[j] for j in mask[i].nonzero().flatten().tolist()}
        assert seen == window_of[cell]


@given(one_axis)
def test_the_members_of_a_group_are_an_interval(values: tuple[int, ...]) -> None:
    size, groups, *numbers = values[:-1]
    for seeing in Neighbourhood((size,), (groups,), *numbers).mask().T.tolist():
        runs = [key for key, _ in itertools.groupby(seeing)]
        assert runs.count(True) <= 1


@given(neighbourhoods(covering=True))
def test_a_window_over_everything_hides_nothing(neighbourhood: Neighbourhood) -> None:
    assert neighbourhood.covers_all
    assert neighbourhood.mask().all()


@given(neighbourhoods())
def test_covering_is_known(neighbourhood: Neighbourhood) -> None:
    """Covering is a promise for tokens in any cell; where not all cells own tokens, the mask may be full anyway."""
    full = bool(neighbourhood.mask().all())
    assert full or not neighbourhood.covers_all
    owned = all({axis.cell(i) for i in range(axis.size)} == set(range(axis.groups)) for axis in neighbourhood.axes)
    if owned:
        assert full == neighbourhood.covers_all


@given(neighbourhoods())
def test_neighbourhoods_survive_their_serial_forms(neighbourhood: Neighbourhood) -> None:
    assert Neighbourhood.from_integers(neighbourhood.integers()) == neighbourhood
    assert pickle.loads(pickle.dumps(neighbourhood)) == neighbourhood
    assert hash(Neighbourhood.from_integers(neighbourhood.integers())) == hash(neighbourhood)
    assert (neighbourhood.num_inputs, neighbourhood.num_groups) == tuple(neighbourhood.mask().shape)
    assert neighbourhood.ndim == len(neighbourhood.input_shape)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tables_are_where_and_what_was_asked_for(device: str) -> None:
    neighbourhood = Neighbourhood((8, 6), (4, 3), 2, 3, 1, 3)
    assert neighbourhood.mask(device).device.type == neighbourhood.window_index(device).device.type == device
    for dtype in (torch.float32, torch.float64):
        for table in (neighbourhood.places(device, dtype), neighbourhood.squared_distances(device, dtype)):
            assert (table.device.type, table.dtype) == (device, dtype)


def test_single_numbers_mean_every_axis() -> None:
    short = Neighbourhood((8, 6), (4, 3), 2, 3, 1, 3)
    long = Neighbourhood((8, 6), (4, 3), (2, 2), (3, 3), (1, 1), (3, 3), (1, 1))
    assert short == long


@given(st.data())
def test_coarse_shape_is_that_of_a_convolution(data: st.DataObject) -> None:
    ndim = data.draw(st.integers(1, 3))
    columns = [data.draw(axes(9, covering=False)) for _ in range(ndim)]
    sizes, _, strides, kernels, paddings, *_ = zip(*columns, strict=True)
    weight = torch.ones(1, 1, *kernels)
    convolved = CONVOLUTIONS[ndim](torch.ones(1, 1, *sizes), weight, stride=strides, padding=paddings)
    assert coarse_shape(sizes, kernels, strides, paddings) == convolved.shape[2:]


@example((30, 30, 1, 1, 0, 1, 1), -2.0, 0.1)
@given(one_axis, st.floats(-100, 100), st.floats(0.1, 10))
def test_a_group_sits_at_the_mean_of_its_receptive_field(
    values: tuple[int, ...], origin: float, spacing: float
) -> None:
    """Found by convolving the positions themselves with the mean kernel, where no border clips it."""
    size, groups, stride, kernel, padding, *_ = values
    coarse = coarsen(Grid((size,), spacing, origin), (kernel,), (stride,), (padding,))
    assert coarse.shape == (groups,)
    # The grid without a border: the same tokens, and as many more on either side as the padding stands for.
    positions = origin + spacing * torch.arange(-padding, size + padding, dtype=torch.float64)
    means = positions.unfold(0, kernel, stride).mean(-1)
    assert torch.allclose(coarse.coordinates().flatten(), means, rtol=1e-12, atol=1e-9)


def test_odd_centred_kernels_keep_the_origin_and_even_ones_move_half_a_step() -> None:
    grid = Grid((8, 8), (0.5, 2.0), (3.0, -1.0))
    assert coarsen(grid, (5, 5), (2, 3), (2, 2)).origin == (3.0, -1.0)
    even = coarsen(grid, (4, 2), (2, 2), (1, 0))
    assert even.origin == (3.25, 0.0)
    assert even.spacing == (1.0, 4.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spacings_per_sample_coarsen_one_by_one(dtype: torch.dtype) -> None:
    spacing = torch.tensor([[0.5, 2.0], [1.0, 0.25], [3.0, 3.0]], dtype=dtype, requires_grad=True)
    geometry = ((4, 3), (2, 3), (1, 0))
    together = coarsen(Grid((8, 7), spacing, (1.0, -2.0)), *geometry)
    assert together.spacing.dtype == together.origin.dtype == torch.float64
    for i, row in enumerate(spacing.tolist()):
        alone = coarsen(Grid((8, 7), row, (1.0, -2.0)), *geometry)
        assert together.shape == alone.shape
        assert together.spacing[i].tolist() == pytest.approx(list(alone.spacing))
        assert together.origin[i].tolist() == pytest.approx(list(alone.origin))
        assert torch.allclose(together.coordinates()[i], alone.coordinates(), atol=1e-5)
    together.origin.sum().backward()
    assert torch.equal(spacing.grad, torch.tensor([[0.5, 1.0]], dtype=dtype).expand(3, 2))


def test_origins_per_sample() -> None:
    origin = torch.tensor([[1.0, 2.0], [-5.0, 0.0]])
    coarse = coarsen(Grid((4, 4), (1.0, 2.0), origin), (2, 3), (2, 2), (0, 1))
    assert torch.equal(coarse.origin, origin + torch.tensor([0.5, 0.0]))


@pytest.mark.parametrize("held", ["spacing", "origin"])
def test_coarse_grids_are_where_the_fine_ones_are(held: str) -> None:
    grid = Grid((4, 4), **{held: torch.ones(3, 2, device="meta")})
    coarse = coarsen(grid, (2, 3), (2, 2), (0, 1))
    assert coarse.spacing.device.type == coarse.origin.device.type == "meta"


@pytest.mark.parametrize("stages", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("held", ["spacing", "origin", "spacing per sample", "origin per sample", "both"])
def test_positions_are_exact_whatever_holds_the_numbers(held: str, dtype: torch.dtype, stages: int) -> None:
    """100,000 tokens, a million units away: a group is where the same numbers in Python would put it."""
    # What float32 can hold exactly, so that only what is done with it can round.
    spacing, origin = torch.tensor(0.3).item(), 1e6 + 0.0625 * (held in ("spacing", "spacing per sample")) / 1024
    grid = Grid((100_000,), spacing, origin)
    per_sample = (2, 1) if "sample" in held else (1,)
    steps = torch.full(per_sample, spacing, dtype=dtype) if "spacing" in held or held == "both" else spacing
    start = torch.full(per_sample, origin, dtype=dtype) if "origin" in held or held == "both" else origin
    given = Grid((100_000,), steps, start)
    for _ in range(stages):
        grid, given = (coarsen(x, (4,), (2,), (1,)) for x in (grid, given))
    for got, want in ((given.origin, grid.origin), (given.spacing, grid.spacing)):
        assert torch.equal(torch.as_tensor(got).double().flatten().unique(), torch.tensor(want, dtype=torch.float64))
    assert (given.coordinates() - grid.coordinates()).abs().max() <= 1e-9


@given(one_axis)
def test_kernels_beyond_the_padded_grid_are_refused(values: tuple[int, ...]) -> None:
    size, _, stride, _, padding, *_ = values
    assume(size + 2 * padding < 40)
    with pytest.raises(ValueError, match="kernel_size must not exceed the padded grid"):
        coarse_shape((size,), (size + 2 * padding + 1,), (stride,), (padding,))


GOOD = {
    "input_shape": (8, 6),
    "output_shape": (4, 3),
    "stride": 2,
    "kernel_size": 3,
    "padding": 1,
    "window": 3,
    "dilation": 1,
}


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"input_shape": 8}, ValueError, r"output_shape must have 1 ints, one per axis; got \(4, 3\)"),
        ({"input_shape": ()}, ValueError, r"input_shape must have at least one axis; got \(\)"),
        ({"input_shape": (8.0, 6)}, TypeError, r"input_shape\[0\] must be an int; got 8\.0 of type float"),
        ({"input_shape": (0, 6)}, ValueError, r"input_shape\[0\] must be at least 1; got 0"),
        ({"output_shape": (4,)}, ValueError, r"output_shape must have 2 ints, one per axis; got \(4,\)"),
        ({"output_shape": 4}, ValueError, "output_shape must have 2 ints, one per axis; got 4"),
        (
            {"output_shape": (4, 4)},
            ValueError,
            r"output_shape must be \(n \+ 2\*padding - kernel_size\)//stride \+ 1 on every axis: "
            "n=6, kernel_size=3, stride=2, padding=1 give 3; got 4",
        ),
        ({"output_shape": (0, 3)}, ValueError, r"output_shape\[0\] must be at least 1; got 0"),
        ({"stride": 0}, ValueError, "stride must be at least 1; got 0"),
        ({"stride": True}, TypeError, "stride must be an int .* got True of type bool"),
        ({"stride": "22"}, TypeError, "stride must be an int .* got '22' of type str"),
        ({"kernel_size": (3, 0)}, ValueError, r"kernel_size\[1\] must be at least 1; got 0"),
        ({"padding": -1}, ValueError, "padding must be at least 0; got -1"),
        ({"window": 2}, ValueError, r"window must be odd on every axis; got \(2, 2\)"),
        ({"window": (3, 4)}, ValueError, r"window must be odd on every axis; got \(3, 4\)"),
        ({"window": 3.0}, TypeError, r"window must be an int or 2 ints, one per axis; got 3\.0 of type float"),
        ({"window": -1}, ValueError, "window must be at least 1; got -1"),
        ({"dilation": 0}, ValueError, "dilation must be at least 1; got 0"),
    ],
)
def test_bad_neighbourhoods(change: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=f"^{match}$"):
        Neighbourhood(**{**GOOD, **change})


def test_the_good_neighbourhood_is_good() -> None:
    assert Neighbourhood(**GOOD).num_groups == math.prod((4, 3))


def test_any_sequence_says_the_same_neighbourhood() -> None:
    good = Neighbourhood(**GOOD)
    same = Neighbourhood(**{name: list(value) if isinstance(value, tuple) else value for name, value in GOOD.items()})
    assert (same, hash(same)) == (good, hash(good))
    assert (same.input_shape, same.output_shape) == (GOOD["input_shape"], GOOD["output_shape"])
