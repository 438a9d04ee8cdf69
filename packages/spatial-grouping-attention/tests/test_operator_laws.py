"""What must hold of grouping whatever computes it: conservation, symmetry, duality, and nothing out of nothing."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_cases import BACKENDS, EVERY_BACKEND, TRITON, WINDOWED
from grouping_cases import (
    assert_near,
    cases,
    finite,
    gradients,
    make_case,
    members,
    neighbourhoods,
    oracle_pool,
    window_entries,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_calls import assign, group
from spatial_grouping_attention import Neighbourhood, functional

DENSE = tuple(name for name, served in BACKENDS.items() if served.dense)
# Kernel 1 with padding 3: the outer groups lie in the padding, and with a window of one group nobody sees them.
WITH_EMPTY_GROUPS = Neighbourhood((4, 2), (10, 4), 1, 1, (3, 1), 1)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@given(st.data())
def test_every_valid_token_spreads_one(backend: str, data: st.DataObject) -> None:
    case = data.draw(cases(backend))
    spread, lse = assign(replace(case, u=torch.ones_like(case.u)), backend)
    some = members(case)
    assert torch.equal(lse.isfinite(), some)
    assert torch.equal(lse == torch.inf, ~some)
    assert_near(spread, some[..., None].expand_as(spread).double(), 1e-12)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@given(st.data())
def test_the_masses_of_all_groups_add_up_to_the_tokens(backend: str, data: st.DataObject) -> None:
    case = data.draw(cases(backend))
    *_, log_mass = group(case, backend)
    assert_near(log_mass.exp().sum(-1), members(case).sum(-1).double(), 1e-12)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@given(st.data())
def test_averages_of_a_constant_are_the_constant(backend: str, data: st.DataObject) -> None:
    """Also where logits are so large that memberships underflow; 0 where there is no member at all."""
    case = data.draw(cases(backend, strength=data.draw(st.sampled_from((1.0, 30.0)))))
    constant = torch.arange(1.0, case.v.shape[-1] + 1, dtype=torch.float64)
    out, _, log_mass = group(replace(case, v=constant.expand_as(case.v)), backend)
    inhabited = log_mass > -torch.inf
    assert_near(out, torch.where(inhabited[..., None], constant, 0.0), 1e-9)


@pytest.mark.parametrize("backend", DENSE)
def test_permuting_tokens_and_groups_permutes_results(backend: str) -> None:
    case = make_case(None, 19, 7, valid="some", valid_groups="some")
    tokens, groups = torch.randperm(19), torch.randperm(7)
    shuffled = replace(
        case,
        q=case.q[:, :, groups],
        k=case.k[:, :, tokens],
        v=case.v[:, :, tokens],
        u=case.u[:, :, groups],
        valid=case.valid[:, tokens],
        valid_groups=case.valid_groups[:, groups],
    )
    out, lse, log_mass = group(case, backend)
    out_, lse_, log_mass_ = group(shuffled, backend)
    assert_near(out_, out[:, :, groups], 1e-12)
    assert_near(lse_, lse[:, :, tokens], 1e-12)
    assert_near(log_mass_, log_mass[:, :, groups], 1e-12)
    assert_near(assign(shuffled, backend)[0], assign(case, backend)[0][:, :, tokens], 1e-12)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@given(st.data())
def test_assign_and_mass_weighted_pool_are_adjoint(backend: str, data: st.DataObject) -> None:
    """<A u, v> over tokens equals <u, A^T v> over groups, and A^T v is the average times the mass."""
    case = data.draw(cases(backend))
    out, _, log_mass = group(case, backend)
    up, _ = assign(case, backend)
    over_tokens = (up * case.v).sum((-1, -2))
    over_groups = (case.u * out * log_mass.exp()[..., None]).sum((-1, -2))
    assert_near(over_tokens, over_groups, 1e-9, size=1.0)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@given(st.data())
def test_grouping_is_pool_with_the_normalisers_of_assign(backend: str, data: st.DataObject) -> None:
    case = data.draw(cases(backend))
    out, lse, _ = group(case, backend)
    _, assigned = assign(case, backend)
    assert_near(lse, assigned, 1e-12)
    pooled = functional.pool(case.q, case.k, case.v, assigned, case.neighbourhood, backend=backend, **case.options)
    assert_near(pooled, out, 1e-9)
    # A normaliser of +inf says by itself that its token belongs to nobody.
    options = {**case.options, "valid": None}
    unsaid = functional.pool(case.q, case.k, case.v, assigned, case.neighbourhood, backend=backend, **options)
    assert_near(unsaid, out, 1e-9)
    pair = functional.grouping_attention(case.q, case.k, case.v, case.neighbourhood, backend=backend, **case.options)
    assert torch.equal(pair[0], out)
    assert torch.equal(pair[1], lse)


@pytest.mark.parametrize("backend", WINDOWED)
@given(st.data())
def test_a_window_over_everything_is_no_window(backend: str, data: st.DataObject) -> None:
    neighbourhood = data.draw(neighbourhoods(covering=True))
    case = make_case(neighbourhood, seed=data.draw(st.integers(0, 999)), valid="some")
    want = group(replace(case, neighbourhood=None), "reference")
    for got, expected in zip(group(case, backend), want, strict=True):
        assert_near(got, expected, 1e-12)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@settings(max_examples=10)
@given(st.data())
def test_what_is_not_valid_has_no_influence(backend: str, data: st.DataObject) -> None:
    case = data.draw(cases(backend))
    valid = torch.rand(case.k.shape[0], case.k.shape[2]) < 0.6
    valid_groups = torch.rand(case.q.shape[0], case.q.shape[2]) < 0.6
    case = replace(case, valid=valid, valid_groups=valid_groups)
    outside = {"k": ~valid, "v": ~valid, "q": ~valid_groups, "u": ~valid_groups}
    outside = {name: nobody[:, None, :, None] for name, nobody in outside.items()}
    other = replace(case, **{name: getattr(case, name).masked_fill(x, 7.0) for name, x in outside.items()})
    for function in (group, assign):
        for got, want in zip(function(other, backend), function(case, backend), strict=True):
            assert_near(got, want, 1e-12)
        leaves = case.leaves()
        grads = gradients(function(case.with_leaves(leaves), backend), leaves)
        for name, nobody in outside.items():
            assert grads[name].masked_select(nobody).eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", WINDOWED)
def test_groups_that_nobody_sees_are_zero_forward_and_backward(backend: str, dtype: torch.dtype) -> None:
    case = make_case(WITH_EMPTY_GROUPS, bias="table").to(dtype)
    empty = (window_entries(WITH_EMPTY_GROUPS) < 0).all(0)
    assert 0 < empty.sum() < len(empty)
    leaves = case.leaves()
    out, lse, log_mass = group(case.with_leaves(leaves), backend)
    assert (log_mass[..., empty] == -torch.inf).all()
    assert log_mass[..., ~empty].isfinite().all()
    assert out[:, :, empty].eq(0).all()
    assert out[:, :, ~empty].ne(0).all()
    grads = gradients((out, lse, log_mass), leaves)
    assert all(grad.isfinite().all() for grad in grads.values())
    assert grads["q"][:, :, empty].eq(0).all()


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_samples_without_a_valid_token_are_zero_forward_and_backward(backend: str) -> None:
    neighbourhood = Neighbourhood((8,), (4,), 2, 3, 1, 7)
    case = make_case(neighbourhood, valid="none in one sample").to(torch.float32)
    leaves = case.leaves()
    results = (*group(case.with_leaves(leaves), backend), *assign(case.with_leaves(leaves), backend))
    grads = gradients(results, leaves)
    out, lse, log_mass, up, _ = (x[-1] for x in results)
    assert out.eq(0).all()
    assert up.eq(0).all()
    assert (lse == torch.inf).all()
    assert (log_mass == -torch.inf).all()
    for name in "qkvu":
        assert grads[name][-1].eq(0).all()
        assert grads[name][0].ne(0).any()
    # The gradient that arrives at such a sample may be anything at all, even one that ignores what is infinite.
    case_leaves = case.leaves()
    group(case.with_leaves(case_leaves), backend)[0].sum().backward()
    assert all(case_leaves[name].grad.isfinite().all() for name in "qkv")


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_strides_of_the_operands_do_not_matter(backend: str) -> None:
    """Heads are usually a view of (B, N, H * D), and gradients may arrive expanded."""
    neighbourhood = Neighbourhood((6, 5), (3, 3), 2, 3, 1, 5)
    case = make_case(neighbourhood, bias="table" if "table" in BACKENDS[backend].biases else None, valid="some")

    channels_first = {name: getattr(case, name).mT.contiguous().mT for name in "qkvu"}
    for got, want in zip(group(replace(case, **channels_first), backend), group(case, backend), strict=True):
        assert_near(got, want, 1e-12)

    def strided(x: torch.Tensor) -> torch.Tensor:
        spaced = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, dtype=x.dtype).transpose(1, 2).contiguous()
        view = spaced[..., ::2].transpose(1, 2)
        view.copy_(x)
        assert not view.is_contiguous()
        return view

    loose = replace(case, q=strided(case.q), k=strided(case.k), v=strided(case.v), u=strided(case.u))
    for got, want in zip(group(loose, backend), group(case, backend), strict=True):
        assert_near(got, want, 1e-12)
    grads = []
    for arguments in (case, loose):
        leaves = {name: getattr(arguments, name).detach().requires_grad_() for name in "qkvu"}
        arguments = arguments.with_leaves(leaves)
        total = group(arguments, backend)[0].sum() + assign(arguments, backend)[0].sum()
        grads.append(torch.autograd.grad(total, list(leaves.values())))
    for got, want in zip(*grads, strict=True):
        assert_near(got, want, 1e-12)


@pytest.mark.parametrize("token_major", [False, True])
@pytest.mark.parametrize("backend", ["fused", "tiled", pytest.param("native", marks=pytest.mark.native), TRITON])
def test_results_lie_in_memory_as_the_values_do(backend: str, token_major: bool) -> None:
    """So that heads that are views of (B, N, H * D) are such views afterwards, and joining them copies nothing."""
    case = make_case(Neighbourhood((6, 5), (3, 3), 2, 3, 1, 5), valid="some").to(torch.float32)
    if token_major:
        values = {name: getattr(case, name).transpose(1, 2).contiguous().transpose(1, 2) for name in "vu"}
        case = replace(case, **values)
    for call in (group, assign):
        out = call(case, backend)[0]
        assert (out.transpose(1, 2) if token_major else out).is_contiguous()


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_autocast_leaves_sums_in_float32(backend: str) -> None:
    neighbourhood = Neighbourhood((6, 5), (3, 3), 2, 3, 1, 5)
    for dtype in (torch.float32, torch.bfloat16):
        case = make_case(neighbourhood, valid="some").to(dtype)
        leaves, plain_leaves = case.leaves(), case.leaves()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = (*group(case.with_leaves(leaves), backend), *assign(case.with_leaves(leaves), backend))
            pooled = functional.pool(case.q, case.k, case.v, case.lse, neighbourhood, backend=backend)
        plain = case.with_leaves(plain_leaves)
        want = (*group(plain, backend), *assign(plain, backend))
        assert [x.dtype for x in got] == [dtype, torch.float32, torch.float32, dtype, torch.float32]
        for mine, theirs in zip(got, want, strict=True):
            assert torch.equal(mine, theirs)
        assert torch.equal(pooled, functional.pool(case.q, case.k, case.v, case.lse, neighbourhood, backend=backend))
        expected = gradients(want, plain_leaves)
        # Torch recommends to leave the context before backward; what is written by hand must not care.
        for inside in (False,) if BACKENDS[backend].twice else (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
                grads = gradients(got, leaves, retain=True)
            for name, grad in grads.items():
                assert torch.equal(grad, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_normalisers_keep_float32_accuracy_in_half_types(backend: str, dtype: torch.dtype) -> None:
    """Far from zero, a bfloat16 next to a normaliser of 200 is a whole unit away: a factor of e in every weight."""
    case = make_case(Neighbourhood((9,), (5,), 2, 3, 1, 9), seed=3).to(dtype)
    case = replace(case, lse=case.lse + 200.0)
    want, _ = oracle_pool(case.to(torch.float64))
    got = functional.pool(case.q, case.k, case.v, case.lse, case.neighbourhood, backend=backend)
    assert_near(got, want, 5e-3)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_no_samples_are_fine(backend: str) -> None:
    case = make_case(Neighbourhood((6,), (3,), 2, 3, 1, 5), batch=0)
    leaves = case.leaves()
    out, lse, _ = group(case.with_leaves(leaves), backend)
    up, _ = assign(case.with_leaves(leaves), backend)
    assert (out.shape, lse.shape, up.shape) == ((0, 2, 3, 5), (0, 2, 6), (0, 2, 6, 5))
    (out.sum() + up.sum()).backward()
    assert leaves["q"].grad.shape == (0, 2, 3, 8)


@pytest.fixture
def poisoned() -> None:
    """Everything that torch allocates without filling it, also inside of its kernels, is full of NaN."""
    settings: Any = torch.utils.deterministic  # whose attributes no type declares
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    settings.fill_uninitialized_memory = before[1]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_uninitialised_memory_never_leaks(backend: str, dtype: torch.dtype) -> None:
    served = BACKENDS[backend]
    geometries = [WITH_EMPTY_GROUPS, Neighbourhood((2, 13), (6, 5), (1, 3), (1, 2), (2, 1), 3, (1, 2))]
    if not served.windowed:
        geometries = [Neighbourhood((7,), (3,), 3, 3, 1, 5)]
    for neighbourhood in geometries:
        case = make_case(neighbourhood, bias=served.biases[-1], valid="none in one sample").to(dtype)
        leaves = case.leaves()
        loaded = case.with_leaves(leaves)
        pooled = functional.pool(
            loaded.q, loaded.k, loaded.v, loaded.lse, neighbourhood, backend=backend, **loaded.options
        )
        results = (*group(loaded, backend), *assign(loaded, backend), pooled)
        assert not any(x.isnan().any() for x in results)
        for name, grad in gradients(tuple(finite(x) for x in results), leaves).items():
            assert not grad.isnan().any(), name


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_what_excluded_tokens_hold_does_not_matter(backend: str) -> None:
    """Padding may be anything, NaN included."""
    neighbourhood = Neighbourhood((6, 5), (3, 3), 2, 3, 1, 5)
    case = make_case(neighbourhood, valid="some", valid_groups="some")
    tokens, groups = ~case.valid[:, None, :, None], ~case.valid_groups[:, None, :, None]
    spoilt = replace(
        case,
        k=case.k.masked_fill(tokens, torch.nan),
        v=case.v.masked_fill(tokens, torch.nan),
        q=case.q.masked_fill(groups, torch.nan),
        u=case.u.masked_fill(groups, torch.nan),
    )
    for function in (group, assign):
        results = [function(given.with_leaves(given.leaves()), backend) for given in (spoilt, case)]
        for got, want in zip(*results, strict=True):
            assert_near(got, want, 1e-12)
    leaves = spoilt.leaves()
    for name, grad in gradients(
        (*group(spoilt.with_leaves(leaves), backend), *assign(spoilt.with_leaves(leaves), backend)), leaves
    ).items():
        assert not grad.isnan().any(), name


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_groups_that_are_not_valid_are_not_there(backend: str) -> None:
    """Hiding the last groups of a dense problem is having fewer."""
    case = make_case(Neighbourhood((12,), (6,), 2, 3, 1, 11), seed=5)
    hidden = replace(case, valid_groups=torch.arange(6).expand(2, 6) < 4)
    fewer = replace(case, neighbourhood=None, q=case.q[:, :, :4], u=case.u[:, :, :4])
    for got, want in zip(assign(hidden, backend), assign(fewer, "reference"), strict=True):
        assert_near(got, want, 1e-12)
    (out, lse, log_mass), (out_, lse_, log_mass_) = group(hidden, backend), group(fewer, "reference")
    assert_near(out[:, :, :4], out_, 1e-12)
    assert_near(lse, lse_, 1e-12)
    assert_near(log_mass[..., :4], log_mass_, 1e-12)
    assert out[:, :, 4:].eq(0).all()
    assert (log_mass[..., 4:] == -torch.inf).all()
