"""Deformable grouping: the sparse result at whole steps, linear interpolation in between, any number of axes."""

import itertools
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from grouping_cases import assert_near
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from layer_cases import SHAPES, make_layer, slow, tokens
from RoSE.tracing import is_transformed
from spatial_grouping_attention.backends import deformable
from spatial_grouping_attention.backends.deformable import labelling, points, selection
from spatial_grouping_attention.backends.deformable.compiled import Compiled
from spatial_grouping_attention.backends.deformable.interpolation import interpolate
from spatial_grouping_attention.backends.semantics import most_likely

RNG = torch.Generator().manual_seed(11)


# The interpreter takes minutes for what kernels do in seconds.
ENGINES = [
    "reference",
    pytest.param("native", marks=pytest.mark.native),
    pytest.param("triton", marks=[pytest.mark.triton, pytest.mark.slow]),
]


@pytest.fixture(scope="module", autouse=True, params=ENGINES)
def _engine(request: pytest.FixtureRequest) -> Iterator[None]:
    """All of these hold for every engine, and are computed by the one that is named."""

    def named(_: str, *operands: Any) -> ModuleType | Compiled:
        return selection.engine("reference" if is_transformed() else request.param, *operands)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(points, "engine", named)
        yield


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=RNG, dtype=torch.float64)


def interpolated_by_hand(values: torch.Tensor, position: list[float], shape: tuple[int, ...]) -> torch.Tensor:
    """Every point of the grid, weighted by how near it is: max(0, 1 - distance) along every axis."""
    grid = values.reshape(*shape, -1)
    total = torch.zeros(grid.shape[-1], dtype=values.dtype)
    for index in itertools.product(*(range(n) for n in shape)):
        weight = 1.0
        for place, i, n in zip(position, index, shape, strict=True):
            weight *= max(0.0, 1.0 - abs(min(max(place, 0.0), n - 1.0) - i))
        total = total + weight * grid[index]
    return total


@settings(max_examples=25)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 999))
def test_interpolation_is_linear_in_any_number_of_axes(sizes: list[int], seed: int) -> None:
    shape, generator = tuple(sizes), torch.Generator().manual_seed(seed)
    values = torch.randn(1, 2, torch.Size(shape).numel(), 3, generator=generator, dtype=torch.float64)
    positions = 5 * torch.rand(1, 2, 6, len(shape), generator=generator, dtype=torch.float64) - 0.7
    positions[:, :, 0] = positions[:, :, 0].round()
    got = interpolate(values, positions, deformable.lattice(shape))
    for head, point in itertools.product(range(2), range(6)):
        want = interpolated_by_hand(values[0, head], positions[0, head, point].tolist(), shape)
        assert_near(got[0, head, point], want, 1e-12)


@settings(max_examples=25)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 999))
def test_interpolation_goes_over_valid_points_alone(sizes: list[int], seed: int) -> None:
    """As if the grid were its valid points: the others weigh nothing, whatever they hold, and the rest is scaled up."""
    shape, generator = tuple(sizes), torch.Generator().manual_seed(seed)
    size = torch.Size(shape).numel()
    valid = torch.rand(1, size, generator=generator) < 0.6
    values = torch.randn(1, 1, size, 2, generator=generator, dtype=torch.float64)
    positions = 5 * torch.rand(1, 1, 8, len(shape), generator=generator, dtype=torch.float64) - 0.7
    positions[:, :, 0] = positions[:, :, 0].round()
    got = interpolate(values, positions, deformable.lattice(shape, valid))
    indices = torch.cartesian_prod(*(torch.arange(n) for n in shape)).reshape(size, -1)[valid[0]]
    for point in range(8):
        if not len(indices):
            assert got.eq(0).all()
            continue
        held = torch.minimum(torch.maximum(positions[0, 0, point], indices.amin(0)), indices.amax(0))
        weights = (1 - (held - indices).abs()).clamp(min=0).prod(-1)
        want = weights @ values[0, 0, valid[0]] / weights.sum().clamp(min=1e-30)
        assert_near(got[0, 0, point], want if weights.sum() > 1e-6 else torch.zeros(2), 1e-9, size=1.0)


