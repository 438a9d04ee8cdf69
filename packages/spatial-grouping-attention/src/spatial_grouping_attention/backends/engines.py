"""The engines by name: the one place that knows which modules compute.

An engine is a module beside this one with ``refusals(problem)``, ``assign(operands)`` and ``pool(operands, lse)``. The
registered ones compute outside of autograd, inside the operators of :mod:`.registered`, and bring ``assign_backward``
and ``pool_backward`` too. No engine imports another, and none imports its optional library before it is called.
"""

from __future__ import annotations

from enum import Enum
from types import ModuleType

from . import fused, native, natten, reference, tiled, triton


class Backend(str, Enum):
    """Implementations of the operators; all give the same results."""

    AUTO = "auto"
    REFERENCE = "reference"
    FUSED = "fused"
    TILED = "tiled"
    NATIVE = "native"
    TRITON = "triton"
    NATTEN = "natten"


REGISTERED = frozenset({Backend.FUSED, Backend.TILED, Backend.NATIVE, Backend.TRITON})
"""Engines that compute inside the operators of :mod:`.registered`."""

KEEPING = frozenset({Backend.FUSED.value})
"""Those whose ``pool`` keeps ``expected_q`` for the backward pass."""


_MODULES: dict[str, ModuleType] = {
    Backend.REFERENCE.value: reference,
    Backend.FUSED.value: fused,
    Backend.TILED.value: tiled,
    Backend.NATIVE.value: native,
    Backend.TRITON.value: triton,
    Backend.NATTEN.value: natten,
}


def engine(name: str) -> ModuleType:
    """The module that computes for a backend, by its value."""
    return _MODULES[name]
