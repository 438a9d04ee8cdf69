"""Initial wave vectors: how long they are and where they point.

A plane with wave vector w turns by <p, w> radians at position p. The lengths |w| form a *band*, log-spaced
from fast (fine detail) to slow (long range). Two rules hold for every choice offered here:

* every head gets the whole band, so no head is blind to fine or to coarse displacements, and
* the directions within a head span all axes whenever the head has at least as many planes as there are axes,
  so that two different displacements never look the same.

All tables are built in float64 on the CPU and are a pure function of their arguments: the randomness of an
initialisation is confined to :func:`jitter`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .validation import require_real

SCALINGS = ("none", "linear", "sqrt", "adaptive")
DIRECTIONS = ("axial", "mixed", "uniform")

# A plane tells displacements apart over roughly a factor of four (from an eighth to half of its wavelength),
# so neighbouring wavelengths more than four times apart leave distances that no plane resolves.
ADAPTIVE_RATIO = 4.0


def scaled_theta(base_theta: float, scaling: str, planes: int, spatial_dims: int) -> float:
    """Ratio of the slowest to the fastest wavelength for one of the named ``frequency_scaling`` rules.

    ``"none"``: ``base_theta``; ``"linear"``: ``base_theta ** (1 / N)``; ``"sqrt"``: ``base_theta ** (1 /
    sqrt(N))``;
    ``"adaptive"``: as wide as ``planes / N`` planes an axis cover with neighbouring wavelengths a factor of four
    apart, ``4 ** (planes / N)``, and never wider than ``base_theta``; where N does not divide ``planes``, steps are
    larger along the axes that get one plane less.
    """
    if scaling == "none":
        return base_theta
    if scaling == "linear":
        return math.pow(base_theta, 1 / spatial_dims)
    if scaling == "sqrt":
        return math.pow(base_theta, 1 / math.sqrt(spatial_dims))
    # Compared as logarithms: 4 ** planes overflows for large heads.
    exponent = min(math.log(base_theta), planes / spatial_dims * math.log(ADAPTIVE_RATIO))
    return math.exp(exponent)


def wave_vectors(
    num_heads: int,
    planes: int,
    spatial_dims: int,
    *,
    directions: str,
    theta: float,
    wavelengths: tuple[float, float] | None,
) -> Tensor:
    """Wave vectors of all heads, ``(num_heads, planes, spatial_dims)`` float64, in radians per unit.

    The unit is the physical unit when ``wavelengths`` is given, else the reference spacing.

    * ``"axial"`` puts every plane on one axis and gives each axis a full band (Su et al., arXiv:2104.09864,
      in one dimension). Planes that do not divide evenly go to different axes in different heads.
    * ``"mixed"`` turns that axial frame by another rotation in every head, so that heads look along different
      directions (compare RoPE-Mixed, Heo et al., arXiv:2403.13298).
    * ``"uniform"`` gives each plane of the band its own direction from a low-discrepancy sequence.
    """
    if num_heads * planes == 0:
        return torch.zeros(num_heads, planes, spatial_dims, dtype=torch.float64, device="cpu")
    if directions == "uniform":
        lengths = _band(planes, theta, wavelengths)
        return lengths[:, None] * _spread_directions(num_heads * planes, spatial_dims).reshape(
            num_heads, planes, spatial_dims
        )
    if directions == "axial" and num_heads * planes < spatial_dims:
        raise ValueError(
            "directions must be 'mixed' or 'uniform' where there is not at least one plane per axis over all heads; "
            f"got 'axial' with {num_heads} heads x {planes} planes for {spatial_dims} axes"
        )
    frames = torch.stack([_axial_frame(h, planes, spatial_dims, theta, wavelengths) for h in range(num_heads)])
    if directions == "axial":
        return frames
    return frames @ _head_rotations(num_heads, spatial_dims)


def jitter(freqs: Tensor, std: float) -> Tensor:
    """Scale every wave vector by its own log-normal factor ``exp(std * normal)``, drawn from torch's
    generator.

    Directions stay as they are, so an axial table stays axial.
    """
    noise = torch.randn(*freqs.shape[:-1], 1, dtype=freqs.dtype, device=freqs.device)
    return freqs * torch.exp(std * noise)


def _band(count: int, theta: float, wavelengths: tuple[float, float] | None) -> Tensor:
    """``count`` magnitudes from fast to slow.

    From ``theta``: ``theta ** (-i / count)``, the original RoPE series, which starts at 1 and stops one step
    short of ``1 / theta``. From ``wavelengths``: ``2 pi / wavelength`` with both ends included (of one plane, the
    shortest).
    """
    steps = torch.arange(count, dtype=torch.float64, device="cpu")
    if wavelengths is None:
        return theta ** (-steps / count)
    shortest, longest = wavelengths
    return 2 * math.pi / shortest * (longest / shortest) ** (-steps / max(count - 1, 1))


def _axial_frame(
    head: int, planes: int, spatial_dims: int, theta: float, wavelengths: tuple[float, float] | None
) -> Tensor:
    """One head's planes, axis by axis, each axis with a full band: ``(planes, spatial_dims)``."""
    even, left_over = divmod(planes, spatial_dims)
    lucky = {(head * left_over + i) % spatial_dims for i in range(left_over)}
    blocks = []
    for axis in range(spatial_dims):
        count = even + (axis in lucky)
        block = torch.zeros(count, spatial_dims, dtype=torch.float64, device="cpu")
        block[:, axis] = _band(count, theta, wavelengths)
        blocks.append(block)
    return torch.cat(blocks)