def operands(tokens: int, shape: tuple[int, ...] = (3, 4)) -> tuple[torch.Tensor, ...]:
    """(q, k, v, u, positions) of two points a token, away from whole steps, where linear interpolation has a kink."""
    size, ndim = torch.Size(shape).numel(), len(shape)
    positions = torch.rand(1, 1, tokens, 2, ndim, generator=RNG, dtype=torch.float64) * 0.8 + 0.1
    cells = [torch.randint(0, n - 1, positions.shape[:-1], generator=RNG) for n in shape]
    sizes = ((size, 3), (tokens, 3), (tokens, 2), (size, 2))
    return (*(random(1, 1, *rows).requires_grad_() for rows in sizes), (positions + torch.stack(cells, -1)))


def shares_of(q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, groups: deformable.Lattice) -> torch.Tensor:
    visible = torch.ones(k.shape[2], 2, dtype=torch.bool)
    visible[0, 1] = False
    return deformable.point_log_shares(q, k, positions, visible, groups, scale=0.5)


@pytest.mark.parametrize("holes", [(), (3, 7, 11), *slow(((5,),), ((0, 1, 4, 5, 8, 9),))])
def test_gradients_of_interpolation_and_pooling(holes: tuple[int, ...]) -> None:
    valid = None
    if holes:
        valid = torch.ones(1, 12, dtype=torch.bool)
        valid[:, list(holes)] = False
    groups = deformable.lattice((3, 4), valid)
    *leaves, positions = operands(5)

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, ...]:
        shares = shares_of(q, k, positions, groups)
        out, log_mass = deformable.pool(shares, positions, v, groups)
        up, total = deformable.assign(shares, positions, u, groups), deformable.spread(shares, positions, v, groups)
        return out, log_mass.exp(), up, total

    assert torch.autograd.gradcheck(function, leaves)
    positions.requires_grad_()  # Bounding the gradient of places leaves all others alone.
    assert torch.autograd.gradcheck(function, leaves)
    if valid is not None:
        assert function(*leaves)[0][0, 0, ~valid[0]].eq(0).all()


