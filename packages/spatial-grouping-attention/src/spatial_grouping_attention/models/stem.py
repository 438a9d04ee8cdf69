"""From an image to the first tokens: one per patch."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from RoSE import Grid
from torch import Tensor, nn

from ..geometry import coarsen, group_validity, relate
from .tokens import CONVOLUTIONS, Tokens, as_rows, blanked


class PatchStem(nn.Module):
    """One token per patch of pixels: a convolution whose kernel is its stride, and a LayerNorm.

    Args:
        in_channels: channels of the image.
        dim: channels of the tokens.
        stride: pixels per token along each axis.
        device: where to put the parameters.
        dtype: of the parameters.
    """

    def __init__(self, in_channels: int, dim: int, stride: tuple[int, ...], *, device: Any = None, dtype: Any = None):
        super().__init__()
        self.stride = stride
        made = {"device": device, "dtype": dtype}
        self.proj = CONVOLUTIONS[len(stride)](in_channels, dim, stride, stride, **made)
        self.norm = nn.LayerNorm(dim, **made)

    def forward(self, image: Tensor, grid: Grid, valid: Tensor | None) -> Tokens:
        """Cut an image into patches; pixels beyond its end and pixels that are not valid count as 0.

        Args:
            image: (B, C, *size).
            grid: of the pixels.
            valid: (B, *size) boolean, or None.

        Returns:
            Tokens, of which those are valid whose patch has a valid pixel.
        """
        if valid is not None:
            image = image.masked_fill(~valid.unsqueeze(1), 0.0)
        missing = [-n % s for n, s in zip(grid.shape, self.stride, strict=True)]
        if any(missing):
            # Every patch keeps a pixel of the image: without a mask all tokens stay valid.
            ends = [end for m in reversed(missing) for end in (0, m)]
            image = F.pad(image, ends)
            valid = None if valid is None else F.pad(valid, ends)
        ones, zeros = (1,) * grid.ndim, (0,) * grid.ndim
        shape = tuple(image.shape[2:])
        patches = coarsen(Grid.derived(shape, grid.spacing, grid.origin), self.stride, self.stride, zeros)
        if valid is not None:
            relation = relate(shape, patches.shape, self.stride, self.stride, zeros, ones, ones)
            valid = group_validity(valid.flatten(1), relation)
        return Tokens(blanked(self.norm(as_rows(self.proj(image))), valid), patches, valid)
