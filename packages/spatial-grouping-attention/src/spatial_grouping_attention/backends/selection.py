"""Which engine serves a call: what each one cannot do, and the one rule by which "auto" chooses."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

import torch
from RoSE.kernels.selfcheck import SelfCheck
from RoSE.tracing import is_forward_mode
from RoSE.validation import require_choice

from ..geometry import remembered
from .engines import Backend, engine
from .operands import Problem
from .transforms import under_transform

_NAMES = [backend.value for backend in Backend]


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
    reasons: list[str] = []
    if backend is not Backend.REFERENCE:
        if torch.onnx.is_in_onnx_export() and backend is not Backend.TILED:
            reasons.append("ONNX has standard operators only, and reference and tiled alone are made of those")
        if is_forward_mode():
            reasons.append(
                "forward-mode derivatives go through standard operators, and reference alone is made of those"
            )
    if backend is Backend.NATTEN and under_transform():
        reasons.append("natten has no rules for function transforms (torch.func)")
    return reasons + list(engine(backend.value).refusals(problem))


def select(problem: Problem, requested: str = "auto", passes: Collection[str] = ("pool",)) -> Selection:
    """Choose the backend of a call.

    "auto" takes ``fused`` where every token sees every group; where a window is given, ``triton`` on CUDA and
    ``native`` on a CPU where numba is installed, each once it has shown on that device that it agrees with the plain
    formulas, else ``tiled``; and ``reference`` where none of these can serve (a bias for every pair is as large as the
    matrix that ``reference`` makes; ONNX and forward-mode derivatives need standard operators,
    and ONNX takes ``tiled`` apart into those). ``natten`` serves on
    request only, for as long as no measurement says where it is faster.

    Args:
        problem: what decides who can compute the call.
        requested: a backend's name, or "auto".
        passes: what the call may come to, of "pool", "assign", "pool_backward" and "assign_backward". Kernels for the
            CPU are compiled for their check, so only these are looked at: who takes no gradients waits for none.

    Raises:
        ValueError: the name is unknown, or the requested backend cannot serve; every reason is listed.
    """
    if requested != Backend.AUTO:
        return _requested(problem, require_choice("backend", requested, _NAMES))
    standard = torch.onnx.is_in_onnx_export() or is_forward_mode()
    trusted = None
    if refusals(Backend.FUSED, problem):
        for kernels, devices, checks in (
            (Backend.TRITON, TRITON_DEVICES, (TRITON_CHECK,)),
            (Backend.NATIVE, NATIVE_DEVICES, [NATIVE_CHECKS[name] for name in passes]),
        ):
            looked_at = problem.device.type in devices and not refusals(kernels, problem)
            if trusted is None and looked_at and all(check.passed(problem.device) for check in checks):
                trusted = kernels
    return _automatic(problem, standard, trusted)


def _requested(problem: Problem, name: str) -> Selection:
    backend = Backend(name)
    if against := refusals(backend, problem):
        reasons = "".join(f"\n  - {reason}" for reason in against)
        raise ValueError(f"backend={name!r} cannot serve this call:{reasons}")
    return Selection(backend, "requested", problem)


@remembered(1024)
def _automatic(problem: Problem, standard: bool, trusted: Backend | None) -> Selection:
    """The rule; what it depends on besides the problem is an argument, so that answers can be remembered."""
    if not refusals(Backend.FUSED, problem):
        return Selection(Backend.FUSED, "every token sees every group", problem)
    if trusted is not None:
        where = "a GPU" if trusted is Backend.TRITON else "a CPU"
        return Selection(trusted, f"the window hides some groups from some tokens, on {where}", problem)
    if not refusals(Backend.TILED, problem):
        return Selection(Backend.TILED, "the window hides some groups from some tokens", problem)
    return Selection(Backend.REFERENCE, "no other backend can serve", problem)


def _check_triton(device: torch.device) -> None:
    from .triton.check import agrees

    agrees(device)


TRITON_DEVICES = ("cuda",)
"""Device types on which "auto" looks at ``triton``."""

TRITON_CHECK = SelfCheck("the triton kernels of spatial_grouping_attention", _check_triton, "backend 'tiled'")


def _check_native(name: str, device: torch.device) -> None:
    from .native.check import agrees

    agrees(name, device)


NATIVE_DEVICES = ("cpu",)
"""Device types on which "auto" looks at ``native``."""

NATIVE_CHECKS = {
    name: SelfCheck(
        f"the native kernels of spatial_grouping_attention ({name})", partial(_check_native, name), "backend 'tiled'"
    )
    for name in ("pool", "assign", "pool_backward", "assign_backward")
}
"""Of every pass."""
