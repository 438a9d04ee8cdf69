"""The one place where arguments are judged, for this package and for those built on it.

Every public entry point calls these helpers before it computes anything, so a wrong argument is reported in
the caller's words (``<name> must be <rule>; got <value>``) instead of as a shape error from deep inside torch.
Types that can never work raise ``TypeError``; values and shapes that break a rule raise ``ValueError``.

Nothing here computes on tensors beyond reading, where that is free, whether their values are allowed, and setting
those to NaN, elsewhere, that would give results as if nothing were wrong.
"""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .reading import values_are_at_hand

FLOATING_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Of positions and of all they are made of: a half type rounds them by up to 0.4 %, far from the origin many turns.
POSITION_DTYPES = (torch.float64, torch.float32)
_LAYOUTS = (torch.strided, torch.jagged)

_PLAIN_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)
_LARGEST = sys.float_info.max
# Positions, in any unit: products of what is not farther stay far from where float64 ends.
FARTHEST = 1e100
# In tensors; beside those of float32 the number itself would be infinite.
FARTHEST_OF = {torch.float64: FARTHEST, torch.float32: torch.finfo(torch.float32).max}

T = TypeVar("T")
Function = TypeVar("Function", bound=Callable[..., Any])


def require_choice(name: str, value: T, choices: Sequence[T]) -> T:
    """Return the choice that ``value`` is, in type too: ``True`` is not the choice 1, but NumPy's 1 is."""
    for choice in choices:
        alike = isinstance(value, numbers.Integral if isinstance(choice, int) else type(choice))
        if alike and isinstance(value, bool) == isinstance(choice, bool) and value == choice:
            return choice
    raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def require_flag(name: str, value: bool) -> bool:
    """Return value if it is True or False; a word such as "half" would count as true."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {value!r}")
    return value


def require_callable(name: str, value: Function) -> Function:
    """Return ``value`` if it can be called."""
    if not callable(value):
        raise TypeError(f"{name} must be callable; got {value!r}")
    return value


def require_int(name: str, value: int, *, minimum: int, maximum: int | None = None) -> int:
    """Return ``value`` if it is a whole number within ``[minimum, maximum]`` (booleans are not numbers here)."""
    if not _is_int(value):
        raise TypeError(f"{name} must be an int; got {_shown(value)}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}; got {value}")
    if maximum is not None and value > maximum:
        raise ValueError(f"{name} must be at most {maximum}; got {value}")
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
    if not _is_real(value):
        raise TypeError(f"{name} must be a real number; got {_shown(value)}")
    # A finite number lies strictly between the infinities (a NaN lies nowhere). Said with comparisons, the
    # check can be traced by torch.compile for a number that is not known while compiling.
    if not (-math.inf < value < math.inf) or _is_beyond_floats(value):
        raise ValueError(f"{name} must be finite; got {value}")
    if not value > above:
        raise ValueError(f"{name} must be greater than {above:g}; got {value}")
    if not minimum <= value <= maximum:
        rule = f"at least {minimum:g}" if maximum == math.inf else f"in [{minimum:g}, {maximum:g}]"
        raise ValueError(f"{name} must be {rule}; got {value}")
    # Numbers of other libraries become Python's own: they would take over arithmetic with tensors. Symbols of a
    # compiler must stay what they are.
    return value if type(value) in _PLAIN_NUMBERS else float(value)


def require_probability(name: str, value: float) -> float:
    """Return ``value`` if it lies in [0, 1): what is dropped with certainty would never be learned."""
    require_real(name, value)
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1); got {value}")
    return float(value)


def require_ints(name: str, value: int | Iterable[int], ndim: int, *, minimum: int) -> tuple[int, ...]:
    """Return one whole number per axis; a single one holds for every axis."""
    if _is_int(value):
        return (require_int(name, value, minimum=minimum),) * ndim  # type: ignore[arg-type]
    values = _sequence(name, value, f"an int or {ndim} ints, one per axis")
    if len(values) != ndim:
        raise ValueError(f"{name} must be an int or {ndim} ints, one per axis; got {values}")
    return tuple(require_int(f"{name}[{axis}]", n, minimum=minimum) for axis, n in enumerate(values))


def require_odd(name: str, values: tuple[int, ...]) -> tuple[int, ...]:
    """Return whole numbers if all of them are odd."""
    if any(n % 2 == 0 for n in values):
        raise ValueError(f"{name} must be odd on every axis; got {values}")
    return values


def require_shape(name: str, value: int | Iterable[int], ndim: int | None = None) -> tuple[int, ...]:
    """Return a grid shape as a tuple of positive ints, of ``ndim`` axes if given; an int is a grid with one axis."""
    values = (value,) if _is_int(value) else _sequence(name, value, "a sequence of ints, one per axis")
    if not values:
        raise ValueError(f"{name} must have at least one axis; got {value!r}")
    if ndim is not None and len(values) != ndim:
        raise ValueError(f"{name} must have {ndim} ints, one per axis; got {value!r}")
    return tuple(require_int(f"{name}[{axis}]", n, minimum=1) for axis, n in enumerate(values))


def require_per_axis(
    name: str, value: float | Iterable[float] | Tensor, ndim: int, *, positive: bool
) -> tuple[float, ...] | Tensor:
    """Return one number per axis: a tuple of floats, or the tensor ``(ndim,)`` / ``(batch, ndim)`` in float64.

    A scalar holds for every axis. ``positive`` demands values above zero; all values must be finite. Where values are
    not at hand, what must be positive and is not becomes NaN.
    """
    if isinstance(value, Tensor):
        return _require_per_axis_tensor(name, value, ndim, positive=positive)
    above = 0.0 if positive else -math.inf
    if isinstance(value, bool) or _is_real(value):
        return (_require_step(name, value, above),) * ndim
    values = _sequence(name, value, "a number, one number per axis, or a tensor")
    if not all(map(_is_real, values)):
        _refuse_nesting(name, values, ndim)
    if len(values) != ndim:
        raise ValueError(f"{name} must have one value for each of the {ndim} axes; got {values}")
    return tuple(_require_step(f"{name}[{axis}]", v, above) for axis, v in enumerate(values))


def _require_step(name: str, value: Any, above: float) -> float:
    """One number that positions are made of; NumPy has half types too."""
    if type(value) not in _PLAIN_NUMBERS and type(value).__name__ in ("float16", "bfloat16"):
        raise TypeError(f"{name} must be in float64 or float32; got {_shown(value)}")
    step = require_real(name, value, above=above)
    if not -FARTHEST <= step <= FARTHEST:
        raise ValueError(f"{name} must be at most {FARTHEST:g} in size; got {value}")
    return step


def _refuse_nesting(name: str, values: tuple[Any, ...], ndim: int) -> None:
    """Say what to make of values per sample that come as a list, or as an array of another library."""
    for value in values:
        if isinstance(value, (Tensor, list, tuple)) or len(getattr(value, "shape", "")):
            raise TypeError(
                f"{name} must be a number, one number per axis, or one tensor, (batch, {ndim}) where every sample has "
                f"its own; got {len(values)} of type {type(value).__name__}: torch.as_tensor makes one of numbers and "
                "arrays; tensors are joined by torch.stack(..., 0) where each is a sample's, and by "
                "torch.stack(..., -1) where each is an axis' (which is how tuples are collated)"
            )


def require_numbers(name: str, value: float | Iterable[float], ndim: int, *, positive: bool) -> tuple[float, ...]:
    """Return one Python number per axis; tensors are refused, because a module would not take them along."""
    if isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value)):
        raise TypeError(
            f"{name} must be a number or one number per axis; got a tensor, which .to() would leave behind: "
            "give its values, .tolist()"
        )
    numbers_per_axis = require_per_axis(name, value, ndim, positive=positive)
    assert isinstance(numbers_per_axis, tuple)
    return numbers_per_axis


def _require_per_axis_tensor(name: str, value: Tensor, ndim: int, *, positive: bool) -> Tensor:
    require_position_dtype(name, value)
    if value.dim() == 0:
        value = value.expand(ndim)
    if value.dim() > 2 or value.shape[-1] != ndim:
        raise ValueError(f"{name} must have shape ({ndim},) or (batch, {ndim}); got {tuple(value.shape)}")
    if values_are_at_hand(value):
        near = value.abs() <= FARTHEST_OF[value.dtype]  # which NaN is not
        if not bool((near & (value > 0) if positive else near).all()):
            rule = "finite and greater than 0" if positive else "finite"
            if bool((near | ~value.isfinite()).logical_not().any()):
                rule = f"at most {FARTHEST:g} in size"
            raise ValueError(f"{name} must be {rule}; got {value.tolist()}")
    elif positive:
        value = value.masked_fill(value <= 0, math.nan)  # which does not go unnoticed; infinity does not anyway
    # Whoever computes with it computes positions. (Apple's GPUs have no float64.)
    return value if value.device.type == "mps" else value.to(torch.float64)


def require_tensor(name: str, value: Tensor) -> Tensor:
    """Return ``value`` if it is a tensor, and dense: for sparse ones torch lacks most operations."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {_kind(value)}")
    if value.layout not in _LAYOUTS:
        raise TypeError(f"{name} must be a dense tensor (value.to_dense()); got one of layout {value.layout}")
    return value


