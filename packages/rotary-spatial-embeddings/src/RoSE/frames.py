"""When a spacing transform leaves tokens that attend to one another without a common frame.

A transform stretches every grid by a factor that depends on its spacing. Tokens of one spacing keep their distances,
all by the same factor; between tokens of different spacings distances mean nothing any more.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .aliasing import frames_to_the_caller
from .grid import Grid
from .positions import Where
from .reading import values_are_at_hand
from .validation import require_per_axis


class FrameWarning(UserWarning):
    """Tokens of different spacings meet behind a spacing transform, which stretches each by a factor of its own."""


class FrameWatch:
    """Looks at the tokens that meet in a call of a module, and warns once in its life."""

    def __init__(self) -> None:
        self._has_warned = False

    def look(self, wheres: Iterable[Where], spatial_dims: int) -> None:
        """Warn if tokens that were resolved in one call differ in spacing.

        Warns:
            FrameWarning: With two of the spacings.
        """
        if torch.compiler.is_compiling() or self._has_warned:  # in this order: a compiler must not watch the state
            return
        said = [spacing for where in wheres for spacing in _spacings(where)]
        first, *rest = (require_per_axis("spacing", s, spatial_dims, positive=True) for s in said)
        for other in rest:
            if _differ(first, other):
                self._has_warned = True
                warnings.warn(
                    f"a spacing_transform stretches tokens of spacing {_shown(first)} and of spacing {_shown(other)} "
                    "by different factors, so they share no physical frame; use spacing_transform=None where tokens "
                    "of different spacings attend to one another",
                    FrameWarning,
                    stacklevel=frames_to_the_caller(),
                )
                return


def _spacings(where: Where) -> list[Any]:
    """The spacings of all grids and points that the caller speaks of."""
    spacing, _, coordinates, _ = where
    if isinstance(coordinates, (list, tuple)):
        beside = [None] * len(coordinates) if spacing is None else spacing
        return [p.spacing if isinstance(p, Grid) else s for p, s in zip(coordinates, beside, strict=True)]
    if isinstance(coordinates, Grid):
        return [coordinates.spacing]
    return [1.0 if spacing is None else spacing]


def _differ(a: tuple[float, ...] | Tensor, b: tuple[float, ...] | Tensor) -> bool:
    """Whether two spacings are known to differ; values on an accelerator are not read."""
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return a != b
    if any(isinstance(s, Tensor) and not values_are_at_hand(s) for s in (a, b)):
        return False
    one, other = (torch.as_tensor(s, dtype=torch.float64, device="cpu") for s in (a, b))
    return bool((one != other).any())


def _shown(spacing: tuple[float, ...] | Tensor) -> object:
    return spacing.tolist() if isinstance(spacing, Tensor) else spacing
