"""Arguments that fit, and what may come in the place of one of them.

A target (see :mod:`targets`) draws a call that fits, each argument with its *kind*. The kind knows what else a caller
might pass, and what must happen then: a :class:`Swap`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

NAN, INF = math.nan, math.inf
HALVES = (torch.float16, torch.bfloat16)


class Verdict(IntEnum):
    """What a call must come to."""

    SERVE = 0
    EITHER = 1
    REFUSE = 2


class Swap(NamedTuple):
    """What stands in an argument's place."""

    what: str
    value: Any
    verdict: Verdict
    sane: bool = True
    """Whether results must be finite."""


@dataclass
class Arg:
    """An argument that fits, and what may come instead."""

    value: Any
    others: Callable[[Any], list[Swap]]


class Draw:
    """Hypothesis' choices, in few words."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def pick(self, *options: Any) -> Any:
        """One of the options."""
        return options[self.integer(0, len(options) - 1)]

    def integer(self, low: int, high: int) -> int:
        """A number from low to high."""
        return int(self._data.draw(st.integers(low, high)))

    def often(self, percent: int = 50) -> bool:
        """True in about so many cases."""
        return self.integer(0, 99) >= 100 - percent

    def real(self, low: float, high: float) -> float:
        """A number from low to high."""
        return float(self._data.draw(st.floats(low, high)))

    def shape(self, ndim: int, most: int = 4) -> tuple[int, ...]:
        """Sizes of a grid."""
        return tuple(self.integer(1, most) for _ in range(ndim))

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normal numbers of a moderate size."""
        generator = torch.Generator().manual_seed(self.integer(0, 999))
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def booleans(self, *shape: int) -> Tensor:
        """True in most places; now and then everywhere or nowhere."""
        likely = self.pick(0.7, 0.7, 0.7, 1.0, 0.0)
        generator = torch.Generator().manual_seed(self.integer(0, 999))
        return torch.rand(shape, generator=generator) < likely


def refused(what: str, value: Any) -> Swap:
    """What can never be meant."""
    return Swap(what, value, Verdict.REFUSE)


def fixed(value: Any) -> Arg:
    """An argument that nothing is put in place of."""
    return Arg(value, lambda _: [])


def with_none(arg: Arg, verdict: Verdict = Verdict.EITHER) -> Arg:
    """The same, where None is an answer too."""
    return Arg(arg.value, lambda v: [s for s in arg.others(v) if s.value is not None] + [Swap("None", None, verdict)])


def _no_number() -> list[Swap]:
    return [
        refused("a word", "2"),
        refused("None", None),
        refused("True", True),
        refused("a complex number", 1j),
        refused("an object", object()),
        refused("a dict", {"a": 1}),
        refused("NaN", NAN),
        refused("infinity", INF),
    ]


def whole(value: int, least: int, *, most: int | None = None, huge: Verdict | None = None) -> Arg:
    """A whole number from least to most; ``huge`` where enormous ones ask for no memory."""

    def others(value: int) -> list[Swap]:
        swaps = [
            *_no_number(),
            refused("a fraction", value + 0.5),
            refused("a float", float(value)),
            refused("a list", [value]),
            refused("too small", least - 1),
            refused("far too small", -(2**70)),
            refused("a NumPy float", np.float64(value)),
            Swap("NumPy's", np.int64(value), Verdict.SERVE),
        ]
        if value < 128:
            swaps.append(Swap("NumPy's small", np.int8(value), Verdict.SERVE))
        if most is not None:
            swaps += [refused("too large", most + 1), refused("far too large", 2**70)]
        if huge is not None:
            swaps += [Swap("large", 2**40 + 1, huge, sane=False), Swap("enormous", 2**70 + 1, huge, sane=False)]
        return swaps

    return Arg(value, others)


def wholes(value: int | Sequence[int], ndim: int, least: int, *, huge: Verdict | None = None, odd: bool = False) -> Arg:
    """A whole number, or one per axis."""

    def others(value: Any) -> list[Swap]:
        first = value if isinstance(value, int) else value[0]
        swaps = [
            *_no_number(),
            refused("floats", (float(first),) * ndim),
            refused("too many", (first,) * (ndim + 1)),
            refused("nothing", ()),
            refused("too small", (least - 1,) * ndim),
            refused("a tensor", torch.full((ndim,), first)),
            Swap("NumPy's", np.full(ndim, first), Verdict.SERVE),
            Swap("a list", [first] * ndim, Verdict.SERVE),
        ]
        if odd:
            swaps.append(refused("even", 2))
        if huge is not None:
            swaps += [Swap("large", 2**40 + 1, huge, sane=False), Swap("enormous", 2**70 + 1, huge, sane=False)]
        return swaps

    return Arg(value, others)


def real(
    value: float,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    wide: bool = True,
) -> Arg:
    """A real number within bounds; ``wide`` where enormous ones ask for no memory."""

    def others(value: float) -> list[Swap]:
        swaps = [
            *_no_number(),
            refused("minus infinity", -INF),
            refused("a list", [value]),
            Swap("NumPy's", np.float64(value), Verdict.SERVE),
            Swap("NumPy's narrow", np.float32(value), Verdict.EITHER),
            Swap("a tensor", torch.tensor(value), Verdict.EITHER),
            Swap("tiny", 1e-320, Verdict.EITHER, sane=False),
            refused("beyond floats", 10**400),
            Swap("an int", 1, Verdict.EITHER),
        ]
        if wide:
            swaps.append(Swap("large", 1e300, Verdict.EITHER, sane=False))
        low = above if above is not None else least
        if low is not None:
            swaps.append(refused("too small", low - 1.0))
        if above is not None:
            swaps.append(refused("the bound", above))
        if most is not None:
            swaps.append(refused("too large", most + 1.0))
        return swaps

    return Arg(value, others)


