"""Calls without samples, heads, tokens, groups or channels of values: nothing in, nothing or zeros out."""

import pytest
import torch
from engine_cases import BACKENDS, EVERY_BACKEND, IN_INTERPRETER
from grouping_cases import Case, assert_near, gradients, make_case
from operator_calls import OPERATORS, call, operands
from spatial_grouping_attention import Neighbourhood, backends

WINDOW = Neighbourhood((5,), (3,), 2, 3, 1, 3)
NONE_OF = {
    "samples": {"batch": 0},
    "heads": {"heads": 0},
    "channels of values": {"value_size": 0},
    "tokens": {"num_tokens": 0},
    "groups": {"num_groups": 0},
    "tokens and groups": {"num_tokens": 0, "num_groups": 0},
}
WITHOUT_GRID = ("tokens", "groups", "tokens and groups")
DENSE = [name for name in EVERY_BACKEND if BACKENDS[name].dense]
CALLS = [
    *((name, what) for name in DENSE for what in NONE_OF),
    # Grids have tokens and groups.
    *(("tiled", what) for what in NONE_OF if what not in WITHOUT_GRID),
    *(pytest.param("triton", what, marks=IN_INTERPRETER) for what in NONE_OF if what not in WITHOUT_GRID),
]


def case_without(what: str, backend: str, masks: str | None) -> Case:
    windowed = backend not in DENSE
    sizes = {"num_tokens": 5, "num_groups": 3, **NONE_OF[what]}
    bias = "table" if windowed else "full" if backend == "reference" else None
    case = make_case(WINDOW if windowed else None, **sizes, bias=bias, valid=masks, valid_groups=masks)
    return case.to(torch.float32)


@pytest.mark.parametrize("masks", [None, "some"])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(("backend", "what"), CALLS)
def test_nothing_comes_of_nothing(backend: str, what: str, operator: str, masks: str | None) -> None:
    """Normalisers and masses, which do not need values, are what they are; their gradients too."""
    case = case_without(what, backend, masks)
    results = []
    for by in (backend, "reference"):
        leaves = case.leaves()
        outputs = call(operator, case.with_leaves(leaves), by)
        results.append((*outputs, *gradients(outputs, leaves).values()))
    for got, want in zip(*results, strict=True):
        assert_near(got, want, 1e-5)
    out, *normalisers = results[0][: len(outputs)]
    assert out.eq(0).all()
    if what != "channels of values":
        assert all(x.isinf().all() for x in normalisers)
        assert all(grad.eq(0).all() for grad in results[0][len(outputs) :])


@pytest.mark.parametrize(
    ("backend", "what"),
    [
        *(("fused", what) for what in NONE_OF if what != "channels of values"),
        *(("tiled", what) for what in ("samples", "heads")),
    ],
)
def test_labels_of_nothing(backend: str, what: str) -> None:
    case = case_without(what, backend, None)
    found = backends.labels(operands(case, case.u))
    assert found.shape == (case.k.shape[0], case.k.shape[2])
    assert found.eq(-1).all()
