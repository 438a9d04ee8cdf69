"""Grouping layers: the algorithm itself, and what physics demands of it."""

import itertools

import numpy as np
import pytest
import torch
from grouping_cases import assert_near
from layer_cases import SHAPES, VARIANTS, grouping_by_hand, make_layer, tokens
from RoSE import Grid
from torch.utils import _pytree as pytree

EVERY_VARIANT = tuple(VARIANTS)
BY_ATTENTION = ("dense", "sparse")


def spacing_of(ndim: int) -> tuple[float, ...]:
    return (1.0, 0.5, 1.5)[:ndim]


@pytest.mark.parametrize("compactness", [None, 2.0])
@pytest.mark.parametrize("iters", [0, 1, 3])
@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("variant", BY_ATTENTION)
def test_the_layer_is_its_algorithm(variant: str, ndim: int, iters: int, compactness: float | None) -> None:
    options = {"iters": iters, "relative_bias": variant == "sparse", "compactness": compactness}
    layer = make_layer(variant, ndim, **options).double()
    shape, spacing = SHAPES[ndim], spacing_of(ndim)
    x = tokens(shape).double()
    output = layer(x, spacing, shape)
    x_out, members = grouping_by_hand(layer, x, shape, spacing)
    assert_near(output.x_out, x_out, 1e-6)
    assert_near(output.assignment.matrix(), members, 1e-6)


@pytest.mark.parametrize("variant", BY_ATTENTION)
def test_a_learned_temperature_and_normed_tokens_are_in_the_algorithm(variant: str) -> None:
    layer = make_layer(variant, temperature="learned", norm_tokens=True).double()
    assert layer.log_temperature.unique().numel() == layer.num_heads
    x = 3 * tokens((6, 9)).double() + 1
    output = layer(x, 0.5, (6, 9))
    x_out, members = grouping_by_hand(layer, x, (6, 9), (0.5, 0.5))
    assert_near(output.x_out, x_out, 1e-6)
    assert_near(output.assignment.matrix(), members, 1e-6)


@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_a_temperature_starts_at_one_and_sharpens_its_own_head(variant: str) -> None:
    options = {"kernel_size": 3, "stride": 2, "num_heads": 2, "iters": 0}
    torch.manual_seed(0)
    fixed = VARIANTS[variant](8, 2, **options)
    learned = VARIANTS[variant](8, 2, **options, temperature="learned")
    assert not (learned.state_dict().keys() ^ fixed.state_dict().keys()) - {"log_temperature"}
    learned.load_state_dict(fixed.state_dict(), strict=False)
    x = tokens((6, 9))
    want = fixed(x, 1.0, (6, 9)).assignment
    assert torch.equal(learned(x, 1.0, (6, 9)).assignment.matrix(), want.matrix())
    with torch.no_grad():
        learned.log_temperature[1] = 2.0
        one_hot = torch.eye(15).expand(2, 2, -1, -1)
        cold, warm = want.assign_heads(one_hot), learned(x, 1.0, (6, 9)).assignment.assign_heads(one_hot)
    assert torch.equal(warm[:, 0], cold[:, 0])
    assert (warm[:, 1].amax(-1) > cold[:, 1].amax(-1)).float().mean() > 0.9


def test_normed_tokens_make_memberships_blind_to_the_scale_of_the_tokens() -> None:
    for norm_tokens, sensitive in ((True, False), (False, True)):
        layer = make_layer("sparse", norm_tokens=norm_tokens, iters=0)
        x = tokens((6, 9))
        # Proposals are normed in any case.
        layer.proposal.bias.data.zero_()
        change = layer(100 * x, 1.0, (6, 9)).assignment.matrix() - layer(x, 1.0, (6, 9)).assignment.matrix()
        assert (change.abs().max().item() > 1e-2) == sensitive


@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_whatever_holds_spacing_and_origin(variant: str) -> None:
    """Numbers, arrays and tensors, shared or per sample, say the same, far along a grid and far from zero too."""
    layer, x = make_layer(variant, 1, iters=0), tokens((100_000,), batch=1)
    step, start = torch.tensor(0.3).item(), 1e6
    want = layer(x, step, input_origin=start)
    for hold in (
        np.float64,
        np.float32,
        lambda number: np.array([number]),
        torch.tensor,
        lambda number: torch.tensor([number]),
        lambda number: torch.tensor([[number]]),
        lambda number: torch.tensor([[number]], dtype=torch.float64),
    ):
        for spacing, origin in ((hold(step), start), (step, hold(start)), (hold(step), hold(start))):
            got = layer(x, spacing, input_origin=origin)
            for mine, theirs in zip(*map(pytree.tree_leaves, (got.assignment, want.assignment)), strict=True):
                assert mine is theirs is None or torch.equal(mine, theirs)
            assert torch.as_tensor(got.out_origin).flatten().tolist() == list(want.out_origin)
            assert torch.as_tensor(got.out_spacing).flatten().tolist() == list(want.out_spacing)


