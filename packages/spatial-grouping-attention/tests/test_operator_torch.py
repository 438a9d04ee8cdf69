"""The operators inside torch's machinery: contracts, whole graphs, tensors without values, FLOP counters."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from grouping_cases import Case, assert_near, gradients, make_case, window_entries
from layer_cases import mostly_slow
from operator_calls import OPERATORS, call, operands
from spatial_grouping_attention import Neighbourhood, functional
from spatial_grouping_attention.backends import registered
from spatial_grouping_attention.backends.tiled import tables
from spatial_grouping_attention.geometry import remembered
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

# One axis with several tiles and a halo; several axes with one tile; groups beyond the input.
GEOMETRIES = {
    "1-D": Neighbourhood((20,), (10,), 2, 3, 1, 3),
    "2-D": Neighbourhood((5, 9), (7, 3), (1, 3), 3, (2, 1), 3, (2, 1)),
    "3-D": Neighbourhood((2, 5, 3), (2, 3, 3), (1, 2, 1), 3, 1, 3),
    "dense": None,
}
EVERY_CALL = [(name, bias) for name in GEOMETRIES for bias in ("table", None) if (name, bias) != ("dense", "table")]


def case_of(geometry: str, dtype: torch.dtype = torch.float32, *, bias: str | None = "table") -> Case:
    masks = {"valid": "some", "valid_groups": "some"}
    case = make_case(GEOMETRIES[geometry], 20, 10, bias=bias, **masks, head_size=4, value_size=3).to(dtype)
    return case.with_leaves(case.leaves())


def arguments(case: Case, values: torch.Tensor) -> tuple[object, ...]:
    """What the registered operators take in front."""
    engine = "fused" if case.neighbourhood is None else "tiled"
    return (engine, *registered._spread(operands(case, values)))


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # which torch 2.14 looks at while it checks
@pytest.mark.parametrize("dtype", mostly_slow(torch.float32, torch.bfloat16))
@pytest.mark.parametrize(("geometry", "bias"), EVERY_CALL)
def test_operators_keep_their_contract_with_torch(geometry: str, bias: str | None, dtype: torch.dtype) -> None:
    """Schema, registration of autograd, and fake tensors with the shapes, dtypes and strides of real ones."""
    case = case_of(geometry, dtype, bias=bias)
    token_major = case.v.detach().transpose(1, 2).contiguous().transpose(1, 2)
    opcheck(registered._pool, (*arguments(case, case.v), None))
    opcheck(registered._pool, (*arguments(case, token_major), case.lse))
    opcheck(registered._assign, arguments(case, case.u))


@pytest.mark.parametrize(("geometry", "bias"), EVERY_CALL)
def test_backward_operators_keep_their_contract_with_torch(geometry: str, bias: str | None) -> None:
    case = case_of(geometry, bias=bias)
    case = case.with_leaves({name: leaf.detach() for name, leaf in case.leaves().items()})
    checks = ("test_schema", "test_faketensor")
    of_tokens, of_groups = arguments(case, case.v), arguments(case, case.u)
    out, log_mass, lse, expected_q = registered._pool(*of_tokens, None)
    for grad_mass, grad_lse in ((None, None), (torch.randn_like(log_mass), torch.randn_like(lse))):
        more = (out, log_mass, lse, expected_q, torch.randn_like(out), grad_mass, grad_lse)
        opcheck(registered._pool_backward, (*of_tokens, *more), test_utils=checks)
    up, lse = registered._assign(*of_groups)
    for grad_lse in (None, torch.randn_like(lse)):
        opcheck(registered._assign_backward, (*of_groups, up, lse, torch.randn_like(up), grad_lse), test_utils=checks)


def step(case: Case, backend: str) -> tuple[torch.Tensor, ...]:
    """A grouping, its values carried back up, and a number to differentiate."""
    options = {"bias": case.bias if backend == "tiled" else None, "valid": case.valid, "backend": backend}
    options["valid_groups"] = case.valid_groups
    out, lse = functional.grouping_attention(case.q, case.k, case.v, case.neighbourhood, **options)
    up, _ = functional.assign(case.q, case.k, out, case.neighbourhood, **options)
    return out, up, out.square().sum() + up.square().sum() + lse.masked_fill(lse.isinf(), 0.0).sum()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler calls what torch has deprecated
@pytest.mark.parametrize("backend", ["tiled", "fused"])
def test_compiled_whole_is_the_same_forward_and_backward(backend: str) -> None:
    """No graph break; Inductor checks the strides that the operators promised."""
    neighbourhood = GEOMETRIES["1-D"] if backend == "tiled" else Neighbourhood((20,), (10,), 2, 3, 1, 19)
    case = make_case(neighbourhood, bias="table", valid="some", valid_groups="some", head_size=4, value_size=3).to(
        torch.float32
    )
    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        leaves = case.leaves()
        out, up, total = function(case.with_leaves(leaves), backend)
        total.backward()
        names = "qkv" if backend == "fused" else ("q", "k", "v", "bias")
        results.append((out, up, *(leaves[name].grad for name in names)))
    for i, (eager, compiled) in enumerate(zip(*results, strict=True)):
        assert_near(compiled, eager, 1e-5, f"result {i}")


SERVED = [(backend, window) for backend in ("reference", "tiled") for window in ("1-D", "2-D", "3-D")]
SERVED += [("reference", "dense"), ("fused", "dense")]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(("backend", "window"), SERVED)
@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_tensors_without_values_give_the_forms_of_results(kind: str, backend: str, window: str, operator: str) -> None:
    """Shapes, dtypes and order in memory, forward and backward; and nothing fake is remembered."""
    tables.runs_of.forget()
    tables.tiling_of.forget()
    bias, compact = ("both" if backend == "reference" else "table", True) if window != "dense" else (None, False)
    case = make_case(GEOMETRIES[window], 20, 10, valid="some", valid_groups="some", bias=bias, compact=compact).to(
        torch.bfloat16
    )
    mode = FakeTensorMode() if kind == "fake" else nullcontext()
    empty = {
        name: mode.from_tensor(x) if kind == "fake" else x.to("meta")
        for name, x in vars(case).items()
        if isinstance(x, torch.Tensor)
    }
    with mode:
        formal = replace(case, **empty)
        leaves = {name: x.detach().requires_grad_() for name, x in formal.leaves().items()}
        results = call(operator, formal.with_leaves(leaves), backend)
        torch.stack([x.float().sum() for x in results]).sum().backward()
    for got, want in zip(results, call(operator, case, backend), strict=True):
        assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())
    assert leaves["q"].grad.shape == case.q.shape


def test_nothing_is_remembered_of_a_fake_mode() -> None:
    @remembered(4)
    def numbers(n: int) -> torch.Tensor:
        return torch.arange(n)

    with FakeTensorMode():
        assert type(numbers(3)) is FakeTensor
    assert numbers(3).tolist() == [0, 1, 2]
    with FakeTensorMode():
        assert type(numbers(3)) is FakeTensor


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("window", GEOMETRIES)
def test_flop_counters_count_the_products_of_the_window(window: str, operator: str) -> None:
    case = make_case(GEOMETRIES[window], 20, 10, heads=3, head_size=8, value_size=5, valid="some").to(torch.float32)
    pairs = 200 if window == "dense" else (window_entries(GEOMETRIES[window]) >= 0).sum().item()
    leaves = case.leaves()
    with FlopCounterMode(display=False) as forward:
        out = call(operator, case.with_leaves(leaves), "auto")[0]
    assert forward.get_total_flops() == 2 * 2 * 3 * pairs * (8 + 5)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert backward.get_total_flops() == 2 * 2 * 3 * pairs * (3 * 8 + 2 * 5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler calls what torch has deprecated
@pytest.mark.parametrize(("head_size", "value_size"), mostly_slow((8, 3), (3, 8)))
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("backend", ["fused", "tiled"])
def test_compiled_for_any_size(backend: str, operator: str, head_size: int, value_size: int) -> None:
    """One graph for all numbers of samples, whichever channels are more."""

    def results_of(leaves: dict[str, torch.Tensor], case: Case) -> tuple[torch.Tensor, ...]:
        return call(operator, case.with_leaves(leaves), backend)

    torch._dynamo.reset()
    compiled = torch.compile(results_of, fullgraph=True, dynamic=True, backend="aot_eager")
    neighbourhood = GEOMETRIES["1-D"] if backend == "tiled" else None
    for batch in (2, 3):
        sizes = {"batch": batch, "head_size": head_size, "value_size": value_size}
        case = make_case(neighbourhood, 20, 10, **sizes).to(torch.float32)
        compared = []
        for function in (results_of, compiled):
            leaves = case.leaves()
            results = function(leaves, case)
            compared.append((*results, *gradients(results, leaves).values()))
        for i, (eager, traced) in enumerate(zip(*compared, strict=True)):
            assert_near(traced, eager, 1e-5, f"result {i}")
