"""How the channels of all heads are laid out, and which of the heads turn.

A layout is said, never guessed: ``"bnd"`` (batch, tokens, dim), ``"bnhd"`` (batch, tokens, heads, head size) or
``"bhnd"`` (batch, heads, tokens, head size).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .validation import require_choice, require_floating, require_int

LAYOUTS = ("bnd", "bnhd", "bhnd")


class Heads(NamedTuple):
    """Heads of an embedding: the first ``rotary`` of them turn."""

    number: int
    size: int
    rotary: int
    interleaved: bool


def require_features(name: str, x: Tensor, layout: str, heads: Heads, num_prefix_tokens: int) -> tuple[int, int]:
    """Check features against the heads; return batch size and number of tokens with a position."""
    require_floating(name, x)
    require_choice("layout", layout, LAYOUTS)
    require_int("num_prefix_tokens", num_prefix_tokens, minimum=0)
    shape = tuple(x.shape)
    if layout == "bnd":
        form, fits = f"(batch, tokens, {heads.number * heads.size})", shape[2:] == (heads.number * heads.size,)
    elif layout == "bnhd":
        form, fits = f"(batch, tokens, {heads.number}, {heads.size})", shape[2:] == (heads.number, heads.size)
    else:
        form = f"(batch, {heads.number}, tokens, {heads.size})"
        fits = shape[1:2] == (heads.number,) and shape[3:] == (heads.size,)
    if not fits:
        raise ValueError(f"{name} must have shape {form} in layout {layout!r}; got {shape}")
    length = shape[2] if layout == "bhnd" else shape[1]
    if num_prefix_tokens > length:
        raise ValueError(f"num_prefix_tokens must be at most the {length} tokens of {name}; got {num_prefix_tokens}")
    return shape[0], length - num_prefix_tokens


def heads_in_front(x: Tensor, layout: str, heads: Heads) -> Tensor:
    """A view ``(batch, heads, tokens, head size)``."""
    if layout == "bnd":
        x = torch.unflatten(x, 2, (heads.number, heads.size))
    return x if layout == "bhnd" else x.transpose(1, 2)


def back_in_layout(x: Tensor, layout: str) -> Tensor:
    """The reverse of :func:`heads_in_front`."""
    if layout == "bhnd":
        return x
    x = x.transpose(1, 2)
    return x.flatten(2) if layout == "bnd" else x
