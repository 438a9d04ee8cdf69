"""The one place where arguments are judged.

Every public entry point calls these helpers before it computes anything, so a wrong argument is reported in
the caller's words (the rule, then the value that broke it) instead of as a shape error from deep inside
torch. Types that can never work raise ``TypeError``; values and shapes that break a rule raise
``ValueError``.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

LAYOUTS = ("bnd", "bnhd", "bhnd")


def require_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """Return ``value`` if it is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")
    return value


def require_flag(name: str, value: bool) -> bool:
    """Return value if it is True or False; a word such as "half" would count as true."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {value!r}")
    return value


def require_int(name: str, value: int, *, minimum: int) -> int:
    """Return ``value`` if it is a whole number of at least ``minimum`` (booleans are not numbers here)."""
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral, torch.SymInt)):
        raise TypeError(f"{name} must be an int; got {value!r} of type {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}; got {value}")
    return value if type(value) in (int, torch.SymInt) else int(value)


def require_real(
    name: str,
    value: float,
    *,
    above: float = -math.inf,
    minimum: float = -math.inf,
    maximum: float = math.inf,
) -> float:
    """Return ``value`` if it is finite, greater than ``above`` and within ``[minimum, maximum]``."""
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name} must be a real number; got {value!r} of type {type(value).__name__}")
    # A finite number lies strictly between the infinities (a NaN lies nowhere). Said with comparisons, the
    # check can be traced by torch.compile for a number that is not known while compiling.
    if not (-math.inf < value < math.inf):
        raise ValueError(f"{name} must be finite; got {value}")
    if not value > above:
        raise ValueError(f"{name} must be greater than {above:g}; got {value}")
    if not minimum <= value <= maximum:
        raise ValueError(f"{name} must lie in [{minimum:g}, {maximum:g}]; got {value}")
    # Numbers of other libraries become Python's own: they would take over arithmetic with tensors. Symbols of a
    # compiler must stay what they are.
    return value if type(value) in (int, float, torch.SymInt, torch.SymFloat) else float(value)


def require_shape(name: str, value: int | Iterable[int]) -> tuple[int, ...]:
    """Return a grid shape as a tuple of positive ints; a bare int is a grid with one axis."""
    if isinstance(value, (int, numbers.Integral)) and not isinstance(value, bool):
        value = (value,)
    if isinstance(value, (str, Tensor)) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a sequence of ints, one per axis; got {value!r}")
    shape = tuple(require_int(f"{name}[{axis}]", n, minimum=1) for axis, n in enumerate(value))
    if not shape:
        raise ValueError(f"{name} must have at least one axis; got an empty sequence")
    return shape


def require_per_axis(
    name: str, value: float | Iterable[float] | Tensor, ndim: int, *, positive: bool
) -> tuple[float, ...] | Tensor:
    """Return one number per axis: a tuple of floats, or the tensor ``(ndim,)`` / ``(batch, ndim)`` given.

    A scalar holds for every axis. ``positive`` demands values above zero; all values must be finite.
    """
    if isinstance(value, Tensor):
        return _require_per_axis_tensor(name, value, ndim, positive=positive)
    above = 0.0 if positive else -math.inf
    if isinstance(value, (int, float, numbers.Real, torch.SymFloat, torch.SymInt)):
        return (require_real(name, value, above=above),) * ndim
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a number, one number per axis, or a tensor; got {value!r}")
    values = tuple(require_real(f"{name}[{axis}]", v, above=above) for axis, v in enumerate(value))
    if len(values) != ndim:
        raise ValueError(f"{name} must have one value for each of the {ndim} axes; got {len(values)}: {values}")
    return values


def _require_per_axis_tensor(name: str, value: Tensor, ndim: int, *, positive: bool) -> Tensor:
    require_floating(name, value)
    if value.dim() == 0:
        value = value.expand(ndim)
    if value.dim() > 2 or value.shape[-1] != ndim:
        raise ValueError(f"{name} as a tensor must have shape ({ndim},) or (batch, {ndim}); got {tuple(value.shape)}")
    if values_are_readable(value):
        good = value.isfinite() & (value > 0) if positive else value.isfinite()
        if not bool(good.all()):
            rule = "finite and greater than 0" if positive else "finite"
            raise ValueError(f"{name} must be {rule}; got {value.tolist()}")
    return value


def values_are_readable(value: Tensor) -> bool:
    """Whether a tensor's values may steer Python: not while compiling or transforming, and not on meta."""
    return not (
        torch.compiler.is_compiling() or value.is_meta or torch._C._functorch.peek_interpreter_stack() is not None
    )


def require_tensor(name: str, value: Tensor) -> Tensor:
    """Return ``value`` if it is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}")
    return value


def require_floating(name: str, value: Tensor) -> Tensor:
    """Return ``value`` if it is a tensor of real floating-point numbers."""
    require_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name} must hold real floating-point numbers; got dtype {value.dtype}")
    return value


def require_head_split(dim: int, num_heads: int) -> int:
    """Return the head size ``dim // num_heads`` if heads divide ``dim`` into an even number of channels."""
    require_int("dim", dim, minimum=1)
    require_int("num_heads", num_heads, minimum=1)
    if dim % num_heads:
        raise ValueError(f"dim must be divisible by num_heads; got dim={dim}, num_heads={num_heads}")
    head_dim = dim // num_heads
    if head_dim % 2:
        raise ValueError(
            "dim / num_heads must be even, because channels rotate in pairs; "
            f"got dim={dim}, num_heads={num_heads}, so {head_dim} channels a head"
        )
    return head_dim
