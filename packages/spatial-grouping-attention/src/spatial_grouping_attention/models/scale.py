"""Where the tokens of a stage lie among the pixels, and how what they say reaches those."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor

from .interpolate import interpolate
from .tokens import Tokens


class Scale:
    """The tokens of a stage lie ``stride`` pixels apart, and start at the centre of the stem's first patch."""

    def __init__(self, stride: tuple[int, ...], stem_stride: tuple[int, ...]) -> None:
        self.stride = stride
        self.offset = tuple((s - 1) / 2 for s in stem_stride)

    @property
    def pixels_per_token(self) -> int:
        """Pixels of a patch."""
        return math.prod(self.stride)

    def to_pixels(self, rows: Tensor, tokens: Tokens, size: tuple[int, ...]) -> Tensor:
        """Rows (B, N, C) at tokens -> pixels (B, C, *size), interpolated."""
        values, valid = on_grid(rows, tokens)
        return interpolate(values, valid, size, self.stride, self.offset).movedim(-1, 1)

    def patches_to_pixels(self, rows: Tensor, tokens: Tokens, size: tuple[int, ...]) -> Tensor:
        """Rows (B, N, C * pixels_per_token) of the first stage's patches -> pixels (B, C, *size), side by side."""
        axes = range(len(size))
        grid, patch = (" ".join(f"{name}{a}" for a in axes) for name in "gp")
        sizes = {f"p{a}": s for a, s in zip(axes, self.stride, strict=True)}
        values, _ = on_grid(rows, tokens)
        image: Tensor = rearrange(
            values, f"b {grid} (c {patch}) -> b c " + " ".join(f"(g{a} p{a})" for a in axes), **sizes
        )
        for axis, n in enumerate(size, 2):
            image = image.narrow(axis, 0, n)
        return image


def on_grid(rows: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
    """Rows (B, N, C) and validity (B, N) with the axes of the grid in place of N."""
    shape = tokens.grid.shape
    valid = None if tokens.valid is None else torch.unflatten(tokens.valid, 1, shape)
    return torch.unflatten(rows, 1, shape), valid
