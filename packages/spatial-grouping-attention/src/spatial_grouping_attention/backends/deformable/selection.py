"""Which engine computes at points: the formulas in plain torch, or kernels where they can serve."""

from __future__ import annotations

import importlib.util
from functools import partial
from types import ModuleType

import torch
from RoSE.direct import is_watched
from RoSE.kernels.selfcheck import SelfCheck
from RoSE.tracing import is_transformed
from RoSE.validation import require_choice
from torch import Tensor

from ...geometry.lattice import Lattice
from .. import triton as windows
from . import plain
from .compiled import Compiled

NATIVE, TRITON = Compiled("native", ordered=True), Compiled("triton", ordered=False)

BACKENDS = ("auto", "reference", NATIVE.name, TRITON.name)
"""By which a caller asks for one."""

MOST_AXES = 3

_DTYPES = (torch.float32, torch.float64)
_INSTALLED = importlib.util.find_spec("numba") is not None


def refusals(by: Compiled, places: Tensor, groups: Lattice, *operands: Tensor) -> list[str]:
    """Reasons why kernels cannot compute with places and other operands; empty where they can."""
    tensors = (places, *operands) if groups.valid is None else (places, *operands, groups.valid)
    reasons = []
    if len(devices := sorted({str(x.device) for x in tensors})) > 1:
        reasons.append(f"{by.name} needs tensors on one device; got {', '.join(devices)}")
    if by is TRITON:
        reasons += windows.refusals_of_device(places.device)
    else:
        if not _INSTALLED:
            reasons.append("native needs numba: pip install spatial-grouping-attention[cpu]")
        if not places.is_cpu:
            reasons.append(f"native needs tensors on a cpu; got {places.device.type}")
    if torch.are_deterministic_algorithms_enabled() and not by.ordered:
        reasons.append(f"{by.name} adds up what groups receive in any order, and algorithms are to be deterministic")
    if len(groups.shape) > MOST_AXES:
        reasons.append(f"{by.name} takes up to {MOST_AXES} axes; got {len(groups.shape)}")
    types = {operand.dtype for operand in (places, *operands)}
    if len(types) > 1 or places.dtype not in _DTYPES:
        reasons.append(f"{by.name} takes float32 or float64, and one of them at a time; got {sorted(map(str, types))}")
    if torch.onnx.is_in_onnx_export() or is_watched(*tensors):
        reasons.append("compilers, exporters, dispatch modes and kinds of tensors are shown standard operators")
    elif is_transformed():
        reasons.append("function transforms and forward-mode derivatives go through standard operators")
    return reasons


def engine(backend: str, places: Tensor, groups: Lattice, *operands: Tensor) -> ModuleType | Compiled:
    """What computes with places and other operands: :mod:`.plain`, or kernels.

    Args:
        backend: one of :data:`BACKENDS`; "auto" takes the kernels of the places' device, once they have shown there
            that they agree with the formulas.
        places: (B, H, N, P, ndim).
        groups: the grid of groups.
        *operands: what else is computed with.

    Raises:
        ValueError: there is no such backend; or it is one of kernels that cannot serve: every reason is listed.
    """
    if require_choice("backend", backend, BACKENDS) == "reference":
        return plain
    by = {"auto": TRITON if places.is_cuda else NATIVE, NATIVE.name: NATIVE, TRITON.name: TRITON}[backend]
    against = refusals(by, places, groups, *operands)
    if backend != "auto" and against:
        lines = "".join(f"\n  - {reason}" for reason in against)
        raise ValueError(f"backend={backend!r} cannot serve this call:{lines}")
    # No kernel is made for no work at all.
    if against or 0 in places.shape or any(0 in operand.shape for operand in operands):
        return plain
    differentiable = torch.is_grad_enabled() and any(operand.requires_grad for operand in (places, *operands))
    checks = CHECKS[by.name].values() if differentiable else [CHECKS[by.name]["forward"]]
    return by if backend != "auto" or all(check.passed(places.device) for check in checks) else plain


def _check(by: Compiled, name: str, device: torch.device) -> None:
    from .check import agrees

    agrees(by, name, device)


CHECKS = {
    by.name: {
        name: SelfCheck(
            f"the {by.name} kernels of spatial_grouping_attention (points, {name})",
            partial(_check, by, name),
            "plain PyTorch",
        )
        for name in ("forward", "backward")
    }
    for by in (NATIVE, TRITON)
}
"""Of kernels, before "auto" takes them."""