def require_module(name: str, value: nn.Module) -> nn.Module:
    """A module of torch."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module; got {_kind(value)}")
    return value


def require_floating(name: str, value: Tensor) -> Tensor:
    """Return ``value`` if it is a tensor of one of the supported floating-point dtypes."""
    # One comparison after the other, in place of a call: this is asked many times in a forward pass.
    if not isinstance(value, Tensor) or value.layout not in _LAYOUTS or value.dtype not in FLOATING_DTYPES:
        require_tensor(name, value)
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16; got {value.dtype}")
    return value


def require_position_dtype(name: str, value: Tensor) -> Tensor:
    """Return ``value`` if it is a tensor of a type that can hold positions, float64 or float32."""
    if not isinstance(value, Tensor) or value.layout not in _LAYOUTS or value.dtype not in POSITION_DTYPES:
        require_tensor(name, value)
        more = ""
        if value.dtype.is_floating_point:
            more = (
                ", which rounds positions by up to 0.4 % (mixed precision casts tensors on their way into a module: "
                "give numbers or a RoSE.Grid, or keep them out of it)"
            )
        raise TypeError(f"{name} must be float64 or float32; got {value.dtype}{more}")
    return value


def require_parameter_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype to make parameters in: the one given, or torch's default."""
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if dtype not in FLOATING_DTYPES:
        raise TypeError(f"dtype must be float64, float32, bfloat16 or float16; got {dtype}")
    return dtype


