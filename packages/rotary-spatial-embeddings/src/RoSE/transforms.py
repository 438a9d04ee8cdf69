"""Learnable transforms of the spacing.

Positions are ``index * spacing``. When one model sees spacings from nanometres to millimetres, no single band
of wavelengths fits them all; a transform replaces the spacing s by T(s), learned along with the rest, so that
coarse grids need not spin through the whole band. T is positive and increasing for every parameter value, so
no axis is ever mirrored, annihilated or swapped in order with another.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

FORMS = ("identity", "power", "log")


class PowerSpacing(nn.Module):
    """``T(s) = gain * (s / r) ** exponent * r`` for every axis, r the reference spacing.

    Gain and exponent are kept as logarithms, so both are always positive; they start at 1, the identity. An
    exponent below 1 brings distant scales together, and 0 would make all spacings alike.

    Args:
        reference_spacing: The spacing of every axis that ``gain`` alone acts on, physical units.
        device: Where to put the parameters.
        dtype: Of the parameters.
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
        self.log_gain = nn.Parameter(torch.empty(len(reference_spacing), device=device, dtype=dtype))
        self.log_exponent = nn.Parameter(torch.empty(len(reference_spacing), device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Return to the identity."""
        self.log_gain.zero_()
        self.log_exponent.zero_()

    def forward(self, spacing: Tensor) -> Tensor:
        """The factor ``T(s) / s`` on positions, for spacings ``(..., axes)``; float64."""
        relative = spacing.to(torch.float64) / spacing.new_tensor(self.reference_spacing, dtype=torch.float64)
        exponent = self.log_exponent.to(torch.float64).exp()
        return torch.exp(self.log_gain.to(torch.float64) + (exponent - 1) * relative.log())


class LogSpacing(nn.Module):
    """``T(s) = gain * r * log(1 + s / (knee r)) / log(1 + 1 / knee)`` for every axis, r the reference
    spacing.

    Proportional to s far below ``knee * r`` and logarithmic far above it; T(r) = gain * r. Gain and knee are
    kept as logarithms, so both are always positive, and start at 1.

    Args:
        reference_spacing: The spacing of every axis that ``gain`` alone acts on, physical units.
        device: Where to put the parameters.
        dtype: Of the parameters.
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
        self.log_gain = nn.Parameter(torch.empty(len(reference_spacing), device=device, dtype=dtype))
        self.log_knee = nn.Parameter(torch.empty(len(reference_spacing), device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Return to gain and knee 1."""
        self.log_gain.zero_()
        self.log_knee.zero_()

    def forward(self, spacing: Tensor) -> Tensor:
        """The factor ``T(s) / s`` on positions, for spacings ``(..., axes)``; float64."""
        relative = spacing.to(torch.float64) / spacing.new_tensor(self.reference_spacing, dtype=torch.float64)
        knee = self.log_knee.to(torch.float64).exp()
        stretched = torch.log1p(relative / knee) / torch.log1p(1 / knee)
        return self.log_gain.to(torch.float64).exp() * stretched / relative


def make_spacing_transform(
    form: str | None,
    reference_spacing: tuple[float, ...],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> PowerSpacing | LogSpacing | None:
    """The transform of a given name; None and ``"identity"`` leave spacings as they are."""
    if form == "power":
        return PowerSpacing(reference_spacing, device, dtype)
    return LogSpacing(reference_spacing, device, dtype) if form == "log" else None