def _head_rotations(num_heads: int, spatial_dims: int) -> Tensor:
    """A different proper rotation for each head, ``(num_heads, N, N)``.

    Each is a product of plane rotations, one for every pair of axes. Their angles step through a quarter turn
    (after which an axial frame repeats) along an additive low-discrepancy sequence, so heads are spread
    evenly however many there are.
    """
    pairs = [(a, b) for a in range(spatial_dims) for b in range(a + 1, spatial_dims)]
    turns = torch.eye(spatial_dims, dtype=torch.float64, device="cpu").repeat(num_heads, 1, 1)
    if not pairs:
        return turns
    angles = _additive_sequence(num_heads, len(pairs)) * (math.pi / 2)
    for column, (a, b) in enumerate(pairs):
        cos, sin = angles[:, column].cos(), angles[:, column].sin()
        step = torch.eye(spatial_dims, dtype=torch.float64, device="cpu").repeat(num_heads, 1, 1)
        step[:, a, a], step[:, a, b], step[:, b, a], step[:, b, b] = cos, sin, -sin, cos
        turns = turns @ step
    return turns


def _spread_directions(count: int, spatial_dims: int) -> Tensor:
    """``count`` unit vectors spread over a half sphere, ``(count, N)``.

    Low-discrepancy points of the unit cube, pushed through the normal quantile and normalised: a rotationally
    symmetric density in any number of dimensions. Opposite vectors carry the same information, so the first
    component is kept non-negative; in one dimension all directions are then +1.
    """
    points = torch.special.ndtri(_additive_sequence(count, spatial_dims))
    unit = points / points.norm(dim=-1, keepdim=True)
    return torch.where(unit[:, :1] < 0, -unit, unit)


def _additive_sequence(count: int, dims: int) -> Tensor:
    """Points of the additive recurrence with the generalised golden ratio, inside the open unit cube."""
    ratio = 2.0
    for _ in range(64):  # fixed point of ratio ** (dims + 1) = ratio + 1
        ratio = (1 + ratio) ** (1 / (dims + 1))
    steps = torch.arange(1, count + 1, dtype=torch.float64, device="cpu")
    slopes = torch.tensor([ratio ** -(d + 1) for d in range(dims)], dtype=torch.float64, device="cpu")
    return (0.5 + steps[:, None] * slopes).remainder(1.0).clamp(1e-9, 1 - 1e-9)


def per_axis_units(freqs: Tensor, reference_spacing: Sequence[float]) -> Tensor:
    """Turn radians per reference spacing into radians per physical unit, axis by axis."""
    return freqs / torch.tensor(reference_spacing, dtype=freqs.dtype, device=freqs.device)


def require_wavelengths(
    wavelengths: tuple[float, float] | None, reference_spacing: tuple[float, ...]
) -> tuple[float, float] | None:
    """Return wavelengths if they are a pair in order and nothing else sets the unit."""
    if wavelengths is None:
        return None
    if not isinstance(wavelengths, (tuple, list)) or len(wavelengths) != 2:
        raise TypeError(f"wavelengths must be a pair (shortest, longest); got {wavelengths!r}")
    shortest, longest = (require_real("wavelengths", w, above=0.0) for w in wavelengths)
    if shortest > longest:
        raise ValueError(f"wavelengths must be (shortest, longest); got {wavelengths}")
    if any(r != 1.0 for r in reference_spacing):
        raise ValueError(
            f"wavelengths are in physical units already, so reference_spacing must stay 1; got {reference_spacing}"
        )
    return shortest, longest
