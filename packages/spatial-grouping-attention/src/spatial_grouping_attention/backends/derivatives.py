"""What kernels on points are asked for: derivatives of one form, see :mod:`.native.points`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Relative(NamedTuple):
    """What derivatives of relative sums need besides: of every group (B, H, M)."""

    highest: Tensor
    masses: Tensor
    grad_masses: Tensor


class Wanted(NamedTuple):
    """Which derivatives are."""

    factors: bool = False
    places: bool = False
    tokens: bool = False
    groups: bool = False


class Derivatives(NamedTuple):
    """Of the form by its operands; None for those that are not wanted."""

    factors: Tensor | None
    places: Tensor | None
    tokens: Tensor | None
    groups: Tensor | None