def probability(value: float) -> Arg:
    """A probability, which is never 1."""

    def others(value: float) -> list[Swap]:
        return [
            *_no_number(),
            refused("1", 1.0),
            refused("2", 2),
            refused("-0.1", -0.1),
            refused("a list", [value]),
            Swap("0", 0, Verdict.SERVE),
            Swap("NumPy's", np.float32(0.25), Verdict.SERVE),
        ]

    return Arg(value, others)


def flag(value: bool) -> Arg:
    """True or False."""
    wrong = {
        "a word": "yes",
        "1": 1,
        "0.0": 0.0,
        "None": None,
        "NumPy's": np.bool_(True),
        "a tensor": torch.tensor(True),
    }
    return Arg(value, lambda _: [refused(what, w) for what, w in wrong.items()])


def choice(value: str, *, none: bool = False) -> Arg:
    """One of some words."""
    wrong = {"another word": "nought", "1": 1, "True": True, "a list": [value], "empty": "", "bytes": b"auto"}
    if not none:
        wrong["None"] = None
    return Arg(value, lambda _: [refused(what, w) for what, w in wrong.items()])


def spaced(d: Draw, ndim: int, batch: int = 0, *, tensors: bool = True) -> Arg:
    """A spacing in any of its forms; per sample only where ``batch`` is given."""
    steps = tuple(d.real(0.25, 4.0) for _ in range(ndim))
    forms: list[Any] = [steps[0], 1, steps, list(steps)]
    if tensors:
        forms += [torch.tensor(steps), torch.tensor(steps, dtype=torch.float64), torch.tensor(steps[0])]
        if batch:
            forms.append(torch.tensor(steps).expand(batch, ndim))
    return Arg(d.pick(*forms), lambda _: _spacings(ndim, batch, tensors, above=0.0))


def origin(d: Draw, ndim: int, batch: int = 0) -> Arg:
    """A position, likewise."""
    start = tuple(d.real(-50.0, 50.0) for _ in range(ndim))
    forms: list[Any] = [start[0], 0, start, torch.tensor(start)]
    if batch:
        forms.append(torch.tensor(start).expand(batch, ndim))
    return Arg(d.pick(*forms), lambda _: _spacings(ndim, batch, True, above=None))


def _spacings(ndim: int, batch: int, tensors: bool, above: float | None) -> list[Swap]:
    kind = Verdict.SERVE if tensors else Verdict.REFUSE
    swaps = [
        *(s for s in _no_number() if s.value is not None),
        refused("too many", (1.0,) * (ndim + 1)),
        refused("words", ("a",) * ndim),
        refused("nothing", ()),
        refused("NaN in one", (NAN,) * ndim),
        refused("tensors in a list", [torch.ones(ndim), torch.ones(ndim)]),
        refused("rows of NumPy", np.ones((2, ndim))),
        refused("integers", torch.ones(ndim, dtype=torch.int64)),
        refused("a half type", torch.ones(ndim, dtype=torch.float16)),
        refused("NumPy's half type", np.float16(1.0)),
        refused("a complex tensor", torch.ones(ndim, dtype=torch.complex64)),
        refused("NaN in a tensor", torch.full((ndim,), NAN)),
        refused("infinity in a tensor", torch.full((ndim,), INF)),
        refused("infinity in a wider tensor", torch.full((ndim,), -INF, dtype=torch.float64)),
        refused("a third dimension", torch.ones(1, 1, ndim)),
        refused("too long a tensor", torch.ones(ndim + 1)),
        Swap("NumPy's", np.ones(ndim), Verdict.SERVE),
        Swap("NumPy's narrow", np.float32(1.5), Verdict.SERVE),
        Swap("a tensor that learns", torch.ones(ndim, requires_grad=True), kind),
        Swap("every second number", torch.ones(2 * ndim)[::2], kind),
        Swap("tiny", 1e-300, Verdict.EITHER),
        Swap("large", 1e30, Verdict.EITHER),
        refused("largest", 1.7e308),
        refused("beyond floats", 10**400),
    ]
    if batch:
        swaps.append(refused("of another batch", torch.ones(batch + 1, ndim)))
    if above is not None:
        swaps += [refused("0", 0), refused("negative", (-1.0,) * ndim), refused("0 in a tensor", torch.zeros(ndim))]
    return swaps


def shaped(value: Sequence[int]) -> Arg:
    """A grid shape, which the number of tokens must agree with."""

    def others(value: Sequence[int]) -> list[Swap]:
        first, *rest = value
        return [
            *(s for s in _no_number() if s.value is not None),
            refused("another size", (first + 1, *rest)),
            refused("one axis more", (*value, 1)),
            refused("nothing", ()),
            refused("0", (0, *rest)),
            refused("negative", (-first, *rest)),
            refused("floats", tuple(map(float, value))),
            refused("a tensor", torch.tensor(value)),
            refused("large", (2**40, *rest)),
            refused("enormous", (2**70, *rest)),
            Swap("a list", list(value), Verdict.SERVE),
            Swap("NumPy's", np.array(value), Verdict.SERVE),
        ]

    return Arg(tuple(value), others)
