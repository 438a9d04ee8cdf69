"""Random changes of coordinates while training, so that a model meets more places and scales than its data has."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .validation import require_numbers, require_position_dtype, require_real


def augment_coordinates(
    coordinates: Tensor,
    *,
    shift: float | Iterable[float] | None = None,
    jitter: float | None = None,
    rescale: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Shift, stretch and rescale coordinates by random amounts, one for all tokens of a sample.

    In this order, as DINOv3 does (arXiv:2508.10104; ``layers/rope_position_encoding`` of its code, where coordinates
    run from -1 to 1): a shift, uniform along every axis; a factor for every axis, log-uniform; one factor for all axes,
    log-uniform. Factors scale about zero. Where zero is makes no difference between tokens that have a position,
    because scores depend on displacements; nor does the shift, which moves tokens against those that have none.

    Call it while training and not otherwise.

    Args:
        coordinates: ``(..., tokens, ndim)`` in physical units, float32 or float64. Every one of the leading
            dimensions counts samples, each with amounts of its own.
        shift: Largest shift, in the same unit: a number or one per axis, above 0.
        jitter: Largest factor of an axis, from which its reciprocal is the smallest; at least 1.
        rescale: Largest factor of all axes together, likewise.
        generator: Where random numbers come from; default torch's own of the coordinates' device.

    Returns:
        New coordinates of the same shape and dtype (the given ones where nothing is to change). Gradients flow to
        ``coordinates``.

    Raises:
        TypeError: Coordinates that are not a tensor of float32 or float64; amounts that are not numbers.
        ValueError: Coordinates without a dimension of tokens; amounts out of range.
    """
    points = require_position_dtype("coordinates", coordinates)
    if points.dim() < 2:
        raise ValueError(f"coordinates must have shape (..., tokens, ndim); got {tuple(points.shape)}")
    ndim = points.shape[-1]
    largest_shift = None if shift is None else require_numbers("shift", shift, ndim, positive=True)
    factors = [
        (axes, math.log(require_real(name, value, minimum=1.0)))
        for name, value, axes in (("jitter", jitter, ndim), ("rescale", rescale, 1))
        if value is not None
    ]

    def between_minus_one_and_one(axes: int) -> Tensor:
        device = points.device if generator is None else generator.device
        drawn = torch.empty(*points.shape[:-2], 1, axes, device=device, dtype=points.dtype)
        return drawn.uniform_(-1, 1, generator=generator).to(points.device)

    if largest_shift is not None:
        points = points + between_minus_one_and_one(ndim) * points.new_tensor(largest_shift)
    for axes, logarithm in factors:
        points = points * torch.exp(between_minus_one_and_one(axes) * logarithm)
    return points
