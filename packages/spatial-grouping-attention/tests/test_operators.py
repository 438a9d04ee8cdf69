"""Every backend against the definition of grouping, forward and in every gradient, over random geometry."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_cases import BACKENDS, ELSEWHERE, EVERY_BACKEND, WINDOWED
from grouping_cases import (
    Case,
    assert_near,
    cases,
    gradients,
    make_case,
    natural_sizes,
    oracle_assign,
    oracle_group,
    oracle_pool,
    oracle_scores,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_calls import OPERATORS, call
from spatial_grouping_attention import Neighbourhood, functional
from spatial_grouping_attention.backends import Backend
from spatial_grouping_attention.backends.tiled import chunks

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def oracle(operator: str, case: Case) -> tuple[torch.Tensor, ...]:
    return {"assign": oracle_assign, "pool": lambda c: oracle_pool(c)[:1], "group": oracle_group}[operator](case)


def check(case: Case, backend: str, dtype: torch.dtype, *, slack: float = 1.0) -> None:
    """All operators and all their gradients agree with the oracle on the very numbers of ``dtype``."""
    case = case.to(dtype)
    exact = case.to(torch.float64)
    sizes = natural_sizes(exact)
    tolerance = TOLERANCE[dtype] * slack
    for operator in OPERATORS:
        got_leaves, want_leaves = case.leaves(), exact.leaves()
        got = call(operator, case.with_leaves(got_leaves), backend)
        want = oracle(operator, case.with_leaves(want_leaves))
        for i, (mine, theirs) in enumerate(zip(got, want, strict=True)):
            assert mine.dtype == (dtype if i == 0 else torch.promote_types(dtype, torch.float32))
            size = sizes["out" if i == 0 else "log"]
            assert_near(mine, theirs, tolerance, f"{operator} result {i}", size=size)
        got_grads, want_grads = gradients(got, got_leaves), gradients(want, want_leaves)
        for name, want_grad in want_grads.items():
            assert got_grads[name].dtype == got_leaves[name].dtype
            assert_near(got_grads[name], want_grad, tolerance, f"{operator} gradient to {name}", size=sizes[name])


def test_every_backend_is_tested() -> None:
    assert {b.value for b in Backend} == {"auto", *BACKENDS, *ELSEWHERE}
    for name in ELSEWHERE:
        assert Path(__file__).with_name(f"test_{name}.py").is_file()


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@settings(max_examples=40)
@given(st.data())
def test_float64(backend: str, data: st.DataObject) -> None:
    check(data.draw(cases(backend)), backend, torch.float64)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@settings(max_examples=15)
@given(st.data())
def test_float32(backend: str, data: st.DataObject) -> None:
    check(data.draw(cases(backend)), backend, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", EVERY_BACKEND)
@settings(max_examples=10)
@given(st.data())
def test_half_types(backend: str, dtype: torch.dtype, data: st.DataObject) -> None:
    check(data.draw(cases(backend)), backend, dtype)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@settings(max_examples=15)
@given(st.data())
def test_large_logits_starve_groups_but_averages_stay_exact(backend: str, data: st.DataObject) -> None:
    """Memberships of starved groups are as small as exp(-300), far below what float32 can hold."""
    case = data.draw(cases(backend, strength=30.0))
    check(case, backend, torch.float64)
    # A logit of 200 cannot be known to better than 200 roundings.
    scores, _ = oracle_scores(case)
    check(case, backend, torch.float32, slack=max(1.0, scores.abs().max().item() / 10))


LARGER = {
    "1-D": Neighbourhood((131,), (66,), 2, 3, 1, 5),
    "1-D dilated": Neighbourhood((97,), (97,), 1, 1, 0, 3, 4),
    "2-D": Neighbourhood((23, 18), (12, 9), 2, (3, 4), 1, 3),
    "2-D anisotropic": Neighbourhood((9, 31), (9, 8), (1, 4), (3, 7), (1, 3), (5, 3), (2, 1)),
    "3-D": Neighbourhood((6, 11, 10), (6, 6, 5), (1, 2, 2), (3, 5, 5), (1, 2, 2), 3),
    "3-D wide": Neighbourhood((5, 8, 8), (5, 4, 4), (1, 2, 2), 3, 1, 9),
}


@pytest.mark.parametrize("geometry", LARGER)
@pytest.mark.parametrize("backend", WINDOWED)
def test_larger_grids(backend: str, geometry: str) -> None:
    """Many tiles along every axis, with their halos."""
    case = make_case(LARGER[geometry], bias="table", valid="some", valid_groups="some", batch=1, heads=3, head_size=6)
    check(case, backend, torch.float64)


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_a_dense_problem_of_several_blocks(backend: str) -> None:
    """Fused kernels work in blocks of tokens; sizes here do not divide by any of them."""
    covering = Neighbourhood((577,), (293,), 2, 3, 5, 585)
    case = make_case(covering, batch=1, heads=2, head_size=12, value_size=20, valid="some", valid_groups="some")
    check(case, backend, torch.float64)
    check(case, backend, torch.float32)


def test_biases_of_one_shape_are_told_apart_by_their_names() -> None:
    """Three tokens along the last axis, three groups, a window of three: a table and all pairs are (1, 1, 3, 3)."""
    neighbourhood = Neighbourhood((1, 1, 3), (1, 1, 3), 1, 1, 0, (1, 3, 3))
    case = make_case(neighbourhood, heads=1, batch=1, bias="both")
    assert case.bias.shape == case.pair_bias.shape == (1, 1, 3, 3)
    for one in ({"bias": None}, {"pair_bias": None}, {}):
        check(replace(case, **one), "reference", torch.float64)


@pytest.mark.parametrize("neighbourhood", [None, Neighbourhood((6, 5), (3, 3), 2, 3, 1, 3)], ids=["dense", "windowed"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_bias_that_can_be_no_table_is_one_of_pairs(operator: str, neighbourhood: Neighbourhood | None) -> None:
    case = make_case(neighbourhood, 30, 9, bias="full")
    as_bias = replace(case, bias=case.pair_bias, pair_bias=None)
    if operator == "group":
        arguments = (case.q, case.k, case.v, neighbourhood)
        got, want = (functional.grouping_attention(*arguments, **x.options) for x in (as_bias, case))
    else:
        got, want = (call(operator, x, "auto") for x in (as_bias, case))
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)
    assert functional.select(case.q, neighbourhood, bias=case.pair_bias).backend == "reference"


@pytest.mark.parametrize("backend", WINDOWED)
@settings(max_examples=15)
@given(st.data())
def test_chunking_changes_nothing(backend: str, data: st.DataObject) -> None:
    """However the work is cut up, the oracle's results come out."""
    case = data.draw(cases(backend))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "TOKENS_PER_AXIS", data.draw(st.sampled_from((1, 2, 3, 8))))
        patch.setattr(chunks, "CHUNK_ELEMENTS", {"cpu": data.draw(st.sampled_from((1, 2**8, 2**12)))})
        check(case, backend, torch.float64)