def test_gradients_of_places_are_exact_where_nothing_is_bounded() -> None:
    groups = deformable.lattice((3, 4))
    q, k, v, u, positions = operands(5)

    def carried(positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        shares = shares_of(q, k, positions, groups)
        up, total = deformable.assign(shares, positions, u, groups), deformable.spread(shares, positions, v, groups)
        return shares.masked_fill(shares.isinf(), 0.0), up, total

    assert torch.autograd.gradcheck(carried, positions.requires_grad_())
    q, k, v, u, positions = operands(40, (2, 2))
    groups = deformable.lattice((2, 2))

    def pooled(positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out, log_mass = deformable.pool(shares_of(q, k, positions, groups), positions, v, groups)
        assert (log_mass > 0).all(), "groups that have a token's mass"
        return out, log_mass

    assert torch.autograd.gradcheck(pooled, positions.requires_grad_())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch calls what it has deprecated
@pytest.mark.parametrize("gap", [0.0, 5.0, 30.0, 300.0])
def test_a_point_moves_an_average_at_most_all_the_way(gap: float) -> None:
    """Token 0 stands beside a group that weighs e^-gap in all: its step has the smaller of two slopes."""
    log_shares = torch.tensor([0.0, -gap], dtype=torch.float64).view(1, 1, 2, 1)
    places = torch.tensor([0.0, 1.0], dtype=torch.float64).view(1, 1, 2, 1, 1).requires_grad_()
    v = torch.tensor([3.0, 1.0], dtype=torch.float64).view(1, 1, 2, 1)
    out, log_mass = deformable.pool(log_shares, places, v, deformable.lattice((2,)))
    assert_near(out.flatten(), torch.tensor([3.0, 1.0]), 1e-12)
    assert_near(log_mass.flatten(), torch.tensor([0.0, -gap]), 1e-12)
    mass = log_mass.exp().flatten()[1]
    exact = (v[0, 0, 0] - out[0, 0, 1]) / mass
    (gradient,) = torch.autograd.grad(out[0, 0, 1].sum(), places)
    assert_near(gradient[0, 0, 0].sum(), exact.clamp(max=2.0).sum(), 1e-9)

    def average(places: torch.Tensor) -> torch.Tensor:
        return deformable.pool(log_shares, places, v, deformable.lattice((2,)))[0][0, 0, 1].sum()

    # Whoever asks for it, and in whichever direction.
    places = places.detach()
    assert_near(torch.func.grad(average)(places), gradient, 1e-9)
    assert_near(torch.func.vmap(torch.func.grad(average))(places[None])[0], gradient, 1e-9)
    step = torch.zeros_like(places)
    step[0, 0, 0] = 1.0
    assert_near(torch.func.jvp(average, (places,), (step,))[1], gradient[0, 0, 0].sum(), 1e-9)


@settings(max_examples=25)
@given(st.integers(1, 3), st.integers(0, 999))
def test_gradients_beside_holes_have_their_direction_and_a_bounded_length(ndim: int, seed: int) -> None:
    """The slope of interpolation times what of the surroundings is there."""
    generator = torch.Generator().manual_seed(seed)
    shape = (3,) * ndim
    valid = torch.rand(1, 3**ndim, generator=generator) < 0.6
    values = torch.randn(1, 1, 3**ndim, 1, generator=generator, dtype=torch.float64)
    positions = 2 * torch.rand(1, 1, 8, ndim, generator=generator, dtype=torch.float64)
    groups = deformable.lattice(shape, valid)
    (got,) = torch.autograd.grad(interpolate(values, positions.requires_grad_(), groups).sum(), positions)
    positions = positions.detach()
    indices = torch.cartesian_prod(*(torch.arange(3),) * ndim).reshape(3**ndim, ndim)[valid[0]]
    assume(len(indices))
    held = torch.minimum(torch.maximum(positions, indices.amin(0)), indices.amax(0))
    there = interpolate(valid.double()[:, None, :, None], held, deformable.lattice(shape)).squeeze(-1)
    for axis in range(ndim):
        step = torch.zeros(ndim, dtype=torch.float64)
        step[axis] = 1e-7
        slope = (interpolate(values, positions + step, groups) - interpolate(values, positions - step, groups)) / 2e-7
        # Not where a step crosses a kink, or where there is next to nothing.
        smooth = (there > 1e-2) & ((positions - positions.round()).abs() > 1e-3).all(-1)
        assert_near((got[..., axis])[smooth], (slope.squeeze(-1) * there)[smooth], 1e-4, size=1.0)
    assert got.abs().max() <= 2 * (values.amax() - values.amin()) + 1e-9


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_gradients_of_offsets_do_not_explode_where_memberships_are_sharp(ndim: int, moved: bool, padded: bool) -> None:
    """With logits of any spread they stay of the order of all the gradients of the sparse layer."""
    shape = {1: (40,), 2: (16, 18), 3: (6, 7, 8)}[ndim]
    valid = None
    if padded:
        valid = torch.rand(2, *shape, generator=torch.Generator().manual_seed(4)) < 0.6
    plain = make_layer("sparse", ndim, iters=1)(tokens(shape), 1.0, shape).assignment
    spread = (plain.scale * plain.k @ plain.q.mT).std().item()
    for wanted in (1.0, 10.0, 20.0, 33.0, 100.0):
        norms = {}
        for variant in ("sparse", "deformable"):
            layer = make_layer(variant, ndim, iters=1)
            with torch.no_grad():
                for parameter in layer.q_proj.parameters():
                    parameter.mul_(wanted / spread)
            if variant == "deformable" and not moved:
                layer.offsets.reset_parameters()
            out = layer(tokens(shape), 1.0, shape, valid=valid).x_out
            (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(5))).sum().backward()
            parameters = (layer if variant == "sparse" else layer.offsets).parameters()
            gradients = [p.grad for p in parameters if p.grad is not None]
            norms[variant] = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
        assert 0 < norms["deformable"] < 2 * norms["sparse"], wanted


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("holes", [False, True])
def test_positions_that_are_not_numbers_stay_on_the_grid(ndim: int, holes: bool) -> None:
    """Forward and backward; what is read there is NaN, and what lies elsewhere is as it was."""
    shape = (3,) * ndim
    size = 3**ndim
    valid = None
    if holes:
        valid = torch.ones(1, size, dtype=torch.bool)
        valid[:, ::4] = False
    groups = deformable.lattice(shape, valid)
    for wrong in (torch.nan, torch.inf, -torch.inf, 1e30):
        positions = 2 * torch.rand(1, 1, 6, 2, ndim, generator=RNG, dtype=torch.float64)
        want = interpolate(random(1, 1, size, 2), positions.flatten(2, 3), groups)
        positions[0, 0, 2, 1, -1] = wrong
        positions.requires_grad_()
        q, k, v = (random(1, 1, n, 2).requires_grad_() for n in (size, 6, 6))
        read = interpolate(q, positions.flatten(2, 3), groups)
        assert read.isnan().any(-1).squeeze().tolist() == [wrong != wrong and i == 5 for i in range(12)]
        assert want.isfinite().all()
        shares = deformable.point_log_shares(q, k, positions, torch.ones(6, 2, dtype=torch.bool), groups, scale=1.0)
        assert shares.isnan().all(-1).squeeze().tolist() == [wrong != wrong and i == 2 for i in range(6)]
        out, _ = deformable.pool(shares, positions, v, groups)
        assert out.isnan().any() == (wrong != wrong)
        up = deformable.assign(shares, positions, q, groups)
        assert up.isnan().any(-1).squeeze().tolist() == [wrong != wrong and i == 2 for i in range(6)]
        (out.sum() + up.sum()).backward()
        assert deformable.labels(shares, positions, groups).squeeze().tolist()[2] == -1 or wrong == wrong


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_tokens_that_are_not_numbers(ndim: int) -> None:
    """A NaN in a token, or in what moves its points, is seen around the token and nowhere else."""
    shape = {1: (61,), 2: (25, 26), 3: (4, 5, 30)}[ndim]
    layer = make_layer("deformable", ndim, iters=0)
    layer.offsets.reset_parameters()
    x = tokens(shape)
    token = x.shape[1] // 2
    cells = layer.neighbourhood(shape).cells()
    groups = torch.cartesian_prod(*map(torch.arange, layer.neighbourhood(shape).output_shape)).reshape(-1, ndim)
    distance = (groups - cells[token]).abs().amax(-1)
    ones = torch.ones(2, x.shape[1], 1)
    want = layer(x, 1.0, shape).assignment.pool(ones).squeeze(-1)

    def break_offsets(_: object, __: object, offsets: torch.Tensor) -> torch.Tensor:
        offsets = offsets.clone()
        offsets[0, token] = torch.nan
        return offsets

    hurt = x.clone()
    hurt[0, token, 3] = torch.nan
    # Interpolation also touches, with weight 0, the groups one step beyond a window. The convolution hands what is NaN
    # in a token to groups one step away, and those to all tokens that look at them.
    for features, reach in ((hurt, 5), (x, 2)):
        if features is x:
            layer.offsets.register_forward_hook(break_offsets)
        members = layer(features, 1.0, shape).assignment
        assert members.points.isfinite().all()
        pooled = members.pool(ones).squeeze(-1)
        assert pooled[0, distance == 0].isnan().all()
        assert not pooled[0, distance > reach].isnan().any()
        assert (distance > reach).any()
        assert torch.equal(pooled[1], want[1])
        assert members.labels()[0, token] == -1
        up = members.upsample(torch.ones(2, members.num_groups, 1)).isnan().any(-1)
        assert up[0, token]
        assert not up[1].any()
        if features is x:
            assert up[0].sum() == 1


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"relative_bias": True}, {"compactness": 1.0}], ids=str)
def test_at_whole_steps_it_is_the_sparse_layer(ndim: int, options: dict[str, object]) -> None:
    """With its points on the window, the layer and the memberships equal the sparse ones, forward and backward."""
    sparse = make_layer("sparse", ndim, **options).double()
    other = make_layer("deformable", ndim, seed=3, **options).double()
    state = sparse.state_dict()
    if "bias_table" in state:
        state["bias_table"] = state["bias_table"].flatten(1)
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.startswith("offsets") for name in missing)
    other.offsets.reset_parameters()
    shape, results = SHAPES[ndim], []
    for layer in (sparse, other):
        x = tokens(shape).double().requires_grad_()
        output = layer(x, 0.5, shape)
        up = output.assignment.upsample(output.x_out)
        (output.x_out.sin().sum() + up.cos().sum()).backward()
        names = ("k_proj.weight", "v_proj.weight", "q_proj.weight", "rotary.freqs", "proposal.weight")
        parameters = dict(layer.named_parameters())
        names += tuple(name for name in ("raw_compactness",) if name in parameters)
        grads = [parameters[name].grad for name in names]
        results.append((output.x_out, output.assignment.matrix(), up, x.grad, *grads))
    assert (results[0][1].amax(-1) > 2 / results[0][1].shape[-1]).any()
    for i, (mine, theirs) in enumerate(zip(reversed(results), results, strict=True)):
        for name, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            # Kinks: on whole steps the gradient of the positions is one-sided, which only x.grad could notice.
            assert_near(a, b, 1e-6, f"{i} {name}")


