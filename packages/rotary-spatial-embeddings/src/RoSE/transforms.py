"""Learnable transforms of the spacing.

Positions are ``index * spacing``. When one model sees spacings from nanometres to millimetres, no single band
of wavelengths fits them all; a transform replaces the spacing s by T(s), learned along with the rest, so that
coarse grids need not spin through the whole band. T is positive and increasing for every parameter value, so
no axis is ever mirrored, annihilated or swapped in order with another.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .constants import numbers
from .validation import require_parameter_dtype
from .wide import WideModule

FORMS = ("identity", "power", "log")

# Positions are stretched by at most exp(50) either way: beyond, their gradients would leave the range of float32.
_MOST = 50.0
# Where log(1 + exp(z)) is exp(z) to all digits of float64.
_FLAT = -40.0


class IdentitySpacing(nn.Module):
    """``T(s) = s``: what the others are compared with; accepts what they accept."""

    def forward(self, spacing: Tensor) -> Tensor:
        """The factor on positions, for spacings ``(..., axes)``: 1."""
        return torch.ones_like(spacing, dtype=torch.float64)


class PowerSpacing(WideModule):
    """``T(s) = gain * (s / r) ** exponent * r`` for every axis, r the reference spacing.

    Gain and exponent are kept as logarithms, so both are always positive; they start at 1, the identity. An
    exponent below 1 brings distant scales together, and 0 would make all spacings alike.

    Args:
        reference_spacing: The spacing of every axis that ``gain`` alone acts on, physical units.
        device: Where to put the parameters.
        dtype: Of the parameters, float32 at least.
    """

    def __init__(
        self,
        reference_spacing: tuple[float, ...],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Check the arguments and set up; see the class."""
        super().__init__()
        self.reference_spacing = reference_spacing
        dtype = torch.promote_types(require_parameter_dtype(dtype), torch.float32)
        self.log_gain = nn.Parameter(torch.empty(len(reference_spacing), device=device, dtype=dtype))
        self.log_exponent = nn.Parameter(torch.empty(len(reference_spacing), device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Return to the identity."""
        self.log_gain.zero_()
        self.log_exponent.zero_()

    def forward(self, spacing: Tensor) -> Tensor:
        """The factor ``T(s) / s`` on positions, for spacings ``(..., axes)``; float64, within exp(-50) to exp(50)."""
        self._require_wide(log_gain=self.log_gain, log_exponent=self.log_exponent)
        relative = _log_relative(spacing, self.reference_spacing)
        exponent = self.log_exponent.to(torch.float64).clamp(-_MOST, _MOST).exp()
        return _stretch(self.log_gain, (exponent - 1) * relative)


class LogSpacing(WideModule):
    """``T(s) = gain * r * log(1 + s / (knee r)) / log(1 + 1 / knee)`` for every axis, r the reference
    spacing.

    Proportional to s far below ``knee * r`` and logarithmic far above it; T(r) = gain * r. Gain and knee are
    kept as logarithms, so both are always positive, and start at 1.

    Args:
        reference_spacing: The spacing of every axis that ``gain`` alone acts on, physical units.
        device: Where to put the parameters.
        dtype: Of the parameters, float32 at least.
    """

    def __init__(
        self,
        reference_spacing: tuple[float, ...],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Check the arguments and set up; see the class."""
        super().__init__()
        self.reference_spacing = reference_spacing
        dtype = torch.promote_types(require_parameter_dtype(dtype), torch.float32)
        self.log_gain = nn.Parameter(torch.empty(len(reference_spacing), device=device, dtype=dtype))
        self.log_knee = nn.Parameter(torch.empty(len(reference_spacing), device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Return to gain and knee 1."""
        self.log_gain.zero_()
        self.log_knee.zero_()

    def forward(self, spacing: Tensor) -> Tensor:
        """The factor ``T(s) / s`` on positions, for spacings ``(..., axes)``; float64, within exp(-50) to exp(50)."""
        self._require_wide(log_gain=self.log_gain, log_knee=self.log_knee)
        relative = _log_relative(spacing, self.reference_spacing)
        knee = self.log_knee.to(torch.float64)
        return _stretch(self.log_gain, _log_log1p_exp(relative - knee) - _log_log1p_exp(-knee) - relative)


def _log_relative(spacing: Tensor, reference_spacing: tuple[float, ...]) -> Tensor:
    """Logarithm of the spacing in reference spacings."""
    return spacing.to(torch.float64).log() - numbers(reference_spacing, spacing.device).log()


def _log_log1p_exp(z: Tensor) -> Tensor:
    """``log(log(1 + exp(z)))``, for every z."""
    upper = z.clamp_min(_FLAT)
    return torch.where(z < _FLAT, z, torch.logaddexp(upper, torch.zeros_like(upper)).log())


def _stretch(log_gain: Tensor, log_factor: Tensor) -> Tensor:
    return (log_gain.to(torch.float64) + log_factor).clamp(-_MOST, _MOST).exp()


def make_spacing_transform(
    form: str | None,
    reference_spacing: tuple[float, ...],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> IdentitySpacing | PowerSpacing | LogSpacing | None:
    """The transform of a given name; None and ``"identity"`` leave spacings as they are."""
    if form == "identity":
        return IdentitySpacing()
    if form == "power":
        return PowerSpacing(reference_spacing, device, dtype)
    return LogSpacing(reference_spacing, device, dtype) if form == "log" else None
