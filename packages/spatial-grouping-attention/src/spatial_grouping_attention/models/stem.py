"""From an image to the first tokens: one per patch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from RoSE import Grid
from torch import Tensor, nn

from ..geometry import coarsen, group_validity, relate
from .normalise import InstanceNorm
from .tokens import CONVOLUTIONS, Tokens, as_rows, blanked

STEMS = ("patch", "conv")


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
        image, patches, valid = whole_patches(image, grid, valid, self.stride)
        return Tokens(blanked(self.norm(as_rows(self.proj(image))), valid), patches, valid)


class ConvolutionalStem(nn.Module):
    """One token per patch, seen together with half a patch around it (arXiv:2106.14881), with its contrast kept.

    A strided convolution and one more, added to what it read; both with instance norm and GELU.

    Args:
        in_channels, dim, stride, device, dtype: see :class:`PatchStem`.
    """

    def __init__(self, in_channels: int, dim: int, stride: tuple[int, ...], *, device: Any = None, dtype: Any = None):
        super().__init__()
        self.stride = stride
        made = {"device": device, "dtype": dtype}
        convolution = CONVOLUTIONS[len(stride)]
        around = tuple((s + 1) // 2 for s in stride)
        kernel = tuple(s + 2 * a for s, a in zip(stride, around, strict=True))
        self.proj = convolution(in_channels, dim, kernel, stride, around, **made)
        self.norm1 = InstanceNorm(dim, **made)
        self.conv = convolution(dim, dim, 3, padding=1, **made)
        self.norm2 = InstanceNorm(dim, **made)

    def forward(self, image: Tensor, grid: Grid, valid: Tensor | None) -> Tokens:
        """Make tokens of an image; arguments and result as in :meth:`PatchStem.forward`."""
        image, patches, valid = whole_patches(image, grid, valid, self.stride)
        on_grid = None if valid is None else torch.unflatten(valid, 1, patches.shape)
        x = F.gelu(self.norm1(self.proj(image), on_grid))
        x = x + F.gelu(self.norm2(self.conv(x), on_grid))
        return Tokens(as_rows(x), patches, valid)


def make_stem(
    kind: str, in_channels: int, dim: int, stride: tuple[int, ...], made: dict[str, Any]
) -> PatchStem | ConvolutionalStem:
    """The stem that is called ``kind``, one of STEMS."""
    stem = PatchStem if kind == "patch" else ConvolutionalStem
    return stem(in_channels, dim, stride, **made)


def whole_patches(
    image: Tensor, grid: Grid, valid: Tensor | None, stride: tuple[int, ...]
) -> tuple[Tensor, Grid, Tensor | None]:
    """An image (B, C, *size) of whole patches, 0 beyond its end and where not valid; the patches' grid and validity.

    Args:
        image: (B, C, *size).
        grid: of its pixels.
        valid: (B, *size) boolean, or None.
        stride: pixels per patch along each axis.

    Returns:
        The image, the grid of patches, and which of these have a valid pixel, (B, N) boolean or None.
    """
    if valid is not None:
        image = image.masked_fill(~valid.unsqueeze(1), 0.0)
    missing = [-n % s for n, s in zip(grid.shape, stride, strict=True)]
    if any(missing):
        # Every patch keeps a pixel of the image: without a mask all tokens stay valid.
        ends = [end for m in reversed(missing) for end in (0, m)]
        image = F.pad(image, ends)
        valid = None if valid is None else F.pad(valid, ends)
    ones, zeros = (1,) * grid.ndim, (0,) * grid.ndim
    shape = tuple(image.shape[2:])
    patches = coarsen(Grid.derived(shape, grid.spacing, grid.origin), stride, stride, zeros)
    if valid is not None:
        relation = relate(shape, patches.shape, stride, stride, zeros, ones, ones)
        valid = group_validity(valid.flatten(1), relation)
    return image, patches, valid