def test_offsets_of_a_whole_step_look_one_group_further() -> None:
    """Shifting every point by one group along an axis shows each token the groups of the window beside its own."""
    layer = make_layer("deformable", 1, stride=1, num_points=1, rotary_ratio=0.0)
    layer.offsets.reset_parameters()
    with torch.no_grad():
        layer.offsets.bias.fill_(1.0)
    assert layer(tokens((6,)), 1.0).assignment.labels().tolist() == [[1, 2, 3, 4, 5, 5]] * 2
    with torch.no_grad():
        layer.offsets.bias.fill_(-2.5)
    members = layer(tokens((6,)), 1.0).assignment.matrix()[0]
    want = torch.zeros(6, 6)
    want[:3, 0] = 1.0
    for i in range(3, 6):
        want[i, i - 3] = want[i, i - 2] = 0.5
    assert_near(members, want, 1e-6)


@pytest.mark.parametrize("num_points", [1, 2, 4, 5, 9, 10])
def test_any_number_of_points(num_points: int) -> None:
    layer = make_layer("deformable", 2, num_points=num_points)
    output = layer(tokens((6, 9)), 1.0, (6, 9))
    matrix = output.assignment.matrix()
    assert_near(matrix.sum(-1), torch.ones(2, 54), 1e-5)
    assert ((matrix > 0).sum(-1) <= 4 * num_points * layer.num_heads).all()
    output.x_out.square().sum().backward()
    assert layer.offsets.weight.grad.isfinite().all()
    assert layer.offsets.weight.grad.abs().max() > 0


