"""A few cases of every target, and that the law can be broken."""

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from drawing import Arg, fixed, refused
from law import Call, require_form
from rounds import TARGETS, run
from tensors import features

CASES = 8  # of every target

# Targets that are to be stopped, in a process that allows a case one second.
STOPPED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {folder!r})
import drawing, law, rounds, torch

def target(do):
    first = iter([True])  # the case before the memory is limited

    def function(n):
        return None if next(first, False) else do(n)

    return lambda d: law.Call(function, {{"n": drawing.fixed(d.integer(1, 2))}}, lambda *_: ())

rounds.CASE_SECONDS = 1
rounds.TARGETS.update(greedy=target(lambda n: torch.empty(n * 2**33)), hanging=target(lambda n: time.sleep(60)))
rounds.play(["greedy", "hanging"], 0, 3, Path({out!r}))
"""


@pytest.mark.parametrize("name", TARGETS)
def test_the_law_holds(name: str) -> None:
    """For a few cases; the session has thousands."""
    counts, fault = run(name, 1, CASES, lambda _: None)
    assert not fault, fault
    assert counts.total() >= min(CASES, 4)


def broken(function: Callable[..., Any], args: dict[str, Arg], check: Callable[..., Any] = lambda *_: ()) -> str:
    """The fault that is found in a function."""
    name = "broken"
    TARGETS[name] = lambda _: Call(function, args, check)
    try:
        return run(name, 0, 60, lambda _: None)[1]
    finally:
        del TARGETS[name]


def raising(problem: BaseException) -> Callable[..., Any]:
    """A function that always fails."""

    def function(x: object) -> None:
        raise problem

    return function


def warning(x: object) -> None:
    """Serves, and complains."""
    warnings.warn("careful", stacklevel=1)


X = features(torch.ones(2, 3), "xx")


@pytest.mark.parametrize(
    ("function", "args", "words"),
    [
        (raising(RuntimeError("deep inside")), {"x": X}, "raised RuntimeError"),
        (raising(MemoryError()), {"x": X}, "raised MemoryError"),
        (raising(ValueError("no")), {"x": Arg(1, lambda _: [refused("a word", "a")])}, "refused what fits"),
        (warning, {"x": X}, "raised UserWarning"),
        (lambda x: x.sum(), {"x": fixed(torch.ones(2))}, "served, but result should have shape"),
        (lambda x: x / 0, {"x": fixed(torch.ones(2))}, "gives NaN or infinity"),
        (lambda x: x.abs().sqrt() * 0 + x, {"x": fixed(torch.zeros(2, requires_grad=True))}, "gradient of NaN"),
        (lambda x: torch.ones(()), {"x": X}, "took what must be refused"),
    ],
)
def test_the_law_can_be_broken(function: Callable[..., Any], args: dict[str, Arg], words: str) -> None:
    """Every way to break it is a fault that says so."""

    def check(result: Any, given: Any) -> Any:
        shape = () if words.startswith("took") else tuple(given["x"].shape)
        return require_form("result", result, shape)

    assert words in broken(function, args, check)


def test_refusals_must_name_a_rule_and_an_argument() -> None:
    """Whoever reads a message must know what to change."""
    number = Arg(1.0, lambda _: [refused("a word", "a")])

    def function(x: object, *, message: str) -> None:
        if isinstance(x, str):
            raise TypeError(message)

    for message in ("nonsense", "x is bad", "y must be a number; got 'a'"):
        fault = broken(lambda x, message=message: function(x, message=message), {"x": number})
        assert "refused without naming a rule and an argument" in fault, message
    assert not broken(lambda x: function(x, message="x must be a number; got 'a'"), {"x": number})


def test_what_stops_a_process_is_told(tmp_path: Path) -> None:
    """A request of too much memory is a fault; a hang ends the process, as a crash does, and leaves the case behind."""
    program = STOPPED.format(folder=str(Path(__file__).parent), out=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    (line,) = (tmp_path / "results.jsonl").read_text().splitlines()
    assert '"target": "greedy"' in line
    assert "raised RuntimeError" in line
    assert "allocate memory" in line
    assert "(n=" in (tmp_path / "case.txt").read_text()
