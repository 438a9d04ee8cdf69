"""The operators inside torch's machinery: operator contracts, and compilation of whole graphs."""

import pytest
import torch
from grouping_cases import Case, assert_near, make_case
from spatial_grouping_attention import Neighbourhood, functional
from spatial_grouping_attention.functional import tiled
from torch.library import opcheck

# One axis with several tiles and a halo; several axes with one tile; groups beyond the input.
GEOMETRIES = {
    "1-D": Neighbourhood((20,), (10,), 2, 3, 1, 3),
    "2-D": Neighbourhood((5, 9), (7, 3), (1, 3), 3, (2, 1), 3, (2, 1)),
    "3-D": Neighbourhood((2, 5, 3), (2, 3, 3), (1, 2, 1), 3, 1, 3),
}


def operands(geometry: str, dtype: torch.dtype = torch.float32) -> Case:
    case = make_case(GEOMETRIES[geometry], bias="table", valid="some", head_size=4, value_size=3).to(dtype)
    return case.with_leaves(case.leaves())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_operators_keep_their_contract_with_torch(geometry: str, dtype: torch.dtype) -> None:
    """Schema, registration of autograd, and fake tensors with the shapes, dtypes and strides of real ones."""
    case = operands(geometry, dtype)
    integers, scale = GEOMETRIES[geometry].integers(), 0.5
    opcheck(tiled._pool, (case.q, case.k, case.v, None, case.bias, case.valid, integers, scale))
    opcheck(tiled._pool, (case.q, case.k, case.v, case.lse, None, None, integers, scale))
    opcheck(tiled._assign, (case.q, case.k, case.u, case.bias, case.valid, integers, scale))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_backward_operators_keep_their_contract_with_torch(geometry: str) -> None:
    case = operands(geometry)
    q, k, v, u, bias = (x.detach() for x in (case.q, case.k, case.v, case.u, case.bias))
    integers, scale = GEOMETRIES[geometry].integers(), 0.5
    out, log_mass, lse = tiled._pool(q, k, v, None, bias, case.valid, integers, scale)
    checks = ("test_schema", "test_faketensor")
    for grad_lse in (None, torch.randn_like(lse)):
        arguments = (q, k, v, bias, case.valid, integers, scale, out, lse, log_mass)
        grads = (torch.randn_like(out), grad_lse, torch.randn_like(log_mass))
        opcheck(tiled._pool_backward, (*arguments, *grads), test_utils=checks)
    up, lse = tiled._assign(q, k, u, bias, case.valid, integers, scale)
    arguments = (q, k, u, bias, case.valid, integers, scale, up, lse, torch.randn_like(up), torch.randn_like(lse))
    opcheck(tiled._assign_backward, arguments, test_utils=checks)


def step(case: Case, backend: str) -> tuple[torch.Tensor, ...]:
    """A grouping, its values carried back up, and a number to differentiate."""
    options = {"bias": case.bias if backend == "tiled" else None, "valid": case.valid, "backend": backend}
    out, lse = functional.grouping_attention(case.q, case.k, case.v, case.neighbourhood, **options)
    up, _ = functional.assign(case.q, case.k, out, case.neighbourhood, **options)
    return out, up, out.square().sum() + up.square().sum() + lse.masked_fill(lse.isinf(), 0.0).sum()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler calls what torch has deprecated
@pytest.mark.parametrize("backend", ["tiled", "fused"])
def test_compiled_whole_is_the_same_forward_and_backward(backend: str) -> None:
    """No graph break; Inductor checks the strides that the operators promised."""
    neighbourhood = GEOMETRIES["1-D"] if backend == "tiled" else Neighbourhood((20,), (10,), 2, 3, 1, 19)
    case = make_case(neighbourhood, bias="table", valid="some", head_size=4, value_size=3).to(torch.float32)
    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        leaves = case.leaves()
        out, up, total = function(case.with_leaves(leaves), backend)
        total.backward()
        names = "qkv" if backend == "fused" else ("q", "k", "v", "bias")
        results.append((out, up, *(leaves[name].grad for name in names)))
    for i, (eager, compiled) in enumerate(zip(*results, strict=True)):
        assert_near(compiled, eager, 1e-5, f"result {i}")
