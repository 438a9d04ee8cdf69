"""Transformer blocks on one grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from RoSE.blocks import MLP, DropPath
from torch import Tensor, nn

from ..layers import WindowedSelfAttention
from ..layers.checkpoints import recomputed
from .tokens import CONVOLUTIONS, Tokens, as_image, as_rows, blanked

MLPS = ("linear", "conv")


class MixMLP(MLP):
    """An MLP whose hidden channels are mixed with those of the tokens around (Mix-FFN of arXiv:2105.15203).

    A depthwise convolution between its two linear layers; tokens that are not valid count as 0 there.

    Args:
        dim: channels.
        spatial_dims: axes of the grid.
        mlp_ratio: hidden channels per channel.
        made: ``device`` and ``dtype`` of the parameters.
    """

    def __init__(self, dim: int, spatial_dims: int, mlp_ratio: float, made: dict[str, Any]) -> None:
        super().__init__(dim, mlp_ratio=mlp_ratio, **made)
        hidden = self.fc1.out_features
        self.conv = CONVOLUTIONS[spatial_dims](hidden, hidden, 3, padding=1, groups=hidden, **made)

    # Neighbours are known on a grid only, and an MLP has none.
    def forward(self, tokens: Tokens) -> Tensor:  # type: ignore[override]
        """Tokens (B, N, dim) -> rows (B, N, dim)."""
        hidden = blanked(self.fc1(tokens.x), tokens.valid)
        image = as_image(hidden, tokens.grid.shape)
        if is_slow_with_channels_last(image):
            image = image.contiguous()
        mixed: Tensor = self.fc2(self.act(as_rows(self.conv(image))))
        return mixed


def is_slow_with_channels_last(image: Tensor) -> bool:
    """Whether a GPU convolves an image (B, C, *grid) channel by channel much better where channels do not lie last.

    cuDNN takes images whose channels do, and may compute the gradient of the weights in a launch for every channel
    (https://github.com/pytorch/pytorch/issues/37406). Seen with bfloat16 in 3-D, with two images and not with one: 94 %
    of a training step on an H200. Images in torch's own order go to torch's own kernels.
    """
    return image.is_cuda and image.ndim == 5 and image.dtype in (torch.bfloat16, torch.float16)


class Block(nn.Module):
    """A pre-norm transformer block: self-attention in a window, then an MLP, each added to what it read.

    Args:
        dim: channels.
        num_heads: attention heads.
        spatial_dims: axes of the grid.
        window: tokens in the window, per axis; None for the whole grid.
        mlp: ``"linear"``, or ``"conv"`` for :class:`MixMLP`.
        mlp_ratio: hidden channels of the MLP per channel.
        drop_path: probability of leaving out a branch of a sample while training (arXiv:1603.09382).
        made: ``device`` and ``dtype`` of the parameters.
        attention: further keywords of :class:`WindowedSelfAttention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        spatial_dims: int,
        window: tuple[int, ...] | None,
        mlp: str,
        mlp_ratio: float,
        drop_path: float,
        made: dict[str, Any],
        attention: dict[str, Any],
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, **made)
        self.attention = WindowedSelfAttention(dim, num_heads, spatial_dims, window, **attention, **made)
        self.norm2 = nn.LayerNorm(dim, **made)
        self.mixes = mlp == "conv"
        self.mlp = MixMLP(dim, spatial_dims, mlp_ratio, made) if self.mixes else MLP(dim, mlp_ratio=mlp_ratio, **made)
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tokens) -> Tokens:
        """Tokens (B, N, dim) -> tokens on the same grid."""
        x, grid, valid = tokens
        x = x + self.drop_path(self.attention(self.norm1(x), grid=grid, valid=valid))
        normed = self.norm2(x)
        x = x + self.drop_path(self.mlp(Tokens(normed, grid, valid) if self.mixes else normed))
        return Tokens(x, grid, valid)


class Stage(nn.Module):
    """Blocks on one grid, and a LayerNorm of what they leave, which is what the next part and the heads read.

    Without blocks it leaves tokens as they are.

    Args:
        dim, num_heads, spatial_dims, window, mlp, mlp_ratio, made, attention: see :class:`Block`.
        drop_path: one probability per block.
        checkpoint: compute every block again in the backward pass instead of keeping what it computes.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        spatial_dims: int,
        window: tuple[int, ...] | None,
        mlp: str,
        mlp_ratio: float,
        drop_path: Sequence[float],
        checkpoint: bool,
        made: dict[str, Any],
        attention: dict[str, Any],
    ) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, spatial_dims, window, mlp, mlp_ratio, rate, made, attention) for rate in drop_path
        )
        self.norm = nn.LayerNorm(dim, **made) if len(drop_path) > 0 else nn.Identity()

    def forward(self, tokens: Tokens) -> Tokens:
        """Tokens (B, N, dim) -> tokens on the same grid, 0 where they are not valid."""
        for block in self.blocks:
            tokens = recomputed(self.checkpoint, block, tokens)
        return Tokens(blanked(self.norm(tokens.x), tokens.valid), tokens.grid, tokens.valid)
