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
    form, wanted = {
        "bnd": ("(batch, tokens, dim)", (None, None, heads.number * heads.size)),
        "bnhd": ("(batch, tokens, heads, head size)", (None, None, heads.number, heads.size)),
        "bhnd": ("(batch, heads, tokens, head size)", (None, heads.number, None, heads.size)),
    }[layout]
    if x.dim() != len(wanted) or any(w is not None and w != n for w, n in zip(wanted, x.shape, strict=True)):
        sizes = ", ".join("*" if w is None else str(w) for w in wanted)
        raise ValueError(f"{name} must be {form} = ({sizes}) in layout {layout!r}; got {tuple(x.shape)}")
    length = x.shape[2] if layout == "bhnd" else x.shape[1]
    if num_prefix_tokens > length:
        raise ValueError(f"num_prefix_tokens must be at most the {length} tokens of {name}; got {num_prefix_tokens}")
    return x.shape[0], length - num_prefix_tokens


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