@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_a_grid_is_spacing_shape_and_origin_in_one(variant: str) -> None:
    layer, x = make_layer(variant), tokens((6, 9))
    want = layer(x, (1.0, 0.5), (6, 9), input_origin=(3.0, -2.0))
    got = layer(x, input_grid=Grid((6, 9), (1.0, 0.5), (3.0, -2.0)))
    assert torch.equal(got.x_out, want.x_out)
    assert got.grid == want.grid == Grid(want.out_grid_shape, want.out_spacing, want.out_origin)
    per_sample = Grid((6, 9), torch.tensor([[1.0, 0.5], [0.5, 0.5]]), torch.tensor([[0.0, 1.0], [5.0, 5.0]]))
    want = layer(x, per_sample.spacing, (6, 9), input_origin=per_sample.origin)
    got = layer(x, input_grid=per_sample)
    assert torch.equal(got.x_out, want.x_out)
    assert got.grid == want.grid
    assert got.grid.origin[1].tolist() == [5.0, 5.0]


@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_a_spacing_transform_acts_on_tokens_and_groups_alike(variant: str) -> None:
    """Where the transform multiplies every position by one factor, it is that factor on the spacing."""
    x, shape = tokens((6, 9)), (6, 9)
    layer = make_layer(variant, spacing_transform="power")
    plain = make_layer(variant)
    plain.load_state_dict(layer.state_dict(), strict=False)
    with torch.no_grad():
        layer.rotary.spacing_transform.log_gain.copy_(torch.tensor([0.3, -0.4]))
        layer.rotary.spacing_transform.log_exponent.copy_(torch.tensor([-0.7, 0.2]))
    spacing = torch.tensor([0.5, 2.0], dtype=torch.float64)
    transformed = spacing * layer.rotary.spacing_transform(spacing).detach()
    assert_near(layer(x, spacing, shape).x_out, plain(x, transformed, shape).x_out, 1e-5)


GEOMETRIES = list(itertools.product((1, 2, 3, 4, 5), (None, 1, 2, 3, 7), (None, 0, 2)))