def test_points_follow_the_content() -> None:
    layer = make_layer("deformable", 2)
    x = tokens((6, 9))
    first = layer(x, 1.0, (6, 9)).assignment.points
    second = layer(x + 1.0, 1.0, (6, 9)).assignment.points
    assert (first - second).abs().mean() > 1e-2
    assert first.shape == (2, 2, 54, 9, 2)


@pytest.mark.parametrize("gap", [80.0, 90.0, 100.0, 120.0])
def test_neglected_groups_keep_their_average_and_gradients(gap: float) -> None:
    """A group that all its members would rather leave: sums of plain float32 shares underflow from a gap of 88 on."""
    q = torch.tensor([[[[0.0], [-gap]]]], requires_grad=True)
    k = torch.ones(1, 1, 3, 1, requires_grad=True)
    v = torch.tensor([[[[1.0], [2.0], [3.0]]]], requires_grad=True)
    points = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2, 1).expand(1, 1, 3, 2, 1)
    groups = deformable.lattice((2,))
    shares = deformable.point_log_shares(q, k, points, torch.ones(3, 2, dtype=torch.bool), groups, scale=1.0)
    out, log_mass = deformable.pool(shares, points, v, groups)
    assert_near(out.flatten(), torch.tensor([2.0, 2.0]), 1e-6)
    assert_near(log_mass.flatten(), torch.tensor([3.0, 3.0]).log() - torch.tensor([0.0, gap]), 1e-6)
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert gradient.isfinite().all()