def require_boolean(name: str, value: Tensor) -> Tensor:
    """Return ``value`` if it is a tensor of booleans."""
    require_tensor(name, value)
    if value.dtype != torch.bool:
        raise TypeError(f"{name} must be boolean; got {value.dtype}")
    return value


def require_integral(name: str, value: Tensor) -> Tensor:
    """Return ``value`` if it is a tensor of integers, of any width; truth values are none."""
    require_tensor(name, value)
    if value.dtype == torch.bool or value.dtype.is_floating_point or value.dtype.is_complex:
        raise TypeError(f"{name} must hold integers; got {value.dtype}")
    return value


def require_sizes(name: str, value: Tensor, pattern: str, **sizes: int) -> Tensor:
    """Return ``value`` if its shape fits a pattern such as ``"B H N_in D"``; ``sizes`` pins some of its axes."""
    axes = pattern.split()
    fits = value.dim() == len(axes)
    if not fits or any(axis in sizes and n != sizes[axis] for axis, n in zip(axes, value.shape, strict=True)):
        # Worded only here: a compiler that writes down a size takes it for a constant.
        expected = ", ".join(f"{axis}={sizes[axis]}" if axis in sizes else axis for axis in axes)
        raise ValueError(f"{name} must have shape ({expected}); got {tuple(value.shape)}")
    return value


