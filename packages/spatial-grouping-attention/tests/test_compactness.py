"""Compactness: logits are lowered by the squared distance of token and group, in units of the group spacing."""

import math
from dataclasses import replace

import pytest
import torch
from engine_cases import EVERY_BACKEND, WINDOWED
from grouping_cases import assert_near, finite, make_case, oracle_group, squared_distances
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import VARIANTS, make_layer, mostly_slow, slow, tokens
from operator_calls import OPERATORS, call, group
from spatial_grouping_attention import Neighbourhood, WindowedSelfAttention, functional
from spatial_grouping_attention.backends import deformable
from spatial_grouping_attention.backends.fused import frames

BACKENDS_AND_FORMS = [(backend, form) for backend in EVERY_BACKEND for form in ("windowed", "covering")]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def served(backend: str, form: str) -> bool:
    return (backend in WINDOWED) if form == "windowed" else True


def relation(form: str, *shape: int, stride: int = 2, kernel: int = 3, padding: int = 1) -> Neighbourhood:
    groups = tuple((n + 2 * padding - kernel) // stride + 1 for n in shape)
    window = tuple(2 * g - 1 for g in groups) if form == "covering" else 3
    return Neighbourhood(shape, groups, stride, kernel, padding, window)


def empty(neighbourhood: Neighbourhood, dtype: torch.dtype, heads: int = 2) -> tuple[torch.Tensor, ...]:
    """Queries and keys that say nothing."""
    return tuple(torch.zeros(1, heads, n, 4, dtype=dtype) for n in (neighbourhood.num_groups, neighbourhood.num_inputs))


def calls(*forms: str) -> list[tuple[str, str]]:
    return [pair for pair in BACKENDS_AND_FORMS if served(*pair) and pair[1] in (forms or pair)]


@pytest.mark.parametrize(("backend", "form"), calls())
@pytest.mark.parametrize("shape", [(4096,), (3, 2, 512), *slow(((4096, 3),))], ids=str)
@pytest.mark.parametrize("dtype", mostly_slow(*TOLERANCE), ids=str)
def test_without_content_memberships_are_the_closed_form(
    backend: str, form: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Far from the origin too: a grid of 4096 an axis is as exact as a small one, forward and to the factor."""
    if backend == "reference" or (form == "covering" and backend == "tiled"):
        shape = tuple(min(n, 96) for n in shape)  # which hold the whole matrix
    neighbourhood = relation(form, *shape)
    q, k = empty(neighbourhood, dtype)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(1, 2, neighbourhood.num_inputs, 3, generator=generator).to(dtype)
    weights = torch.randn(1, 2, neighbourhood.num_groups, 3, generator=generator)
    beta = torch.tensor([0.3, 4.0], requires_grad=True)
    out, lse = functional.grouping_attention(q, k, v, neighbourhood, compactness=beta, backend=backend)
    (dbeta,) = torch.autograd.grad((out * weights).sum(), beta)

    want_out, want_lse, want_dbeta = closed_form(neighbourhood, v, weights, beta.detach().double())
    assert_near(out, want_out, TOLERANCE[dtype])
    assert_near(lse, want_lse, 1e-5, size=1.0)
    assert_near(dbeta, want_dbeta, max(TOLERANCE[dtype], 1e-4))


@pytest.mark.parametrize("stride", [3, 7])
@pytest.mark.parametrize(("backend", "form"), calls())
def test_strides_that_are_no_powers_of_two_lose_no_digits(backend: str, form: str, stride: int) -> None:
    """Far from the origin such a place is no float32, so places must be subtracted before they are divided."""
    neighbourhood = relation(form, 1500, stride=stride, kernel=stride, padding=0)
    q, k = empty(neighbourhood, torch.float32)
    v = torch.randn(1, 2, 1500, 3, generator=torch.Generator().manual_seed(0))
    beta = torch.tensor([1.9, 7.0])
    got = functional.grouping_attention(q, k, v, neighbourhood, compactness=beta, backend=backend)
    want = closed_form(neighbourhood, v, torch.ones(()), beta.double())
    assert_near(got[0], want[0], 1e-5)
    assert_near(got[1], want[1], 1.5e-5, size=1.0)


def test_distances_of_points_on_the_border_have_their_whole_gradient() -> None:
    """A point that starts on the last group is in the box, not beyond it."""
    neighbourhood = relation("windowed", 8)
    starts = torch.full((8, 1, 1), neighbourhood.num_groups - 1)
    offsets = torch.zeros(1, 1, 8, 1, 1, requires_grad=True)
    groups = deformable.lattice(neighbourhood.output_shape)
    deformable.squared_distances(neighbourhood.places(), neighbourhood.stride, starts, offsets, groups).sum().backward()
    apart = (neighbourhood.num_groups - 1) - torch.arange(8.0) / 2
    assert_near(offsets.grad.flatten(), 2 * apart, 1e-6)


def test_deformable_distances_lose_no_digits_far_from_the_origin() -> None:
    neighbourhood = relation("windowed", 4095, stride=3)
    cells = neighbourhood.cells()[:, None, :] + torch.tensor([[-1], [0], [1]])
    groups = deformable.lattice(neighbourhood.output_shape)
    offsets = torch.zeros(1, 1, 4095, 3, 1)
    got = deformable.squared_distances(neighbourhood.places(), neighbourhood.stride, cells, offsets, groups)
    starts = cells.clamp(0, neighbourhood.num_groups - 1)
    want = (torch.arange(4095.0).double()[:, None] / 3 - starts[..., 0]).square()
    assert_near(got[0, 0], want, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("stride", [300, 511])
def test_groups_may_lie_far_apart(stride: int, dtype: torch.dtype) -> None:
    """A group spacing wider than a patch of whole numbers may be."""
    neighbourhood = relation("covering", 4 * stride, stride=stride, kernel=stride, padding=0)
    case = make_case(neighbourhood, batch=1, head_size=4, value_size=2, compact=True).to(dtype)
    for got, want in zip(group(case, "fused"), oracle_group(case.to(torch.float64)), strict=True):
        assert_near(got, want, {torch.float64: 1e-9, torch.float32: 2e-5}[dtype])


@pytest.mark.parametrize("factor", [0.0, 5e-324, 1e-40])
@pytest.mark.parametrize(("backend", "form"), calls())
def test_no_factor_is_too_small(backend: str, form: str, factor: float) -> None:
    case = make_case(relation(form, 20), compact=True)
    without = group(replace(case, compactness=None), backend)
    with_it = group(replace(case, compactness=torch.full((2,), factor, dtype=torch.float64)), backend)
    for got, want in zip(with_it, without, strict=True):
        assert_near(got, want, 1e-12)


@pytest.mark.parametrize("valid", [None, "some"])
@pytest.mark.parametrize(("backend", "form"), calls())
def test_mapped_calls_have_factors_and_gradients_of_their_own(backend: str, form: str, valid: str | None) -> None:
    case = make_case(relation(form, 11), valid=valid, compact=True)

    def loss(q: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
        terms = [finite(x).sin().sum() for x in group(replace(case, q=q, compactness=beta), backend)]
        return torch.stack(terms).sum()

    qs, betas = (torch.stack([x, 0.5 * x, 2 * x]) for x in (case.q, case.compactness))
    for dims in ((0, 0), (None, 0), (0, None)):
        operands = [x[0] if dim is None else x for x, dim in zip((qs, betas), dims, strict=True)]
        got = torch.func.vmap(torch.func.grad(loss, (0, 1)), dims)(*operands)
        for i in range(3):
            alone = [x if dim is None else x[i] for x, dim in zip(operands, dims, strict=True)]
            alone = [x.clone().requires_grad_() for x in alone]
            for a, b in zip(got, torch.autograd.grad(loss(*alone), alone), strict=True):
                assert_near(a[i], b, 1e-9)


def closed_form(
    neighbourhood: Neighbourhood, v: torch.Tensor, weights: torch.Tensor, beta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Averages, normalisers and the gradient to beta in float64; without content all are products over the axes."""
    beta = beta.clone().requires_grad_()
    out, lse = v.double().unflatten(2, neighbourhood.input_shape)[0], torch.zeros(2, *(1,) * neighbourhood.ndim)
    for number, axis in enumerate(neighbourhood.axes):
        index, groups = torch.arange(axis.size).double(), torch.arange(axis.groups)
        places = (index - (axis.kernel - 1) / 2 + axis.padding) / axis.stride
        cells = torch.tensor([axis.cell(i) for i in range(axis.size)])
        logits = -beta[:, None, None] * (places[:, None] - groups).square()
        logits = logits.masked_fill((cells[:, None] - groups).abs() > axis.reach, -torch.inf)
        members = logits.softmax(-1)
        shares = members / members.sum(1, keepdim=True)
        rows = out.movedim(1 + number, -1)
        out = (rows.flatten(1, -2) @ shares).unflatten(1, rows.shape[1:-1]).movedim(-1, 1 + number)
        lse = lse + logits.logsumexp(-1).view(2, *(-1 if a == number else 1 for a in range(neighbourhood.ndim)))
    out, lse = out.flatten(1, -2)[None], lse.flatten(1)[None]
    (dbeta,) = torch.autograd.grad((out * weights).sum(), beta)
    return out, lse, dbeta


@pytest.mark.parametrize(("backend", "form"), calls())
@pytest.mark.parametrize("operator", OPERATORS)
def test_anisotropic_grids_are_measured_in_group_units(operator: str, backend: str, form: str) -> None:
    """Whatever stride, kernel and padding an axis has, only (i - centre)/stride - j counts."""
    shape, stride, kernel, padding = (13, 12), (3, 2), (3, 4), (0, 1)
    groups = tuple((n + 2 * p - k) // s + 1 for n, s, k, p in zip(shape, stride, kernel, padding, strict=True))
    window = tuple(2 * g - 1 for g in groups) if form == "covering" else (3, 5)
    case = make_case(Neighbourhood(shape, groups, stride, kernel, padding, window), compact=True)
    pairs = -case.compactness[None, :, None, None] * squared_distances(case.neighbourhood)
    by_hand = replace(case, compactness=None, pair_bias=pairs)
    for got, want in zip(call(operator, case, backend), call(operator, by_hand, "reference"), strict=True):
        assert_near(got, want, 1e-9)


@pytest.mark.parametrize(("backend", "form"), calls())
def test_a_large_factor_gives_the_nearest_group(backend: str, form: str) -> None:
    neighbourhood = relation(form, 10, 9)
    case = make_case(neighbourhood, head_size=4)
    squares = squared_distances(neighbourhood)
    two = squares.topk(2, largest=False).values
    alone = two[:, 1] - two[:, 0] > 0.1  # tokens half way between two groups have two nearest
    assert 0 < alone.sum() < alone.numel()
    one_hot = torch.eye(neighbourhood.num_groups, dtype=torch.float64).expand(2, 2, -1, -1)
    factors = torch.full((2,), 1e4, dtype=torch.float64)
    members, _ = functional.assign(case.q, case.k, one_hot, neighbourhood, compactness=factors, backend=backend)
    nearest = squares.argmin(-1)
    assert torch.equal(members.argmax(-1)[..., alone], nearest[alone].expand(2, 2, -1))
    assert_near(members.amax(-1)[..., alone], torch.ones(2, 2, int(alone.sum())), 1e-6)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_labels_of_a_large_factor_are_the_nearest_groups(variant: str, padded: bool) -> None:
    layer = make_layer(variant, kernel_size=4, stride=2, padding=1, compactness=1e4)
    with torch.no_grad():
        layer.raw_compactness.fill_(1e4)
    valid = torch.ones(2, 12, 10, dtype=torch.bool)
    if padded:
        valid[:, 8:] = False
    members = layer(tokens((12, 10)), 1.0, (12, 10), valid=valid if padded else None).assignment
    squares = squared_distances(layer.neighbourhood((12, 10)))
    want = squares.argmin(-1).masked_fill(~valid.flatten(1), -1)
    if variant == "deformable":  # whose points have wandered off: what they found is near all the same
        found = members.labels().clamp(min=0)
        near = squares[torch.arange(120), found[0]].sqrt()[valid[0].flatten()]
        assert near.max() < 1.5
        return
    assert torch.equal(members.labels(), want)


@pytest.mark.parametrize("variant", VARIANTS)
def test_moving_the_grid_changes_nothing(variant: str) -> None:
    layer = make_layer(variant, compactness=2.0).double()
    x = tokens((6, 9)).double()
    here = layer(x, (0.5, 2.0), (6, 9))
    there = layer(x, (0.5, 2.0), (6, 9), input_origin=(1e3, -70.0))
    assert_near(there.x_out, here.x_out, 1e-9)
    assert_near(there.assignment.matrix(), here.assignment.matrix(), 1e-9)


@pytest.mark.parametrize("variant", ["dense", "sparse"])
def test_a_refined_grid_has_the_groups_of_the_coarse_one(variant: str) -> None:
    """Half the spacing, twice kernel and stride: groups lie where they lay, and their spacing is still the unit."""
    options = {"rotary_ratio": 0.0, "compactness": 2.0}
    coarse = make_layer(variant, 1, kernel_size=4, stride=2, padding=1, **options).double()
    fine = make_layer(variant, 1, kernel_size=8, stride=4, padding=2, **options).double()
    state = coarse.state_dict()
    state["proposal.weight"] = state["proposal.weight"].repeat_interleave(2, -1) / 2
    fine.load_state_dict(state)

    def content(places: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.sin(places * (c + 1) / 40) for c in range(8)], -1)[None]

    want = coarse(content(torch.arange(64.0).double()), 1.0, (64,))
    x = content(torch.arange(128).double() / 2 - 0.25)
    inner = slice(3, -3)
    errors = []
    for factor in (1.0, 4.0):  # and what counting in tokens would be
        with torch.no_grad():
            fine.raw_compactness.copy_((factor * coarse.raw_compactness.exp().log1p()).expm1().log())
        got = fine(x, 0.5, (128,), input_origin=-0.25)
        assert (got.out_grid_shape, got.out_spacing, got.out_origin) == ((32,), want.out_spacing, want.out_origin)
        errors.append((got.x_out - want.x_out)[:, inner].abs().max().item())
    assert errors[0] < 0.02
    assert errors[1] > 3 * errors[0]


def test_far_groups_are_left_out_only_where_nobody_can_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the dense kernels skip keys beyond a horizon: results and gradients stay those of all pairs."""
    seen: list[float] = []
    horizon = frames._horizon

    def watched(*args: object) -> float:
        seen.append(horizon(*args))
        return seen[-1]

    monkeypatch.setattr(frames, "_horizon", watched)
    neighbourhood = relation("covering", 90)
    for strength, factor in ((1.0, 3.0), (4.0, 1.0), (1.0, 0.01)):
        case = make_case(neighbourhood, batch=1, head_size=4, strength=strength, compact=True)
        case = replace(case, compactness=torch.tensor([factor, 2 * factor], dtype=torch.float64))
        mine, theirs = case.leaves(), case.leaves()
        got, want = group(case.with_leaves(mine), "fused"), oracle_group(case.with_leaves(theirs))
        for a, b in zip(got, want, strict=True):
            assert_near(a, b, 1e-9)
        (sum(x.sin().sum() for x in got)).backward()
        (sum(x.sin().sum() for x in want)).backward()
        for name in ("q", "k", "v", "compactness"):
            assert_near(mine[name].grad, theirs[name].grad, 1e-9, name)
    assert min(seen) < 10 < 45 < max(seen)


@settings(max_examples=30)
@given(st.integers(0, 2**16), st.floats(-3, 3), st.booleans())
def test_a_neglected_group_keeps_its_average_beyond_the_horizon(seed: int, log_factor: float, starved: bool) -> None:
    """Shares within a group count, however small its mass: the bound must hold for those."""
    neighbourhood = relation("covering", 60)
    case = make_case(neighbourhood, batch=1, head_size=3, seed=seed, compact=True)
    q = case.q.clone()
    if starved:
        q[:, :, 7] -= 12 * case.k.mean(2)
    factor = torch.full((2,), math.exp(log_factor), dtype=torch.float64)
    case = replace(case, q=q, compactness=factor)
    for got, want in zip(group(case, "fused"), oracle_group(case), strict=True):
        assert_near(got, want, 1e-9)


def test_masks_take_away_what_is_nearest() -> None:
    """A group all of whose near tokens are padding averages the far ones."""
    neighbourhood = relation("covering", 80)
    case = make_case(neighbourhood, batch=1, valid="some", compact=True)
    case.valid[:] = False
    case.valid[0, :3] = True
    for got, want in zip(group(case, "fused"), oracle_group(case), strict=True):
        assert_near(got, want, 1e-9)


def test_what_is_refused() -> None:
    neighbourhood = relation("windowed", 8, 8)
    case = make_case(neighbourhood)
    q, k, v = case.q, case.k, case.v
    for compactness, error, match in (
        (torch.ones(3, dtype=torch.float64), ValueError, r"compactness must have shape \(H=2\)"),
        (torch.ones(2, dtype=torch.int64), TypeError, "compactness must be"),
    ):
        with pytest.raises(error, match=match):
            functional.grouping_attention(q, k, v, neighbourhood, compactness=compactness)
    with pytest.raises(ValueError, match="compactness needs a neighbourhood"):
        functional.grouping_attention(q, k, v, compactness=torch.ones(2))
    for variant in VARIANTS.values():
        with pytest.raises(ValueError, match="compactness must be greater than 0"):
            variant(8, 2, 3, 2, compactness=0.0)
    with pytest.raises(TypeError, match="compactness must be a real number"):
        WindowedSelfAttention(8, 2, compactness="2")


@pytest.mark.parametrize("variant", [*VARIANTS, "windowed self-attention"])
def test_it_starts_as_asked_is_learned_and_survives_half_types(variant: str) -> None:
    make = VARIANTS.get(variant)
    layer = make(8, 2, 3, 2, compactness=2.0) if make else WindowedSelfAttention(8, 2, compactness=2.0)
    assert_near(torch.nn.functional.softplus(layer.raw_compactness), torch.full((2,), 2.0), 1e-6)
    out = layer(tokens((6, 9)), 1.0, (6, 9))
    (out if make is None else out.x_out).square().sum().backward()
    assert layer.raw_compactness.grad.abs().min() > 0
    with torch.no_grad():
        layer.raw_compactness.zero_()
    layer.reset_parameters()
    assert_near(torch.nn.functional.softplus(layer.raw_compactness), torch.full((2,), 2.0), 1e-6)
    want = layer(tokens((6, 9)), 1.0, (6, 9))
    half = layer.bfloat16()(tokens((6, 9)).bfloat16(), 1.0, (6, 9))
    got, want = (half, want) if make is None else (half.x_out, want.x_out)
    assert_near(got, want, 0.05)
