"""When a grid is too coarse for a wave.

A plane whose wave turns by more than pi between neighbouring grid points cannot be told from a slower one
that turns the other way: its wavelength is below two samples, the Nyquist limit.
"""

from __future__ import annotations

import math

from torch import Tensor

from .grid import Grid
from .validation import values_are_readable


class AliasingWarning(UserWarning):
    """A grid is too coarse for the fastest plane: neighbouring points turn by more than half a period."""


def aliasing_message(freqs: Tensor, grid: Grid, reference_spacing: tuple[float, ...]) -> str | None:
    """What is wrong with ``grid`` seen through ``freqs``; None where nothing is, or nothing is known.

    Values on an accelerator are read only from ``freqs``; reading a spacing there would stall it at every
    call.
    """
    spacing = grid.spacing
    if isinstance(spacing, Tensor):
        if spacing.device.type != "cpu" or not values_are_readable(spacing):
            return None
        spacing = tuple(spacing.detach().reshape(-1, grid.ndim).amax(0).tolist())
    if not freqs.numel() or not values_are_readable(freqs):
        return None
    steepest = freqs.detach().abs().amax(dim=(0, 1)).tolist()
    for axis, (step, fastest) in enumerate(zip(spacing, steepest, strict=True)):
        if step * fastest > math.pi and grid.shape[axis] > 1:
            return (
                f"spacing {step:g} along axis {axis} is more than half the shortest wavelength "
                f"({2 * math.pi / fastest:g}), so the fastest planes alias; raise reference_spacing (now "
                f"{reference_spacing[axis]:g}) to {reference_spacing[axis] * step * fastest / math.pi:.3g} or more, "
                "or give longer wavelengths"
            )
    return None