def require_valid(valid: Tensor, batch: int, grid_shape: Sequence[int], *, name: str = "valid") -> Tensor:
    """Return which tokens are real as ``(batch, tokens)``, given so or as ``(batch, *grid_shape)``."""
    require_boolean(name, valid)
    tokens = math.prod(grid_shape)
    given = tuple(valid.shape)
    if given != (batch, *grid_shape) and given != (batch, tokens):
        shapes = dict.fromkeys(((batch, *grid_shape), (batch, tokens)))
        raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}; got {given}")
    return valid.flatten(1)


def require_divides(divisor_name: str, divisor: int, name: str, value: int) -> int:
    """Return the quotient ``value // divisor`` if nothing is left over."""
    if value % divisor:
        raise ValueError(f"{name} must be divisible by {divisor_name}; got {name}={value}, {divisor_name}={divisor}")
    return value // divisor


def require_head_split(dim: int, num_heads: int) -> int:
    """Return the head size ``dim // num_heads`` if heads divide ``dim`` into an even number of channels."""
    require_int("dim", dim, minimum=1)
    require_int("num_heads", num_heads, minimum=1)
    head_dim = require_divides("num_heads", num_heads, "dim", dim)
    if head_dim % 2:
        raise ValueError(
            "dim / num_heads must be even, because channels rotate in pairs; "
            f"got dim={dim}, num_heads={num_heads}, so {head_dim} channels a head"
        )
    return head_dim


def _is_int(value: object) -> bool:
    """Integers, NumPy's and a compiler's symbolic ones too, but no truth values."""
    return isinstance(value, (int, numbers.Integral, torch.SymInt)) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    """Real numbers likewise."""
    kinds = (int, float, numbers.Real, torch.SymFloat, torch.SymInt)
    return isinstance(value, kinds) and not isinstance(value, bool)


def _is_beyond_floats(value: Any) -> bool:
    """Whether a number is finite, and infinite in every product: ints and fractions have no bound."""
    has_no_bound = isinstance(value, numbers.Rational)
    return has_no_bound and not -_LARGEST <= value <= _LARGEST


def _sequence(name: str, value: Any, rule: str) -> tuple[Any, ...]:
    """The entries of anything that lists numbers, NumPy's arrays too."""
    listless = isinstance(value, (str, bytes, Tensor, torch.fx.Proxy)) or getattr(value, "ndim", 1) == 0
    if listless or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be {rule}; got {_shown(value)}")
    return tuple(value)


def _shown(value: object) -> str:
    """A value in a message, with its type where that may be what is wrong with it."""
    return _kind(value) if isinstance(value, torch.fx.Proxy) else f"{value!r} of type {type(value).__name__}"


def _kind(value: object) -> str:
    """The type of a value in a message."""
    if isinstance(value, torch.fx.Proxy):
        return (
            "a torch.fx.Proxy: for symbolic_trace, make the module a leaf (Tracer.is_leaf_module), or use torch.export"
        )
    return type(value).__name__


def require_affordable(name: str, size: int, option: str, limit: int, purpose: str, instead: str) -> None:
    """Refuse what would take more bytes than an option allows; sizes that only a compiled program will know pass.

    Args:
        name: of what would be allocated.
        size: its bytes.
        option: where the limit can be raised.
        limit: bytes.
        purpose: what it would be for.
        instead: what to do otherwise.

    Raises:
        ValueError: it would take more.
    """
    if isinstance(size, int) and size > limit:
        raise ValueError(
            f"{name} must take at most {option} = {_bytes(limit)}; got {_bytes(size)} for {purpose}: {instead}, or "
            f"raise {option}"
        )


def _bytes(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number} bytes"
