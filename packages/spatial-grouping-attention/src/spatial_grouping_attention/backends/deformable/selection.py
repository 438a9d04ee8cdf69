"""Which engine computes at points: the formulas in plain torch, or kernels for the CPU where they can serve."""

from __future__ import annotations

import importlib.util
from functools import partial
from types import ModuleType

import torch
from RoSE.kernels.selfcheck import SelfCheck
from RoSE.tracing import is_transformed
from RoSE.validation import require_choice
from torch import Tensor

from ...geometry.lattice import Lattice
from ..autograd import is_watched
from . import native, plain

BACKENDS = ("auto", "reference", "native")
"""By which a caller asks for one."""

MOST_AXES = 3

_DTYPES = (torch.float32, torch.float64)
_INSTALLED = importlib.util.find_spec("numba") is not None


def refusals(places: Tensor, groups: Lattice, *operands: Tensor) -> list[str]:
    """Reasons why the kernels cannot compute with places and other operands; empty where they can."""
    reasons = []
    tensors = (places, *operands) if groups.valid is None else (places, *operands, groups.valid)
    devices = {x.device.type for x in tensors}
    if not _INSTALLED:
        reasons.append("native needs numba: pip install spatial-grouping-attention[cpu]")
    if devices != {"cpu"}:
        reasons.append(f"native needs tensors on a cpu; got {', '.join(sorted(devices))}")
    if len(groups.shape) > MOST_AXES:
        reasons.append(f"native takes up to {MOST_AXES} axes; got {len(groups.shape)}")
    types = {operand.dtype for operand in (places, *operands)}
    if len(types) > 1 or places.dtype not in _DTYPES:
        reasons.append(f"native takes float32 or float64, and one of them at a time; got {sorted(map(str, types))}")
    if torch.onnx.is_in_onnx_export() or is_watched(*tensors):
        reasons.append("compilers, exporters, dispatch modes and kinds of tensors are shown standard operators")
    elif is_transformed():
        reasons.append("function transforms and forward-mode derivatives go through standard operators")
    return reasons


def engine(backend: str, places: Tensor, groups: Lattice, *operands: Tensor) -> ModuleType:
    """The module that computes with places and other operands: :mod:`.plain` or :mod:`.native`.

    Args:
        backend: one of :data:`BACKENDS`.
        places: (B, H, N, P, ndim).
        groups: the grid of groups.
        *operands: what else is computed with.

    Raises:
        ValueError: there is no such backend; or it is "native" and the kernels cannot serve: every reason is listed.
    """
    if require_choice("backend", backend, BACKENDS) == "reference":
        return plain
    against = refusals(places, groups, *operands)
    if backend == "native" and against:
        raise ValueError("backend='native' cannot serve this call:" + "".join(f"\n  - {reason}" for reason in against))
    # No kernel is made for no work at all.
    if against or 0 in places.shape or any(0 in operand.shape for operand in operands):
        return plain
    differentiable = torch.is_grad_enabled() and any(operand.requires_grad for operand in (places, *operands))
    checks = CHECKS.values() if differentiable else [CHECKS["forward"]]
    return native if backend == "native" or all(check.passed(places.device) for check in checks) else plain


def _check(name: str, device: torch.device) -> None:
    from .check import agrees

    agrees(name, device)


CHECKS = {
    name: SelfCheck(
        f"the native kernels of spatial_grouping_attention (points, {name})", partial(_check, name), "plain PyTorch"
    )
    for name in ("forward", "backward")
}
"""Of the kernels, before "auto" takes them."""
