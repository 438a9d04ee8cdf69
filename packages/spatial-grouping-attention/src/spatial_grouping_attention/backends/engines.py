"""The engines by name: the one place that knows which modules compute.

An engine is a module beside this one with ``refusals(problem)``, ``assign(operands)`` and ``pool(operands, lse)``. The
windowed ones compute outside of autograd, inside the operators of :mod:`.windowed`, and bring ``assign_backward`` and
``pool_backward`` too. Modules are imported when they are first asked for, so that no engine costs anything where
another serves.
"""

from __future__ import annotations

from enum import Enum
from importlib import import_module
from types import ModuleType


class Backend(str, Enum):
    """Implementations of the operators; all give the same results."""

    AUTO = "auto"
    REFERENCE = "reference"
    FUSED = "fused"
    TILED = "tiled"
    TRITON = "triton"
    NATTEN = "natten"


REGISTERED = frozenset({Backend.TILED, Backend.TRITON})
"""Engines that compute inside the operators of :mod:`.windowed`."""


def engine(backend: Backend | str) -> ModuleType:
    """The module that computes for a backend."""
    return import_module(f".{Backend(backend).value}", __package__)
