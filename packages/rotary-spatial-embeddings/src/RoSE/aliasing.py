"""When a grid is too coarse for a wave.

A plane whose wave turns by more than pi between neighbouring grid points cannot be told from a slower one
that turns the other way: its wavelength is below two samples, the Nyquist limit.
"""

from __future__ import annotations

import math
import sys
import warnings

import torch
from torch import Tensor

from .grid import Grid
from .reading import values_are_at_hand, values_are_readable

# Grids that a module remembers: a list of resolutions, or crops of many sizes, beside one another in turn.
MOST_SEEN = 256


class AliasingWarning(UserWarning):
    """A grid is too coarse for the fastest plane: neighbouring points turn by more than half a period."""


class AliasingWatch:
    """Looks at the grids a module meets, and warns once in its life.

    Args:
        reference_spacing: Of the module; None where it was given wavelengths instead.
    """

    def __init__(self, reference_spacing: tuple[float, ...] | None) -> None:
        self.reference_spacing = reference_spacing
        self._seen: set[tuple[tuple[float, ...], tuple[int, ...]]] = set()
        self._has_warned = False

    def look(self, freqs: Tensor, grid: Grid, stretch: Tensor | None = None) -> None:
        """Warn if ``grid``, stretched by what a spacing transform makes of it, is too coarse for ``freqs``.

        Warns:
            AliasingWarning: With the spacing, and the parameter to change.
        """
        if torch.compiler.is_compiling() or self._has_warned:
            return
        if isinstance(grid.spacing, tuple):  # the usual case, and one that need not be looked at twice
            if (grid.spacing, grid.shape) in self._seen:
                return
            if values_are_readable(freqs):
                if len(self._seen) == MOST_SEEN:
                    self._seen.clear()
                self._seen.add((grid.spacing, grid.shape))
        message = aliasing_message(freqs, grid, self.reference_spacing, stretch)
        if message is not None:
            self._has_warned = True
            warnings.warn(message, AliasingWarning, stacklevel=frames_to_the_caller())


def aliasing_message(
    freqs: Tensor, grid: Grid, reference_spacing: tuple[float, ...] | None, stretch: Tensor | None = None
) -> str | None:
    """What is wrong with ``grid`` seen through ``freqs``; None where nothing is, or nothing is known.

    ``reference_spacing`` is None where the module was given wavelengths instead; ``stretch`` are the factors of a
    spacing transform, ``([batch,] axes)``.
    """
    known = values_are_at_hand if isinstance(grid.spacing, Tensor) else values_are_readable
    if not freqs.numel() or not known(freqs):
        return None
    spacing = _largest_steps(grid, stretch)
    if spacing is None:
        return None
    steepest = freqs.detach().abs().amax(dim=(0, 1)).tolist()
    for axis, (step, fastest) in enumerate(zip(spacing, steepest, strict=True)):
        # Wave vectors are float32: half a wavelength exactly must pass.
        if step * fastest > math.pi * (1 + 1e-6) and grid.shape[axis] > 1:
            shortest = 2 * math.pi / fastest
            excess = step * fastest / math.pi
            step_name = "spacing"
            if stretch is not None:
                step_name = "spacing after its transform"
                advice = "raise reference_spacing or give longer wavelengths"
            elif reference_spacing is None:
                advice = f"give wavelengths whose shortest is {shortest * excess:.3g} or more"
            else:
                now = reference_spacing[axis]
                advice = (
                    f"raise reference_spacing (now {now:g}) to {now * excess:.3g} or more, or give longer wavelengths"
                )
            return (
                f"{step_name} {step:g} along axis {axis} is more than half the shortest wavelength ({shortest:g}), so "
                f"the fastest planes alias; {advice}"
            )
    return None


def _largest_steps(grid: Grid, stretch: Tensor | None) -> tuple[float, ...] | None:
    """The largest step of any sample along each axis; None where it cannot be known.

    On an accelerator nothing is read that could be another at every call, because that would stall its queue.
    """
    spacing = grid.spacing
    if isinstance(spacing, Tensor) and not values_are_at_hand(spacing):
        return None
    if stretch is not None:
        if not values_are_readable(stretch):
            return None
        spacing = torch.as_tensor(spacing, dtype=torch.float64, device="cpu") * stretch.detach().cpu()
    if not isinstance(spacing, Tensor):
        return spacing
    rows = spacing.detach().reshape(-1, grid.ndim)
    return tuple(rows.amax(0).tolist()) if len(rows) else None


# Packages between a user's line and a warning (named, because the second knows this one, not the other way round).
_BETWEEN = (__package__, "spatial_grouping_attention", "torch")


def frames_to_the_caller() -> int:
    """Frames between a warning and the line that called a module: behind these packages and torch's module calls."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        level, frame = level + 1, frame.f_back
    return level
