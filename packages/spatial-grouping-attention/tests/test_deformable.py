"""Deformable grouping: the sparse result at whole steps, linear interpolation in between, any number of axes."""

import itertools

import pytest
import torch
from grouping_cases import assert_near
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import SHAPES, make_layer, tokens
from spatial_grouping_attention.backends import deformable
from spatial_grouping_attention.backends.deformable.interpolation import interpolate

RNG = torch.Generator().manual_seed(11)


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


@pytest.mark.parametrize("holes", [(), (5,), (3, 7, 11), (0, 1, 4, 5, 8, 9)])
def test_gradients_of_interpolation_and_pooling(holes: tuple[int, ...]) -> None:
    shape = (3, 4)
    valid = None
    if holes:
        valid = torch.ones(1, 12, dtype=torch.bool)
        valid[:, list(holes)] = False
    # Away from whole steps, where linear interpolation has a kink.
    positions = torch.rand(1, 1, 5, 2, 2, generator=RNG, dtype=torch.float64) * 0.8 + 0.1
    positions = (positions + torch.randint(0, 2, positions.shape, generator=RNG)).requires_grad_()
    q, k, v, u = (
        x.requires_grad_() for x in (random(1, 1, 12, 3), random(1, 1, 5, 3), random(1, 1, 5, 2), random(1, 1, 12, 2))
    )
    visible = torch.ones(5, 2, dtype=torch.bool)
    visible[0, 1] = False

    def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, u, positions = tensors
        groups = deformable.lattice(shape, valid)
        shares = deformable.point_log_shares(q, k, positions, visible, groups, scale=0.5)
        out, log_mass = deformable.pool(shares, positions, v, groups)
        return out, log_mass.exp(), deformable.assign(shares, positions, u, groups)

    assert torch.autograd.gradcheck(function, (q, k, v, u, positions))
    if valid is not None:
        assert function(q, k, v, u, positions)[0][0, 0, ~valid[0]].eq(0).all()


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("relative_bias", [False, True])
def test_at_whole_steps_it_is_the_sparse_layer(ndim: int, relative_bias: bool) -> None:
    """With its points on the window, the layer and the memberships equal the sparse ones, forward and backward."""
    sparse = make_layer("sparse", ndim, relative_bias=relative_bias).double()
    other = make_layer("deformable", ndim, relative_bias=relative_bias, seed=3).double()
    state = sparse.state_dict()
    if relative_bias:
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
