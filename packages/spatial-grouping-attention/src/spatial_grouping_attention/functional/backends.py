"""Which implementation serves a call: every backend's limits, and the one rule by which "auto" chooses."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from .. import validation
from ..geometry import Neighbourhood
from . import flash, natten_backend, triton_backend
from .reference import is_table


class Backend(str, Enum):
    """Implementations of the operators; all give the same results."""

    AUTO = "auto"
    REFERENCE = "reference"
    FUSED = "fused"
    TILED = "tiled"
    TRITON = "triton"
    NATTEN = "natten"


@dataclass(frozen=True)
class Problem:
    """What a backend has to know of a call to say whether it can serve it."""

    device: torch.device
    dtype: torch.dtype
    head_size: int
    neighbourhood: Neighbourhood | None
    bias: str | None
    """``None``, ``"table"`` or ``"full"``."""

    @classmethod
    def of(cls, q: Tensor, neighbourhood: Neighbourhood | None, bias: Tensor | None) -> Problem:
        """Describe a call with validated arguments."""
        kind = None if bias is None else "table" if is_table(bias, q.shape[1], neighbourhood) else "full"
        return cls(q.device, q.dtype, q.shape[-1], neighbourhood, kind)

    @property
    def dense(self) -> bool:
        """Whether every token sees every group."""
        return self.neighbourhood is None or self.neighbourhood.covers_all


@dataclass(frozen=True)
class Selection:
    """The backend of a call, why it was chosen, and why the others were not."""

    backend: Backend
    reason: str
    problem: Problem

    @property
    def refusals(self) -> dict[Backend, list[str]]:
        """Every reason why each backend cannot serve the call; empty lists for those that can.

        Found only when asked for: reasons quote sizes, which a compiler would take for constants.
        """
        return {backend: refusals(backend, self.problem) for backend in Backend if backend is not Backend.AUTO}

    def __str__(self) -> str:
        """The whole decision in words."""
        lines = [f"{self.backend.value}: {self.reason}"]
        for backend, reasons in self.refusals.items():
            lines += [f"  {backend.value} cannot: {reason}" for reason in reasons]
        return "\n".join(lines)


def refusals(backend: Backend, problem: Problem) -> list[str]:
    """Every reason why a backend cannot serve a call; empty where it can."""
    reasons = []
    if backend is not Backend.REFERENCE and torch.onnx.is_in_onnx_export():
        reasons.append("ONNX has standard operators only, and reference alone is made of those")
    if backend is Backend.FUSED:
        reasons += flash.refusals(problem.device, problem.dtype)
        if not problem.dense:
            reasons.append("fused is dense: it needs neighbourhood=None or a window that covers every group")
        if problem.bias is not None:
            reasons.append(f"fused takes no bias, got a {problem.bias} one: its kernels give it no gradient")
    if backend is Backend.TILED:
        if problem.neighbourhood is None:
            reasons.append("tiled is windowed: it needs a neighbourhood")
        if problem.bias == "full":
            reasons.append("tiled takes a bias per window offset only, got one for every pair")
    if backend is Backend.TRITON:
        reasons += triton_backend.refusals(
            problem.device, problem.dtype, problem.head_size, problem.neighbourhood, problem.bias
        )
    if backend is Backend.NATTEN:
        reasons += natten_backend.refusals(problem.device, problem.dtype, problem.neighbourhood, problem.bias)
    return reasons


def select(problem: Problem, requested: Backend | str = Backend.AUTO) -> Selection:
    """Choose the backend of a call.

    "auto" takes ``fused`` where every token sees every group, ``tiled`` where a window is given, and ``reference``
    where neither can serve (a bias for every pair is as large as the matrix that ``reference`` makes). ``triton``
    and ``natten`` serve on request only, for as long as no measurement on a GPU says where they are faster.

    Raises:
        ValueError: the name is unknown, or the requested backend cannot serve; every reason is listed.
    """
    validation.one_of("backend", requested, [b.value for b in Backend])
    requested = Backend(requested)
    if requested is not Backend.AUTO:
        if against := refusals(requested, problem):
            reasons = "".join(f"\n  - {reason}" for reason in against)
            raise ValueError(f"backend={requested.value!r} cannot serve this call:{reasons}")
        return Selection(requested, "requested", problem)
    if not refusals(Backend.FUSED, problem):
        return Selection(Backend.FUSED, "every token sees every group", problem)
    if not refusals(Backend.TILED, problem):
        return Selection(Backend.TILED, "the window hides some groups from some tokens", problem)
    return Selection(Backend.REFERENCE, "no other backend can serve", problem)
