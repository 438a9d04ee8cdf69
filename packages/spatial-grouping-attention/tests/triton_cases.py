"""What the tests of the Triton kernels share: where they run, the comparison with the oracle, and geometries.

Every check runs in two places: in triton's interpreter on a CPU (mark ``triton``, TRITON_INTERPRET=1 in the
environment) on shapes as small as the features allow, and on a GPU (mark ``gpu``), there also in half types and on
grids of many tiles.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Hashable
from dataclasses import replace

import pytest
import torch
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
from operator_calls import OPERATORS
from operator_calls import call as call_operator
from spatial_grouping_attention import Neighbourhood
from torch import Tensor

INTERPRETER = pytest.param("cpu", marks=pytest.mark.triton)
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
everywhere = pytest.mark.parametrize("device", [INTERPRETER, GPU])
on_gpu = pytest.mark.parametrize("device", [GPU])
in_interpreter = pytest.mark.parametrize("device", [INTERPRETER])

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def moved(case: Case, device: str) -> Case:
    tensors = {name: x.to(device) for name, x in vars(case).items() if isinstance(x, Tensor)}
    return replace(case, **tensors)


def call(operator: str, case: Case, backend: str = "triton") -> tuple[Tensor, ...]:
    return call_operator(operator, case, backend)


def oracle(operator: str, case: Case) -> tuple[Tensor, ...]:
    return {"assign": oracle_assign, "pool": lambda c: oracle_pool(c)[:1], "group": oracle_group}[operator](case)


def check(
    case: Case,
    device: str,
    dtype: torch.dtype = torch.float32,
    *,
    backend: str = "triton",
    operators: tuple[str, ...] = OPERATORS,
    slack: float = 1.0,
) -> None:
    """Operators and all their gradients agree with the oracle on the very numbers of ``dtype``."""
    case = case.to(dtype)
    exact = case.to(torch.float64)
    sizes, tolerance = natural_sizes(exact), TOLERANCE[dtype] * slack
    for operator in operators:
        leaves, exact_leaves = moved(case, device).leaves(), exact.leaves()
        got = call(operator, moved(case, device).with_leaves(leaves), backend)
        want = oracle(operator, exact.with_leaves(exact_leaves))
        for i, (mine, theirs) in enumerate(zip(got, want, strict=True)):
            assert mine.dtype == (dtype if i == 0 else torch.float32)
            size = sizes["out" if i == 0 else "log"]
            assert_near(mine.cpu(), theirs, tolerance, f"{operator} result {i}", size=size)
        got_grads = gradients(tuple(x.cpu() for x in got), leaves)
        for name, want_grad in gradients(want, exact_leaves).items():
            assert got_grads[name].dtype == (torch.float32 if name in ("lse", "compactness") else dtype)
            what = f"{operator} gradient to {name}"
            assert_near(got_grads[name].cpu(), want_grad, tolerance, what, size=sizes[name])


def by_hash(key: Hashable, candidates: Callable[[], list], run: Callable) -> object:
    """Stands in for the timing of plans: every class of calls gets one of its candidates, each a fair share of them.

    Timing compiles all candidates of every class, which is most of what tests of many classes would do.
    """
    plans = candidates()
    return run(plans[zlib.crc32(repr(key).encode()) % len(plans)])


@pytest.fixture
def one_plan_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    from spatial_grouping_attention.backends.triton import launch

    monkeypatch.setattr(launch, "choose", by_hash)


LARGER = {
    "1-D": Neighbourhood((1003,), (502,), 2, 3, 1, 5),
    "1-D dilated": Neighbourhood((997,), (997,), 1, 1, 0, 3, 4),
    "2-D": Neighbourhood((61, 67), (31, 34), 2, 3, 1, 3),
    "2-D stride 4": Neighbourhood((61, 67), (16, 17), 4, 7, 3, 3),
    "2-D anisotropic": Neighbourhood((40, 63), (40, 16), (1, 4), (3, 7), (1, 3), (5, 3), (2, 1)),
    "3-D": Neighbourhood((12, 19, 21), (12, 10, 11), (1, 2, 2), (3, 5, 5), (1, 2, 2), 3),
    "3-D wide": Neighbourhood((9, 14, 16), (9, 7, 8), (1, 2, 2), 3, 1, 9),
}


OPERANDS = make_case(
    Neighbourhood((20,), (10,), 2, 3, 1, 3),
    batch=1,
    heads=2,
    bias="table",
    compact=True,
    valid="some",
    valid_groups="some",
    head_size=4,
    value_size=3,
).to(torch.float32)
