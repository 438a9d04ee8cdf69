"""When the kernels for the CPU are taken, and what is checked before.

What is marked needs numba and runs in the tests-optional session.
"""

import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch
from grouping_cases import make_case
from operator_calls import OPERATORS, call
from RoSE.kernels.selfcheck import SelfCheck
from spatial_grouping_attention import SparseSpatialGroupingAttention, functional
from spatial_grouping_attention.backends import native, selection
from spatial_grouping_attention.backends.engines import Backend
from test_native import GEOMETRIES

needs_numba = pytest.mark.native


def _checks(check: Callable[[str, torch.device], None]) -> dict[str, SelfCheck]:
    """Those of "auto", as they are before any is asked for."""
    return {name: SelfCheck("the native kernels", partial(check, name), "'tiled'") for name in selection.NATIVE_CHECKS}


@needs_numba
def test_auto_takes_it_and_labels_stay_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "NATIVE_CHECKS", _checks(selection._check_native))
    case = make_case(GEOMETRIES["2-D"]).to(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert functional.select(case.q, case.neighbourhood).backend == Backend.NATIVE
    layer = SparseSpatialGroupingAttention(16, 2, 3, 2, stride=2, iters=1)
    x = torch.randn(2, 100, 16)
    labels = [layer(x, 1.0, (10, 10)).assignment.labels()]
    monkeypatch.setattr(selection, "NATIVE_DEVICES", ())
    labels.append(layer(x, 1.0, (10, 10)).assignment.labels())
    assert torch.equal(*labels)


@needs_numba
@pytest.mark.parametrize("name", selection.NATIVE_CHECKS)
def test_the_check_passes(name: str) -> None:
    selection._check_native(name, torch.device("cpu"))


def test_a_failed_check_leaves_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, device: torch.device) -> None:
        raise ImportError("numba needs another numpy")

    monkeypatch.setattr(native, "_INSTALLED", True)
    monkeypatch.setattr(selection, "NATIVE_CHECKS", _checks(broken))
    case = make_case(GEOMETRIES["1-D"]).to(torch.float32)
    with pytest.warns(RuntimeWarning, match=r"the native kernels failed .* 'tiled'"):
        assert functional.select(case.q, case.neighbourhood).backend == Backend.TILED


@needs_numba
@pytest.mark.parametrize("operator", OPERATORS)
def test_only_what_a_call_may_come_to_is_checked(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check compiles: who takes no gradients waits for none of theirs."""
    asked: list[str] = []

    def noting(name: str, device: torch.device) -> None:
        asked.append(name)

    case = make_case(GEOMETRIES["1-D"]).to(torch.float32)
    kernel = "assign" if operator == "assign" else "pool"
    for watched in (case, case.with_leaves(case.leaves())):
        monkeypatch.setattr(selection, "NATIVE_CHECKS", _checks(noting))
        call(operator, watched, "auto")
    assert asked == [kernel, kernel, f"{kernel}_backward"]


def test_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_INSTALLED", False)
    case = make_case(GEOMETRIES["1-D"])
    with pytest.raises(ValueError, match=r"native needs numba: pip install spatial-grouping-attention\[cpu\]"):
        call("group", case, "native")
    monkeypatch.setattr(native, "_INSTALLED", True)
    with pytest.raises(ValueError, match="native is windowed"):
        functional.grouping_attention(case.q, case.k, case.v, backend="native")
    with pytest.raises(ValueError, match="one for every pair"):
        call("group", make_case(GEOMETRIES["1-D"], bias="full"), "native")
