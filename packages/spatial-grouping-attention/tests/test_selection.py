"""What "auto" takes on a GPU, told by a stand-in: kernels that agree, that do not, and that cannot be compiled.

The stand-in computes by tiles, on a CPU that the rule is told to look at as it looks at CUDA. The real kernels go
through the same check in test_triton.py.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from grouping_cases import Case, assert_near, make_case
from operator_calls import OPERATORS, call
from RoSE.kernels.selfcheck import SelfCheck
from spatial_grouping_attention import Neighbourhood, SparseSpatialGroupingAttention, functional
from spatial_grouping_attention.backends import engines, selection, tiled

WINDOW = Neighbourhood((10,), (5,), 2, 3, 1, 3)


@pytest.fixture(autouse=True)
def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether numba is installed or not: what "auto" makes of it is told in test_native.py."""
    monkeypatch.setattr(selection, "NATIVE_DEVICES", ())


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A stand-in for the triton engine on CPU tensors; the names of its passes as they are called."""
    calls: list[str] = []
    module = ModuleType("stand_in")
    module.refusals = tiled.refusals  # type: ignore[attr-defined]

    def counted(name: str):
        def function(*args: object) -> object:
            calls.append(name)
            return getattr(tiled, name)(*args)

        return function

    for name in ("assign", "pool", "assign_backward", "pool_backward"):
        setattr(module, name, counted(name))
    monkeypatch.setitem(engines._MODULES, "triton", module)
    monkeypatch.setattr(selection, "TRITON_DEVICES", ("cpu",))
    return calls


def trust(monkeypatch: pytest.MonkeyPatch, check: object) -> None:
    monkeypatch.setattr(selection, "TRITON_CHECK", SelfCheck("the kernels", check, "backend 'tiled'"))


def case() -> Case:
    return make_case(WINDOW, bias="table", valid="some", valid_groups="some").to(torch.float32)


@pytest.mark.parametrize("operator", OPERATORS)
def test_kernels_that_agree_are_taken(operator: str, served: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[torch.device] = []
    trust(monkeypatch, checked.append)
    leaves = case().leaves()
    for _ in range(3):
        call(operator, case().with_leaves(leaves), "auto")[0].sum().backward()
    assert served
    assert {name.removesuffix("_backward") for name in served} == {"assign" if operator == "assign" else "pool"}
    assert any(name.endswith("_backward") for name in served)
    assert checked == [torch.device("cpu")], "once for every process and device"
    assert functional.select(case().q, WINDOW).backend == "triton"


def disagree(device: torch.device) -> None:
    raise ArithmeticError("dq is off by 0.3")


def cannot_compile(device: torch.device) -> None:
    raise RuntimeError("no such instruction")


@pytest.mark.parametrize("check", [disagree, cannot_compile])
def test_kernels_that_fail_their_check_are_left_alone(
    check: object, served: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trust(monkeypatch, check)
    layer = SparseSpatialGroupingAttention(8, 1, 3, 2, stride=2, iters=2)
    x = torch.randn(1, 10, 8)
    with pytest.warns(RuntimeWarning, match=r"the kernels failed .* on cpu .* backend 'tiled'") as said:
        first = layer(x, 1.0, (10,)).x_out
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = layer(x, 1.0, (10,)).x_out
        again.sum().backward()
    assert torch.equal(first, again)
    assert not served
    assert functional.select(case().q, WINDOW).backend == "tiled"


@pytest.mark.parametrize("check", [disagree, cannot_compile])
def test_what_is_asked_for_by_name_is_not_checked(
    check: object, served: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trust(monkeypatch, check)
    call("group", case(), "triton")
    assert served == ["pool"]


def test_dense_calls_and_other_devices_never_ask(served: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> None:
        raise AssertionError("asked")

    trust(monkeypatch, fail)
    covering = make_case(Neighbourhood((10,), (5,), 2, 3, 1, 9)).to(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dense in (covering, replace(covering, neighbourhood=None)):
            call("group", dense, "auto")
            call("assign", dense, "auto")
        monkeypatch.setattr(selection, "TRITON_DEVICES", ("cuda",))
        call("group", case(), "auto")
    assert not served


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler calls what torch has deprecated
def test_the_check_is_made_while_a_compiler_traces(served: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[torch.device] = []
    trust(monkeypatch, checked.append)
    torch._dynamo.reset()
    layer = SparseSpatialGroupingAttention(8, 1, 3, 2, stride=2, iters=1)
    x = torch.randn(1, 10, 8)
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, 1.0, (10,)).x_out
    assert_near(got, layer(x, 1.0, (10,)).x_out, 1e-6)
    assert served
    assert checked == [torch.device("cpu")]


def test_answers_are_remembered() -> None:
    q = case().q
    assert functional.select(q, WINDOW) is functional.select(q.clone(), WINDOW)
    assert functional.select(q, WINDOW).backend == "tiled"
