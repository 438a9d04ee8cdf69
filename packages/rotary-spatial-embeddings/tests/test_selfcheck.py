"""Kernels are asked once whether they can be trusted, wherever the question comes from."""

from __future__ import annotations

import threading
import time
import warnings

import pytest
import torch
from RoSE.kernels.selfcheck import SelfCheck, require_agreement
from torch import Tensor


def test_a_failure_is_said_once_and_remembered() -> None:
    def fails(device: torch.device) -> None:
        raise ArithmeticError("x is off by 3")

    check = SelfCheck("the kernels of a test", fails, "plain PyTorch")
    words = "the kernels of a test failed their self-check on cpu .*plain PyTorch serves instead.*x is off by 3"
    with pytest.warns(RuntimeWarning, match=words) as caught:
        assert not check.passed(torch.device("cpu"))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not check.passed(torch.device("cpu"))


def test_whatever_a_check_does_it_is_a_failure_and_no_more() -> None:
    def leaves(device: torch.device) -> None:
        raise SystemExit(1)

    with pytest.warns(RuntimeWarning, match="SystemExit"):
        assert not SelfCheck("kernels", leaves, "nothing").passed(torch.device("cpu"))


def test_the_answer_does_not_depend_on_what_the_caller_is_in_the_middle_of() -> None:
    states = []

    def look(device: torch.device) -> None:
        states.append(
            (torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"),
             torch._C._functorch.peek_interpreter_stack() is None, torch.get_default_device().type)
        )  # fmt: skip

    def ask(x: Tensor) -> Tensor:
        assert SelfCheck("kernels", look, "nothing").passed(torch.device("cpu"))
        return x

    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        ask(torch.ones(2))
    torch.func.vmap(ask)(torch.ones(2))
    with torch._subclasses.FakeTensorMode():
        ask(torch.ones(2))
    assert states == [(False, True, False, True, "cpu")] * 3


def test_during_a_capture_nothing_is_checked_and_nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []
    check = SelfCheck("kernels", checked.append, "nothing")
    capturing = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    gpu = torch.device("cuda", 0)
    assert not check.passed(gpu)
    assert checked == []
    capturing = False
    assert check.passed(gpu)
    capturing = True
    assert check.passed(gpu)
    assert checked == [gpu]


def test_each_device_is_checked_once_by_however_many_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    checked = []

    def slow(device: torch.device) -> None:
        time.sleep(0.05)
        checked.append(device)
        assert threading.current_thread().name.startswith("self-check")

    check = SelfCheck("kernels", slow, "nothing")
    devices = [torch.device("cpu"), torch.device("meta")] * 8
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(check.passed, devices))
    assert sorted(map(str, checked)) == ["cpu", "meta"]


def test_agreement_is_about_shapes_sizes_and_numbers() -> None:
    one = torch.ones(3)
    require_agreement("x", one, one + 1e-6, 1e-5)
    for bad in (torch.ones(2), one * 1.1, one * float("nan")):
        with pytest.raises(ArithmeticError, match="x "):
            require_agreement("x", bad, one, 1e-5)


def test_to_a_compiler_the_answer_is_a_constant() -> None:
    torch._dynamo.reset()
    asked = []

    def look(device: torch.device) -> None:
        asked.append((device, torch.compiler.is_dynamo_compiling()))

    check = SelfCheck("kernels", look, "nothing")
    compiled = torch.compile(lambda x: x + 1 if check.passed(x.device) else x - 1, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))
    assert torch.equal(compiled(torch.zeros(2)), torch.ones(2))
    assert asked == [(torch.device("cpu"), False)]


def test_nothing_is_checked_while_a_program_is_exported() -> None:
    asked = []
    check = SelfCheck("kernels", asked.append, "plain")

    class Asks(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if check.passed(x.device) else x - 1

    exported = torch.export.export(Asks(), (torch.zeros(2),)).module()
    assert torch.equal(exported(torch.zeros(2)), -torch.ones(2))
    assert not asked
    assert check.passed(torch.device("cpu"))
    assert len(asked) == 1
