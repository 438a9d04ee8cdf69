"""What a benchmark is made of: entries that are compared, in cases that say what they have in common."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

FORWARD, BACKWARD = "forward", "forward + backward"

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# Relative error, in the Euclidean norm, of a result or a gradient in float32 against float64.
TOLERANCE = 1e-5


class Absent(Exception):  # noqa: N818, not an error: the reason stands in the tables
    """An entry that cannot take part here; the message is the reason."""


class Bound(NamedTuple):
    """A computation on its operands."""

    call: Callable[[], Tensor]
    leaves: dict[str, Tensor]
    """What gradients are taken for, by name: an oracle may know fewer."""


@dataclass(frozen=True)
class Entry:
    """One row of a table."""

    name: str
    bind: Callable[[bool], Bound]
    """Makes the computation in float32: on the case's small problem if true, else on the one that is timed."""
    oracle: Callable[[bool], Bound] | None
    """The same in float64, by other means where there are any; None for a yardstick."""
    tolerance: float = TOLERANCE
    only_forward: str = ""
    """Why it has no gradients; empty where it has."""
    counted: bool = True
    """Whether the FLOP counter sees what it computes."""
    note: str = ""


@dataclass(frozen=True)
class Case:
    """Entries that take turns."""

    title: str
    entries: list[Entry]
    reference: str
    """The entry that ratios are taken to."""
    ways: tuple[str, ...] = (FORWARD, BACKWARD)
    same_task: bool = True
    """Whether all compute the same thing, so that what the least of them needs bounds all."""
    gate_full_size: bool = True
    """Whether the oracle can afford the problem that is timed; if not, entries are held to it on the small one."""
    needed: str = ""
    """The entry whose operations are those that the task needs, where it is not the reference."""


def yardstick(name: str, bind: Callable[[bool], Bound], **options: Any) -> Entry:
    """Something else that takes part to be compared with; it has nothing to agree with."""
    return Entry(name, bind, None, **options)


def random_leaves(dtype: torch.dtype, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Normal numbers, the same ones in every type."""
    torch.manual_seed(0)
    made = {name: torch.randn(shape) for name, shape in shapes.items()}
    return {name: x.to(DEVICE, dtype).requires_grad_() for name, x in made.items()}


def token_major(dtype: torch.dtype, heads: int, size: int, **rows: int) -> dict[str, Tensor]:
    """Random (1, H, rows, D) that lie as projections leave them, heads side by side."""
    made = random_leaves(dtype, **{name: (1, n, heads, size) for name, n in rows.items()})
    return {name: x.detach().transpose(1, 2).requires_grad_() for name, x in made.items()}


def of_leaves(function: Callable[..., Tensor], leaves: dict[str, Tensor]) -> Bound:
    """A function of all leaves, in their order."""
    return Bound(lambda: function(*leaves.values()), leaves)


def of_module(
    module: nn.Module, read: Callable[[nn.Module, Tensor], Tensor], x: Tensor, without: Iterable[str] = ()
) -> Bound:
    """A module on an input, with its parameters as leaves."""
    parameters = {name: p for name, p in module.named_parameters() if name not in without}
    return Bound(lambda: read(module, x), {"x": x, **parameters})


def in_float64(module: nn.Module) -> nn.Module:
    """A copy in float64."""
    return copy.deepcopy(module).double()