def test_points_without_valid_groups_are_not_looked_at_and_tokens_without_points_belong_to_nobody() -> None:
    """Token 0 sees group 0 alone, token 1 the missing group 1 alone, token 2 both; none of it is ever NaN."""
    valid = torch.tensor([[True, False, True]])
    groups = deformable.lattice((3,), valid)
    points = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.25, 1.0]]).reshape(1, 1, 3, 2, 1).requires_grad_()
    q, k = (torch.randn(1, 1, 3, 2, requires_grad=True) for _ in range(2))
    shares = deformable.point_log_shares(q, k, points, torch.ones(3, 2, dtype=torch.bool), groups, scale=1.0)
    assert shares[0, 0, 1].eq(-torch.inf).all()
    assert_near(shares[0, 0, 2].exp(), torch.tensor([1.0, 0.0]), 1e-6)
    u = torch.eye(3).view(1, 1, 3, 3)
    memberships = deformable.assign(shares, points, u, groups)
    assert_near(memberships[0, 0], torch.tensor([[1.0, 0, 0], [0, 0, 0], [1.0, 0, 0]]), 1e-6)
    out, log_mass = deformable.pool(shares, points, torch.tensor([1.0, 50.0, 2.0]).view(1, 1, 3, 1), groups)
    assert_near(out.flatten(), torch.tensor([1.5, 0.0, 0.0]), 1e-6)
    assert log_mass.flatten().tolist() == pytest.approx([torch.tensor(2.0).log().item(), -torch.inf, -torch.inf])
    (memberships.square().sum() + out.square().sum()).backward()
    for tensor in (q, k, points):
        assert tensor.grad.isfinite().all()


@settings(max_examples=40)
@given(st.integers(1, 3), st.integers(1, 3), st.booleans(), st.booleans(), st.integers(0, 999))
def test_labels_are_the_most_likely_groups_however_they_are_found(
    ndim: int, heads: int, per_head: bool, holes: bool, seed: int
) -> None:
    """By all groups of a small grid, and by those that a token's points touch of a large one."""
    generator = torch.Generator().manual_seed(seed)
    shape = (5, 4, 3)[:ndim]
    size = torch.Size(shape).numel()
    places = torch.rand(2, heads, 7, 3, ndim, generator=generator) * torch.tensor(shape)
    log_shares = (8 * torch.rand(2, heads, 7, 3, generator=generator)).log_softmax(-1)
    log_shares[0, 0, 0, 0] = torch.nan
    log_shares[1, :, 1] = -torch.inf
    groups = deformable.lattice(shape, torch.rand(2, size, generator=generator) < 0.6 if holes else None)
    by_all = most_likely(labelling._memberships(log_shares, places, groups, per_head))
    assert torch.equal(labelling._most_likely_of_touched(log_shares, places, groups, per_head), by_all)
    assert torch.equal(deformable.labels(log_shares, places, groups, per_head=per_head), by_all)
    assert by_all[1, ..., 1].eq(-1).all()