@pytest.mark.parametrize(("kernel", "stride", "padding"), GEOMETRIES)
def test_every_kernel_stride_and_padding(kernel: int, stride: int | None, padding: int | None) -> None:
    """Even kernels, strides beyond the kernel, sizes that do not divide, one group, more groups than tokens."""
    for variant in BY_ATTENTION:
        layer = make_layer(variant, 1, kernel_size=kernel, stride=stride, padding=padding).double()
        assert layer.stride == ((max(1, kernel // 2) if stride is None else stride),)
        assert layer.padding == (((kernel - 1) // 2 if padding is None else padding),)
        x = tokens((11,)).double()
        output = layer(x, 0.5)
        x_out, members = grouping_by_hand(layer, x, (11,), (0.5,))
        assert_near(output.x_out, x_out, 1e-6)
        assert_near(output.assignment.matrix(), members, 1e-6)
        assert output.out_grid_shape == layer.proposal(x.mT).shape[2:]
        assert output.out_spacing == (0.5 * layer.stride[0],)
        assert output.out_origin == pytest.approx((0.5 * ((kernel - 1) / 2 - layer.padding[0]),))


@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_anisotropic_kernels_and_strides(variant: str) -> None:
    layer = make_layer(variant, 3, kernel_size=(1, 3, 4), stride=(1, 2, 3), padding=(0, 1, 2))
    output = layer(tokens((3, 6, 7)), (2.0, 0.5, 0.25), (3, 6, 7))
    assert output.out_grid_shape == (3, 3, 3)
    assert output.x_out.shape == (2, 27, 8)
    assert output.out_spacing == (2.0, 1.0, 0.75)
    assert output.out_origin == (0.0, 0.0, -0.125)


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_a_grid_of_one_token(variant: str, ndim: int) -> None:
    output = make_layer(variant, ndim)(tokens((1,) * ndim), 1.0, (1,) * ndim)
    assert output.out_grid_shape == (1,) * ndim
    assert torch.equal(output.assignment.matrix(), torch.ones(2, 1, 1))


@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_moving_the_grid_moves_the_groups_and_nothing_else(variant: str) -> None:
    layer, x, shape = make_layer(variant), tokens((6, 9)), (6, 9)
    at_zero = layer(x, (1.0, 0.5), shape)
    moved = layer(x, (1.0, 0.5), shape, input_origin=(1e5, -3.0))
    assert torch.equal(moved.x_out, at_zero.x_out)
    assert torch.equal(moved.assignment.matrix(), at_zero.assignment.matrix())
    assert moved.out_spacing == at_zero.out_spacing
    offset = [m - z for m, z in zip(moved.out_origin, at_zero.out_origin, strict=True)]
    assert offset == pytest.approx([1e5, -3.0])


@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_a_spacing_per_sample_is_the_samples_one_by_one(variant: str) -> None:
    layer, x, shape = make_layer(variant), tokens((6, 9), batch=3), (6, 9)
    spacings = torch.tensor([[1.0, 0.5], [0.25, 1.5], [2.0, 2.0]])
    together = layer(x, spacings, shape)
    assert_near(together.out_spacing, 2 * spacings, 1e-7)
    assert together.out_origin.shape == (3, 2)
    for i, spacing in enumerate(spacings.tolist()):
        alone = layer(x[i : i + 1], tuple(spacing), shape)
        assert_near(together.x_out[i : i + 1], alone.x_out, 1e-5)
        assert_near(together.assignment.matrix()[i : i + 1], alone.assignment.matrix(), 1e-5)
        assert together.out_origin[i].tolist() == pytest.approx(list(alone.out_origin))


@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_the_forms_of_a_spacing_agree_and_spacing_matters(variant: str) -> None:
    layer, x, shape = make_layer(variant, spacing=(1.0, 1.0)), tokens((6, 9)), (6, 9)
    want = layer(x, 1.0, shape).x_out
    for spacing in (None, (1.0, 1.0), [1.0, 1.0], torch.ones(2), torch.ones(2, 2)):
        assert_near(layer(x, spacing, shape).x_out, want, 1e-6)
    assert (layer(x, 0.3, shape).x_out - want).abs().max() > 1e-3


def test_the_spacing_of_the_constructor_is_the_default() -> None:
    layer = make_layer("dense", spacing=(0.5, 0.25))
    x = tokens((6, 9))
    default = layer(x, input_grid_shape=(6, 9))
    assert default.out_spacing == (1.0, 0.5)
    assert torch.equal(default.x_out, layer(x, (0.5, 0.25), (6, 9)).x_out)
    assert (default.x_out - layer(x, (0.25, 0.5), (6, 9)).x_out).abs().max() > 1e-3


def refined(variant: str, **options: object) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A layer, and the same one for a grid of half the spacing: kernel and stride in the same physical units."""
    coarse = make_layer(variant, kernel_size=4, stride=2, padding=1, **options).double()
    fine = make_layer(variant, kernel_size=8, stride=4, padding=2, **options).double()
    state = coarse.state_dict()
    state["proposal.weight"] = state["proposal.weight"].repeat_interleave(2, -1).repeat_interleave(2, -2) / 4
    fine.load_state_dict(state)
    return coarse, fine


@pytest.mark.parametrize("variant", BY_ATTENTION)
def test_refining_grid_and_spacing_together_changes_nothing_but_the_discretisation(variant: str) -> None:
    shape, x = (6, 8), tokens((6, 8)).double()
    twice = x.unflatten(1, shape).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
    # Without positions there is no discretisation error at all.
    coarse, fine = refined(variant, rotary_ratio=0.0)
    assert_near(fine(twice, 0.5, (12, 16)).x_out, coarse(x, 1.0, shape).x_out, 1e-9)
    # With positions, half a token's width is small against a wavelength of 120 tokens. Were spacing ignored,
    # everything would lie at twice the distance.
    coarse, fine = refined(variant, reference_spacing=20.0)
    want = coarse(x, 1.0, shape).x_out
    right = (fine(twice, 0.5, (12, 16)).x_out - want).abs().max()
    wrong = (fine(twice, 1.0, (12, 16)).x_out - want).abs().max()
    assert right < 2e-3
    assert wrong > 10 * right


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_sparse_with_a_window_over_everything_is_dense(ndim: int) -> None:
    dense = make_layer("dense", ndim)
    sparse = make_layer("sparse", ndim, neighborhood_kernel=15, seed=5)
    sparse.load_state_dict(dense.state_dict())
    x, shape = tokens(SHAPES[ndim]), SHAPES[ndim]
    mine, theirs = sparse(x, 0.5, shape), dense(x, 0.5, shape)
    assert_near(mine.x_out, theirs.x_out, 1e-5)
    assert_near(mine.assignment.matrix(), theirs.assignment.matrix(), 1e-5)


@pytest.mark.parametrize("dilation", [1, 2])
def test_sparse_memberships_stay_in_the_window(dilation: int) -> None:
    layer = make_layer("sparse", 1, neighborhood_kernel=3, neighborhood_dilation=dilation, stride=1)
    members = layer(tokens((9,)), 1.0).assignment.matrix()[0]
    distance = (torch.arange(9)[:, None] - torch.arange(9)).abs()
    assert torch.equal(members > 0, (distance == 0) | (distance == dilation))


@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_relative_bias_steers_memberships(variant: str) -> None:
    if variant == "dense":
        with pytest.raises(ValueError, match="relative_bias"):
            make_layer(variant, relative_bias=True)
        return
    layer = make_layer(variant, 1, relative_bias=True, rotary_ratio=0.0, stride=1)
    with torch.no_grad():
        layer.bias_table.zero_()
        layer.bias_table[:, -1] = 50.0
    if variant == "deformable":
        layer.offsets.reset_parameters()
    labels = layer(tokens((7,)), 1.0).assignment.labels()
    # The last entry is one group further on; where there is none, the tokens cannot follow.
    assert labels[:, :-1].tolist() == [[1, 2, 3, 4, 5, 6]] * 2


@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_many_iterations_stay_finite(variant: str) -> None:
    layer = make_layer(variant, iters=10, kernel_size=5)
    x = (10 * tokens((6, 9))).requires_grad_()
    output = layer(x, 1.0, (6, 9))
    output.x_out.square().sum().backward()
    assert output.x_out.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters() if parameter.grad is not None)
