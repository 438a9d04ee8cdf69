"""Engines that are tested, by what they serve, and parameters of tests made of them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Served:
    """A backend and the calls that it can serve."""

    name: str
    dense: bool
    """Takes ``neighbourhood=None`` and windows that cover every group."""
    windowed: bool
    """Takes windows that hide groups."""
    biases: tuple[str | None, ...]
    """Kinds of bias: "table" needs a neighbourhood, "full" (one value for every pair) does not, "both" are added."""
    twice: bool
    """Can be differentiated twice."""


# A new backend is tested by adding its line here: every law of the operators then runs for it.
BACKENDS = {
    served.name: served
    for served in (
        Served("reference", dense=True, windowed=True, biases=(None, "table", "both", "full"), twice=True),
        Served("fused", dense=True, windowed=False, biases=(None,), twice=False),
        Served("tiled", dense=False, windowed=True, biases=(None, "table"), twice=False),
        Served("native", dense=False, windowed=True, biases=(None, "table"), twice=False),
    )
}
# What needs another device or another library than torch has the same oracle in tests of its own, test_<name>.py.
ELSEWHERE = ("native", "triton", "natten")
EVERY_BACKEND = tuple(name for name in BACKENDS if name not in ELSEWHERE)
WINDOWED = tuple(name for name in EVERY_BACKEND if BACKENDS[name].windowed)
# Its own tests are in every run; laws of all engines take long in its interpreter.
IN_INTERPRETER = [pytest.mark.triton, pytest.mark.slow]
TRITON = pytest.param("triton", marks=IN_INTERPRETER)


def every_backend_and(name: str, *values: object) -> pytest.MarkDecorator:
    """Parameters of a test: every engine with every value."""
    rows: list[object] = [(backend, value) for backend in EVERY_BACKEND for value in values]
    rows += [pytest.param("triton", value, marks=IN_INTERPRETER) for value in values]
    return pytest.mark.parametrize(("backend", name), rows)