@pytest.mark.parametrize("geometry", LARGER)
@pytest.mark.parametrize(("tokens", "elements"), [(1, 1), (2, 2**10), (7, 2**14), (16, 2**8)])
def test_chunking_of_larger_grids(geometry: str, tokens: int, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(LARGER[geometry], bias="table", valid="none in one sample", head_size=4)
    want = call("group", case, "tiled")
    monkeypatch.setattr(chunks, "TOKENS_PER_AXIS", tokens)
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", {"cpu": elements})
    for i, (got, expected) in enumerate(zip(call("group", case, "tiled"), want, strict=True)):
        assert_near(got, expected, 1e-12, f"result {i}")


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("operator", OPERATORS)
def test_gradcheck(backend: str, operator: str) -> None:
    """Finite differences know nothing of anyone's formulas."""
    served = BACKENDS[backend]
    neighbourhood = None if served.dense else Neighbourhood((5, 3), (3, 3), (2, 1), 3, 1, 3)
    case = make_case(neighbourhood, 6, 4, batch=1, heads=1, head_size=3, value_size=2, bias=served.biases[-1])
    leaves = case.leaves()

    def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return call(operator, case.with_leaves(dict(zip(leaves, tensors, strict=True))), backend)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


@pytest.mark.parametrize("backend", EVERY_BACKEND)
@pytest.mark.parametrize("operator", OPERATORS)
def test_differentiating_twice_works_or_says_no(backend: str, operator: str) -> None:
    served = BACKENDS[backend]
    neighbourhood = None if served.dense else Neighbourhood((5,), (3,), 2, 3, 1, 3)
    case = make_case(neighbourhood, 5, 3, batch=1, heads=1, head_size=2, value_size=2)
    leaves = {name: leaf for name, leaf in case.leaves().items() if name in "qkv"}
    leaf = leaves["q"]
    out = call(operator, case.with_leaves(leaves), backend)[0]
    (first,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    if served.twice:
        (second,) = torch.autograd.grad(first.square().sum(), leaves["k"])
        assert second.abs().max() > 0
        return
    for differentiate in (
        lambda: first.square().sum().backward(retain_graph=True),
        lambda: torch.autograd.grad(first.square().sum(), leaves["k"], allow_unused=True),
    ):
        with pytest.raises(RuntimeError, match="twice"):
            differentiate()
