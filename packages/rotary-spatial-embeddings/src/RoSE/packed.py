"""Sequences of different lengths as one jagged nested tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .validation import require_floating


def is_nested(x: object) -> bool:
    """Whether x is a nested tensor (arguments are not known to be tensors yet)."""
    return isinstance(x, Tensor) and x.is_nested


def require_jagged(x: Tensor, coordinates: object, spacing: object, layout: str, num_prefix_tokens: int) -> None:
    """Check nested features and what says where they are, before their values are touched."""
    require_floating("x", x)
    if x.layout != torch.jagged or layout == "bhnd" or jagged(x)._ragged_idx != 1:
        raise ValueError(
            "nested features must have layout=torch.jagged and tokens as the ragged dimension 1 ('bnd' or "
            f"'bnhd'); got {x.layout} in layout {layout!r}"
        )
    if num_prefix_tokens:
        raise ValueError(f"num_prefix_tokens must be 0 for nested features; got {num_prefix_tokens}")
    if not isinstance(coordinates, Tensor):
        raise TypeError(f"coordinates must be a tensor for nested features; got {type(coordinates).__name__}")
    if isinstance(spacing, Tensor) and spacing.dim() > 1:
        raise ValueError(
            "spacing must be one for all sequences of nested features, a number or one per axis; got a tensor "
            f"{tuple(spacing.shape)}"
        )
    if not coordinates.is_nested and coordinates.dim() != 2:
        raise ValueError(
            "coordinates must have shape (tokens of all sequences, spatial_dims) for nested features, or be nested; "
            f"got {tuple(coordinates.shape)}"
        )
    if coordinates.is_nested and not torch.equal(jagged(coordinates).offsets(), jagged(x).offsets()):
        raise ValueError(
            "coordinates must have the sequence lengths of the nested features; got offsets "
            f"{jagged(coordinates).offsets().tolist()} for {jagged(x).offsets().tolist()}"
        )


def jagged(x: object) -> Any:
    """A tensor, as the type that has offsets and values (torch does not declare it)."""
    return x


def rewrap(values: Tensor, like: Tensor) -> Tensor:
    """Packed values as a nested tensor with the very offsets of ``like``, so that the two combine."""
    return torch.nested.nested_tensor_from_jagged(values, offsets=jagged(like).offsets())
