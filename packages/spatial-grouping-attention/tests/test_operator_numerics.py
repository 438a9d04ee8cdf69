"""Where gradients lose digits: values that are alike, logits that are large, and autocast around backward."""

from dataclasses import replace

import pytest
import torch
from engine_cases import BACKENDS, EVERY_BACKEND, TRITON, every_backend_and
from grouping_cases import (
    Case,
    assert_near,
    gradients,
    make_case,
    natural_sizes,
    oracle_assign,
    oracle_group,
    oracle_pool,
)
from operator_calls import OPERATORS, call
from spatial_grouping_attention import Neighbourhood
from spatial_grouping_attention.backends.fused import dense
from torch import Tensor

WINDOW, EVERYTHING = Neighbourhood((21,), (11,), 2, 3, 1, 3), Neighbourhood((21,), (11,), 2, 3, 1, 21)
ORACLES = {"assign": oracle_assign, "pool": oracle_pool, "group": oracle_group}


def windows_of(backend: str) -> list[Neighbourhood]:
    served = BACKENDS.get(backend)
    return [WINDOW] * (served is None or served.windowed) + [EVERYTHING] * (served is not None and served.dense)


def with_likely_normalisers(case: Case) -> Case:
    return replace(case, lse=oracle_assign(case)[1])


def relative_errors(operator: str, case: Case, backend: str) -> dict[str, float]:
    """Of each gradient of a random weighting of the averages, by its norm, against the oracle on the same numbers."""
    exact = case.to(torch.float64)
    leaves, exact_leaves = case.leaves(), exact.leaves()
    got = call(operator, case.with_leaves(leaves), backend)[0]
    want = ORACLES[operator](exact.with_leaves(exact_leaves))[0]
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(1)).to(got.dtype)
    got.backward(weights)
    want.backward(weights.double())

    def error(name: str) -> float:
        theirs = exact_leaves[name].grad
        return ((leaves[name].grad.double() - theirs).norm() / theirs.norm()).item()

    return {name: error(name) for name in ("q", "k", "u" if operator == "assign" else "v")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("backend", [*EVERY_BACKEND, TRITON])
def test_values_that_are_alike_leave_gradients_exact(backend: str, operator: str, dtype: torch.dtype) -> None:
    """What groups look like once they are segments: the backward passes subtract what is 50 times as large."""
    for window in windows_of(backend):
        case = with_likely_normalisers(make_case(window, head_size=16, value_size=16))
        case = replace(case, v=5.0 + 0.1 * case.v, u=5.0 + 0.1 * case.u).to(dtype)
        errors = relative_errors(operator, case, backend)
        assert max(errors.values()) < (1e-2 if dtype != torch.float32 else 1e-4), errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operator", OPERATORS)
def test_kernels_of_half_types_are_given_values_around_zero(
    operator: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA: there what the kernels return is rounded before anyone can save it."""
    monkeypatch.setattr(dense, "_widen", lambda x: x)
    case = with_likely_normalisers(make_case(EVERYTHING, head_size=16, value_size=16))
    case = replace(case, v=5.0 + 0.1 * case.v, u=5.0 + 0.1 * case.u).to(dtype)
    errors = relative_errors(operator, case, "fused")
    assert max(errors.values()) < 1e-2, errors


@pytest.mark.parametrize("operator", OPERATORS)
@every_backend_and("inside", True, False)
def test_autocast_around_backward_changes_nothing(backend: str, operator: str, inside: bool) -> None:
    """Torch recommends to leave the context before; nobody has to."""
    for window in windows_of(backend):
        case = make_case(window, bias="table" if window is WINDOW else None, valid="some").to(torch.float32)
        plain_leaves, leaves = case.leaves(), case.leaves()
        want = gradients(call(operator, case.with_leaves(plain_leaves), backend), plain_leaves)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results = call(operator, case.with_leaves(leaves), backend)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            got = gradients(results, leaves)
        for name, grad in got.items():
            assert torch.equal(grad, want[name]), name


def test_second_derivatives_do_not_care_about_autocast_either() -> None:
    case = make_case(WINDOW).to(torch.float32)

    def second(enabled: bool) -> Tensor:
        leaves = case.leaves()
        out = call("group", case.with_leaves(leaves), "reference")[0]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            (first,) = torch.autograd.grad(out.square().sum(), leaves["q"], create_graph=True)
            return torch.autograd.grad(first.square().sum(), leaves["k"])[0]

    assert torch.equal(second(True), second(False))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("strength", [1e2, 1e3, 1e4])
@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_large_logits_cost_gradients_no_more_than_rounding_the_logits(backend: str, strength: float, seed: int) -> None:
    """A logit of 1e4 is known to 1e-3, and so are memberships; what cancels must still cancel."""
    window = WINDOW if not BACKENDS[backend].dense else EVERYTHING
    case = make_case(window, head_size=16, value_size=16, strength=strength, seed=seed).to(torch.float32)
    exact = case.to(torch.float64)
    sizes = natural_sizes(exact)
    leaves, exact_leaves = case.leaves(), exact.leaves()
    got = gradients(call("group", case.with_leaves(leaves), backend), leaves)
    want = gradients(oracle_group(exact.with_leaves(exact_leaves)), exact_leaves)
    tolerance = 0.5 * torch.finfo(torch.float32).eps * sizes["log"]
    for name in "qkv":
        # Relative to the gradients themselves, which are small where memberships are settled.
        assert_near(got[name], want[name], tolerance, name)
