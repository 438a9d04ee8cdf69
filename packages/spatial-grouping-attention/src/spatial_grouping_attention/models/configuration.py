"""What may be said of a network's stages and the steps between them, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from RoSE.validation import require_choice, require_int, require_ints, require_odd, require_real

from ..layers.temperature import TEMPERATURES
from .downsample import GROUPINGS

Ints = int | Sequence[int]
Sizes = int | Sequence[Ints]


class Steps(NamedTuple):
    """How grids become coarser, everything per axis."""

    scales: tuple[tuple[int, ...], ...]
    """Pixels between the tokens of every stage."""
    strides: tuple[tuple[int, ...], ...]
    """Of every grouping."""
    kernels: tuple[tuple[int, ...], ...]
    """Of every grouping's convolution."""


def require_per_stage(name: str, value: Sequence[int], stages: int | None, *, minimum: int = 1) -> tuple[int, ...]:
    """Return one int of at least ``minimum`` per stage; ``stages`` None for any number of two or more."""
    rule = "one int per stage, two stages or more" if stages is None else f"{stages} ints, one per stage"
    if not isinstance(value, Sequence):
        raise TypeError(f"{name} must be {rule}; got {value!r} of type {type(value).__name__}")
    if len(value) < 2 or len(value) != (stages or len(value)):
        raise ValueError(f"{name} must be {rule}; got {value!r}")
    return tuple(require_int(f"{name}[{i}]", n, minimum=minimum) for i, n in enumerate(value))


def require_window(name: str, value: Ints, spatial_dims: int) -> tuple[int, ...]:
    """Return an odd number per axis."""
    return require_odd(name, require_ints(name, value, spatial_dims, minimum=1))


def require_steps(spatial_dims: int, levels: int, stem_stride: Ints, strides: Sizes, kernels: Sizes) -> Steps:
    """Return stem and groupings as steps.

    Only strides of 1 and 2 with odd kernels have cells that are whole at every border, whatever the size: otherwise
    results would depend on padding.
    """
    stem = require_ints("stem_stride", stem_stride, spatial_dims, minimum=1)
    scales, each = [stem], _per_level("strides", strides, levels, spatial_dims)
    for level, stride in enumerate(each):
        for axis, s in enumerate(stride):
            require_choice(f"strides[{level}][{axis}]", s, (1, 2))
        scales.append(tuple(a * s for a, s in zip(scales[-1], stride, strict=True)))
    kernel_sizes = _per_level("kernels", kernels, levels, spatial_dims)
    for level, kernel in enumerate(kernel_sizes):
        require_odd(f"kernels[{level}]", kernel)
    return Steps(tuple(scales), each, kernel_sizes)


def require_groupings(kinds: str | Sequence[str] | None, levels: int) -> tuple[str, ...]:
    """Return the kind of every grouping; by default dense before the last stage and sparse before."""
    if kinds is None:
        return ("sparse",) * (levels - 1) + ("dense",)
    if isinstance(kinds, str):
        return (require_choice("grouping", kinds, GROUPINGS),) * levels
    if not isinstance(kinds, Sequence):
        raise TypeError(f"grouping must be a name or {levels} names, one per grouping; got {kinds!r}")
    if len(kinds) != levels:
        raise ValueError(f"grouping must be a name or {levels} names, one per grouping; got {kinds!r}")
    return tuple(require_choice(f"grouping[{i}]", kind, GROUPINGS) for i, kind in enumerate(kinds))


def require_rounds(iters: int, mlp_ratio: float, compactness: float | None, temperature: str) -> dict[str, Any]:
    """Return what groupings do in their rounds, as keywords of their layers; judged for twins too, which have none."""
    return {
        "iters": require_int("iters", iters, minimum=0),
        "mlp_ratio": require_real("grouping_mlp_ratio", mlp_ratio, above=0.0),
        "compactness": None if compactness is None else require_real("compactness", compactness, above=0.0),
        "temperature": require_choice("temperature", temperature, TEMPERATURES),
    }


def _per_level(name: str, value: Sizes, levels: int, spatial_dims: int) -> tuple[tuple[int, ...], ...]:
    """One int for all groupings, or an entry per grouping -> ints per axis for every grouping."""
    if isinstance(value, int):
        return (require_ints(name, value, spatial_dims, minimum=1),) * levels
    rule = f"an int or {levels} entries, one per grouping"
    if not isinstance(value, Sequence):
        raise TypeError(f"{name} must be {rule}; got {value!r} of type {type(value).__name__}")
    if len(value) != levels:
        raise ValueError(f"{name} must be {rule}; got {value!r}")
    return tuple(require_ints(f"{name}[{i}]", each, spatial_dims, minimum=1) for i, each in enumerate(value))
