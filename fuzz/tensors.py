"""Tensors that fit, and what may come in the place of one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from drawing import HALVES, INF, NAN, Arg, Swap, Verdict, refused
from torch import Tensor


def features(value: Tensor, tied: str, *, optional: bool = False, half: Verdict = Verdict.EITHER) -> Arg:
    """A floating tensor.

    Args:
        value: one that fits.
        tied: a letter per axis: ``x`` where its size is tied to something else, ``.`` where it is free.
        optional: whether None will do.
        half: what half types must come to.
    """

    def others(value: Tensor) -> list[Swap]:
        swaps = [*_no_tensor(value), *_forms(value), *_sizes(value, tied), *_values(value)]
        swaps += [
            refused("integers", value.long()),
            refused("booleans", value > 0),
            refused("complex numbers", value.to(torch.complex64)),
            Swap("double precision", value.double(), Verdict.EITHER),
            *(Swap(str(dtype), value.to(dtype), half) for dtype in HALVES),
        ]
        return [s for s in swaps if not (optional and s.value is None)]

    return Arg(value, others)


def positions(value: Tensor, tied: str) -> Arg:
    """A tensor of what positions are made of: no half types, and only finite numbers."""

    def others(value: Tensor) -> list[Swap]:
        return [
            *(s for s in _no_tensor(value) if s.value is not None),
            *_forms(value),
            *_sizes(value, tied),
            refused("integers", value.long()),
            *(refused(str(dtype), value.to(dtype)) for dtype in HALVES),
            Swap("double precision", value.double(), Verdict.SERVE),
            Swap("far away", value + 1e7, Verdict.SERVE),
            Swap("NaN", _with(value, NAN), Verdict.EITHER, sane=False),
            Swap("infinity", _with(value, INF), Verdict.EITHER, sane=False),
            Swap("large", value * 1e30, Verdict.EITHER),
        ]

    return Arg(value, others)


def mask(value: Tensor, tied: str) -> Arg:
    """Booleans, all of whose sizes are tied where ``tied`` says ``x``."""

    def others(value: Tensor) -> list[Swap]:
        return [
            *(s for s in _no_tensor(value) if s.value is not None),
            *(s for s in _forms(value) if "learn" not in s.what),
            *_sizes(value, tied),
            refused("integers", value.long()),
            refused("floats", value.float()),
            Swap("all", torch.ones_like(value), Verdict.SERVE),
            Swap("none", torch.zeros_like(value), Verdict.SERVE),
        ]

    return Arg(value, others)


def integers(value: Tensor, tied: str) -> Arg:
    """Whole numbers."""

    def others(value: Tensor) -> list[Swap]:
        return [
            *_no_tensor(value),
            *(s for s in _forms(value) if "learn" not in s.what),
            *_sizes(value, tied),
            refused("floats", value.float()),
            refused("booleans", value > 0),
            Swap("narrow", value.to(torch.int32), Verdict.SERVE),
        ]

    return Arg(value, others)


def _no_tensor(value: Tensor) -> list[Swap]:
    return [
        refused("a list", value.tolist()),
        refused("an array", value.detach().float().numpy()),
        refused("a number", 1.0),
        refused("a word", "x"),
        refused("None", None),
        refused("an object", object()),
        refused("an array of objects", np.array([object()])),
    ]


def _forms(value: Tensor) -> list[Swap]:
    """The same numbers, in another way."""
    if value.dim() == 0:
        return []
    spread = value.new_zeros(*value.shape[:-1], 2 * value.shape[-1])[..., ::2]
    spread.copy_(value)
    backwards = value.transpose(0, -1).contiguous().transpose(0, -1)
    forms = [
        Swap("with gaps", spread, Verdict.SERVE),
        Swap("in another order of memory", backwards, Verdict.SERVE),
        refused("sparse", value.detach().to_sparse()),
    ]
    if value.is_floating_point():
        learns = value.clone().requires_grad_(True)
        forms += [
            Swap("that learns", learns, Verdict.SERVE),
            Swap("a parameter that learns", torch.nn.Parameter(value.clone()), Verdict.SERVE),
            Swap("a view of what learns", learns[...], Verdict.SERVE),
            Swap("an element for all that learns", value.new_ones(()).expand_as(value), Verdict.SERVE),
        ]
    return forms


def _sizes(value: Tensor, tied: str) -> list[Swap]:
    swaps = [refused("one dimension more", value[None]), refused("one dimension", value.flatten())]
    if value.dim() == 1:
        swaps.pop()
    for axis, letter in enumerate(tied):
        verdict = Verdict.REFUSE if letter == "x" else Verdict.EITHER
        n = value.shape[axis]
        longer = torch.cat((value, value.narrow(axis, 0, 1)), axis) if n else value
        if n:
            swaps.append(Swap(f"axis {axis} longer", longer, verdict))
        if n > 1:
            swaps.append(Swap(f"axis {axis} of 1", value.narrow(axis, 0, 1), verdict))
            swaps.append(Swap(f"axis {axis} empty", value.narrow(axis, 0, 0), verdict))
    return swaps


def _values(value: Tensor) -> list[Swap]:
    special: Sequence[tuple[str, float]] = (("NaN", NAN), ("infinity", INF), ("large", 3e38), ("tiny", 1e-40))
    odd = [Swap(f"with {what}", _with(value, number), Verdict.EITHER, sane=False) for what, number in special]
    return [*odd, Swap("zeros", torch.zeros_like(value), Verdict.SERVE), Swap("tens", 10 * value, Verdict.SERVE)]


def _with(value: Tensor, number: float) -> Tensor:
    """The same with one other number in it."""
    changed = value.clone()
    if changed.numel():
        changed.view(-1)[0] = number
    return changed
