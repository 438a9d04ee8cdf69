"""Checks of what callers pass in, in one place, so that every error is worded the same way.

Everything here looks at types, shapes and python numbers only: nothing is computed on tensors, so the checks
cost no device synchronisation and vanish in traced graphs.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from RoSE import Grid

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def per_axis(name: str, value: Any, ndim: int, *, minimum: int) -> tuple[int, ...]:
    """Broadcast an int, or check a sequence of ints, to one integer per axis."""
    if hasattr(value, "tolist") and not isinstance(value, torch.Tensor):
        value = value.tolist()  # a NumPy array or number
    values = (value,) * ndim if _is_int(value) else value
    if not isinstance(values, Sequence) or isinstance(values, str) or not all(_is_int(v) for v in values):
        raise TypeError(f"{name} must be an int or a sequence of {ndim} ints, got {value!r}")
    if len(values) != ndim:
        raise ValueError(f"{name} must have one entry for each of the {ndim} axes, got {tuple(values)}")
    if any(v < minimum for v in values):
        raise ValueError(f"{name} must be at least {minimum} on every axis, got {tuple(values)}")
    return tuple(int(v) for v in values)


def positive_int(name: str, value: Any, *, minimum: int = 1) -> int:
    """Check for an int of at least ``minimum``."""
    if not _is_int(value):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return int(value)


def one_of(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Check membership and list what would have been accepted."""
    allowed = tuple(allowed)
    if not any(isinstance(value, type(a)) and value == a for a in allowed):
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")


def divides(divisor_name: str, divisor: int, name: str, value: int) -> None:
    """Check that ``divisor`` divides ``value``."""
    if value % divisor:
        raise ValueError(f"{divisor_name} must divide {name}, got {name}={value} and {divisor_name}={divisor}")


def floating(name: str, tensor: Any) -> None:
    """Check for a tensor of one of the supported floating dtypes."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}")


def boolean(name: str, tensor: Any) -> None:
    """Check for a tensor of booleans."""
    if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.bool:
        got = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be boolean, got {got}")


def shaped(name: str, tensor: torch.Tensor, pattern: str, **sizes: int) -> None:
    """Check a tensor against a pattern such as ``"B H N_in D"``; ``sizes`` pins some of its axes."""
    axes = pattern.split()
    fits = tensor.ndim == len(axes)
    if not fits or any(axis in sizes and n != sizes[axis] for axis, n in zip(axes, tensor.shape, strict=True)):
        # Worded only here: a compiler that writes down a size takes it for a constant.
        expected = ", ".join(f"{axis}={sizes[axis]}" if axis in sizes else axis for axis in axes)
        raise ValueError(f"{name} must have shape ({expected}), got {tuple(tensor.shape)}")


def finite_number(name: str, value: Any) -> float:
    """Check for a finite python number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """Check for True or False: a word such as "no" would count as true."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def probability(name: str, value: Any) -> float:
    """Check for a number in [0, 1)."""
    number = finite_number(name, value)
    if not 0.0 <= number < 1.0:
        raise ValueError(f"{name} must lie in [0, 1), got {number}")
    return number


def _is_int(value: Any) -> bool:
    """Integers, NumPy's and a compiler's symbolic ones too, but no truth values."""
    return isinstance(value, (int, numbers.Integral, torch.SymInt)) and not isinstance(value, bool)


def token_grid(
    x: Any,
    channels: int,
    ndim: int,
    spacing: Any,
    shape: Sequence[int] | None,
    origin: Any = 0.0,
    *,
    names: tuple[str, str] = ("spacing", "grid_shape"),
) -> Grid:
    """Check tokens (B, N, channels) against the grid they lie on; the grid.

    ``names`` are what the caller calls its spacing and grid shape.
    """
    spacing_name, shape_name = names
    floating("x", x)
    shaped("x", x, "B N C", C=channels)
    if shape is None:
        if ndim > 1:
            raise ValueError(f"{shape_name} is needed for {ndim}-D tokens, got None")
        shape = (x.shape[1],)
    shape = per_axis(shape_name, shape, ndim, minimum=1)
    if math.prod(shape) != x.shape[1]:
        raise ValueError(f"{shape_name} {shape} has {math.prod(shape)} points, but x has {x.shape[1]} tokens")
    grid = Grid(shape, spacing, origin)
    for name, value in ((spacing_name, grid.spacing), ("origin", grid.origin)):
        if isinstance(value, torch.Tensor) and value.ndim == 2 and value.shape[0] != x.shape[0]:
            raise ValueError(f"{name} per sample must have the batch size {x.shape[0]}, got {value.shape[0]}")
    return grid
