"""Normalisation that keeps contrast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

EPS = 1e-5


class InstanceNorm(nn.Module):
    """Every channel of every image with mean 0 and variance 1 over its valid places (arXiv:1607.08022), then rescaled.

    A LayerNorm makes every place as strong as every other, and so takes away which of them differ only in strength:
    bright from dark, an edge from the noise of an even area. Where features still are little more than intensities,
    in stems and in what is added back from them, that costs a segmentation network several points.

    Args:
        dim: channels.
        device: where to put the parameters.
        dtype: of the parameters.
    """

    def __init__(self, dim: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Scale by 1, shift by 0."""
        self.weight.fill_(1.0)
        self.bias.zero_()

    def forward(self, image: Tensor, valid: Tensor | None) -> Tensor:
        """Normalise (B, dim, *grid) over the places that are valid, (B, *grid) boolean; the others become 0."""
        if valid is None:
            # Groups of one channel. torch 2.13's instance_norm has wrong gradients on CPUs for a single image where
            # the gradient that comes in is laid out channels last. The operator itself: its wrapper refuses grids of
            # a single place, which here become the bias.
            return torch.group_norm(image.contiguous(), image.shape[1], self.weight, self.bias, EPS)
        axes = tuple(range(2, image.ndim))
        exact = image.to(torch.promote_types(image.dtype, torch.float32))
        real = valid.unsqueeze(1).to(exact.dtype)
        count = real.sum(axes, keepdim=True).clamp(min=1.0)
        centred = (exact - (exact * real).sum(axes, keepdim=True) / count) * real
        spread = (centred.square().sum(axes, keepdim=True) / count + EPS).rsqrt()
        per_channel = (-1, *(1,) * len(axes))
        scaled = centred * spread * self.weight.reshape(per_channel) + self.bias.reshape(per_channel) * real
        return scaled.to(image.dtype)
