"""From positions to angles to cosines and sines, as pure functions.

Angles are float64 and reduced modulo a turn before they are rounded, so that a position far from zero costs no
accuracy whatever the dtype of the features.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .validation import require_position_dtype


def phases(coordinates: Tensor, freqs: Tensor) -> Tensor:
    """Angles of every token, head and plane: the inner products ``<p, w>``.

    Args:
        coordinates: Positions ``(..., tokens, spatial_dims)`` in physical units.
        freqs: Wave vectors ``(heads, planes, spatial_dims)`` in radians per physical unit.

    Returns:
        Angles in radians, ``(..., tokens, heads, planes)``, float64 and not reduced. Float64 because an angle
        of 1e5 radians in float32 is only good to 0.008. (Apple's GPUs have no float64: for tensors there, the
        angles are made on the CPU.)

    Raises:
        TypeError: An argument that is not a tensor of float32 or float64.
        ValueError: Shapes that disagree.
    """
    require_position_dtype("coordinates", coordinates)
    require_position_dtype("freqs", freqs)
    if freqs.dim() != 3:
        raise ValueError(f"freqs must have shape (heads, planes, spatial_dims); got {tuple(freqs.shape)}")
    if coordinates.dim() < 2 or coordinates.shape[-1] != freqs.shape[-1]:
        raise ValueError(
            f"coordinates must have shape (..., tokens, {freqs.shape[-1]}) for freqs {tuple(freqs.shape)}; "
            f"got {tuple(coordinates.shape)}"
        )
    if freqs.device.type == "mps":
        coordinates, freqs = coordinates.cpu(), freqs.cpu()
    # Autocast leaves float64 products alone, so this holds under autocast too.
    wide = freqs.to(torch.float64).flatten(0, 1)
    angles = coordinates.to(torch.float64) @ wide.transpose(0, 1)
    return torch.unflatten(angles, -1, freqs.shape[:2])


def cos_sin(angles: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Cosine and sine of angles, accurate however large the angles are.

    The angles are reduced modulo 2 pi in their own dtype (float64 from :func:`phases`) before they are
    rounded to ``dtype``, so positions 1e5 units from zero cost no accuracy.

    Args:
        angles: Radians, any shape.
        dtype: Of the results; float32 or float64.

    Returns:
        Two tensors of the shape of ``angles``.

    Raises:
        TypeError: Angles that are not a tensor of float32 or float64.
        ValueError: Another dtype.
    """
    require_position_dtype("angles", angles)
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64; got {dtype}")
    # A tensor, because the ONNX exporter narrows plain numbers to float32: 1e-4 off after a hundred turns.
    turn = torch.tensor(2 * math.pi, dtype=torch.float64, device="cpu")
    reduced = (angles / turn).frac_().mul_(turn).to(dtype)
    return reduced.cos(), reduced.sin()


def angles_of_tokens(
    positions: Tensor, freqs: Tensor, num_prefix_tokens: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``(..., prefix + tokens, heads, planes)``; prefix tokens, which have no position, turn by 0."""
    # A token at the origin turns by exactly zero: prefix tokens are put there.
    padded = F.pad(positions, (0, 0, num_prefix_tokens, 0))
    return cos_sin(phases(padded.to(freqs.device), freqs), dtype)
