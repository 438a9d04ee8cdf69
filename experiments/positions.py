"""What a network is told of where its tokens are: the same network, and other coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from images import at_spacing
from networks import CLASSES, Logits, PaddedUNet, ours
from spatial_grouping_attention.models.tokens import Tokens
from torch import Tensor, nn
from torch.func import functional_call

Spacing = tuple[float, ...]


class Told(nn.Module):
    """Tells a network another spacing than the real one."""

    def __init__(self, network: nn.Module, tell: Callable[[tuple[int, ...], Spacing], Spacing]) -> None:
        super().__init__()
        self.network = network
        self.tell = tell

    def forward(self, image: Tensor, spacing: Spacing) -> Tensor:
        """Images (B, C, *size) -> (B, classes, *size)."""
        logits: Tensor = self.network(image, self.tell(tuple(image.shape[2:]), spacing))
        return logits


class SpacingChannels(nn.Module):
    """Puts the logarithm of the spacing beside the image, a constant plane for every axis: the simplest way to say it.

    Args:
        network: of ``1 + spatial_dims`` channels.
        reference: spacing whose planes are 0.
    """

    def __init__(self, network: nn.Module, reference: Spacing) -> None:
        super().__init__()
        self.network = network
        self.reference = reference

    def forward(self, image: Tensor, spacing: Spacing) -> Tensor:
        """Images (B, C, *size) -> (B, classes, *size)."""
        planes = [torch.full_like(image, math.log(s / r)) for s, r in zip(spacing, self.reference, strict=True)]
        logits: Tensor = self.network(torch.cat([image, *planes], 1), spacing)
        return logits


class Resampled(nn.Module):
    """Brings images to one spacing, in training too, and logits back: what nnU-Net does (Isensee et al. 2021)."""

    def __init__(self, network: nn.Module, spacing: Spacing) -> None:
        super().__init__()
        self.network = network
        self.spacing = spacing

    def forward(self, image: Tensor, spacing: Spacing) -> Tensor:
        """Images (B, C, *size) -> (B, classes, *size)."""
        logits = self.network(at_spacing(image, spacing, self.spacing), self.spacing)
        mode = "bilinear" if image.ndim == 4 else "trilinear"
        return F.interpolate(logits, image.shape[2:], mode=mode, align_corners=False)


class PhysicalKernels(nn.Module):
    """Convolutions whose taps are as far apart as at the reference spacing: between pixels they read interpolated ones.

    For pixels as coarse as the reference's and coarser, where the taps stay within the kernel.
    """

    def __init__(self, network: nn.Module, reference: Spacing) -> None:
        super().__init__()
        self.network = network
        self.reference = reference

    def forward(self, image: Tensor, spacing: Spacing) -> Tensor:
        """Images (B, C, *size) -> (B, classes, *size)."""
        coarser = [s / r for s, r in zip(spacing, self.reference, strict=True)]
        weights = {
            f"{name}.weight": drawn_together(module.weight, coarser)
            for name, module in self.network.named_modules()
            if isinstance(module, (nn.Conv2d, nn.Conv3d))
        }
        logits: Tensor = functional_call(self.network, weights, (image, spacing))
        return logits


def drawn_together(weight: Tensor, factors: Sequence[float]) -> Tensor:
    """A kernel (out, in, *size) for pixels that are coarser by a factor per axis, of taps that stay where they are."""
    for axis, factor in enumerate(factors, 2):
        places = torch.arange(weight.shape[axis]) - (weight.shape[axis] - 1) / 2
        shares = (1 - (places / factor - places[:, None]).abs()).clamp(min=0)  # of old taps (columns) in new ones
        weight = torch.tensordot(weight, shares, ([axis], [1])).movedim(-1, axis)
    return weight


class LearnedPositions(nn.Module):
    """Adds a learned map to the first tokens, stretched over the image, as vision transformers do."""

    def __init__(self, dim: int, spatial_dims: int, side: int = 16) -> None:
        super().__init__()
        self.map = nn.Parameter(0.02 * torch.randn(1, dim, *[side] * spatial_dims))

    def forward(self, stem: nn.Module, arguments: Any, tokens: Tokens) -> Tokens:
        """A forward hook of a stem."""
        mode = "bilinear" if self.map.ndim == 4 else "trilinear"
        positions = F.interpolate(self.map, tokens.grid.shape, mode=mode, align_corners=False)
        return tokens._replace(x=tokens.x + positions.flatten(2).mT)


def index(spatial_dims: int, spacing: Spacing) -> nn.Module:
    """Rotations by indices: every pixel is 1 from the next."""
    ones = (1.0,) * spatial_dims
    return Told(ours(spatial_dims, ones), lambda size, _: ones)


SIDES = {2: 96, 3: 32}  # of what training sees


def normalised(spatial_dims: int, spacing: Spacing) -> nn.Module:
    """Rotations by coordinates that run from -1 to 1 over every tile, as DINOv3's do (arXiv:2508.10104)."""
    per_pixel = 2 / SIDES[spatial_dims]
    return Told(ours(spatial_dims, (per_pixel,) * spatial_dims), lambda size, _: tuple(2 / n for n in size))


def learned(spatial_dims: int, spacing: Spacing) -> nn.Module:
    """No rotations, and a learned map."""
    network = ours(spatial_dims, spacing, rotary_ratio=0.0)
    assert isinstance(network, Logits)
    positions = LearnedPositions(network.model.dims[0], spatial_dims)
    network.model.stem.positions = positions
    network.model.stem.register_forward_hook(positions)
    return network


POSITIONS: dict[str, Callable[[int, Spacing], nn.Module]] = {
    "RoSE": ours,
    "RoSE, axial and learned (MuViT's)": lambda dims, spacing: ours(dims, spacing, directions="axial"),
    "RoPE by index": index,
    "coordinates in [-1, 1]": normalised,
    "learned map": learned,
    "none": lambda dims, spacing: ours(dims, spacing, rotary_ratio=0.0),
    "U-Net": lambda dims, spacing: PaddedUNet(dims, CLASSES),
    "U-Net, spacing as channels": lambda dims, spacing: SpacingChannels(PaddedUNet(dims, CLASSES, 1 + dims), spacing),
    "RoSE, spacing as channels": lambda dims, spacing: SpacingChannels(ours(dims, spacing, 1 + dims), spacing),
}

# Where training sees several spacings; else nothing would be resampled that is not resampled in tests.
RESAMPLED: dict[str, Callable[[int, Spacing], nn.Module]] = {
    "RoSE, resampled in training too": lambda dims, spacing: Resampled(ours(dims, spacing), spacing),
    "U-Net, resampled in training too": lambda dims, spacing: Resampled(PaddedUNet(dims, CLASSES), spacing),
}

PHYSICAL: dict[str, Callable[[int, Spacing], nn.Module]] = {
    "RoSE, kernels in physical units": lambda dims, spacing: PhysicalKernels(ours(dims, spacing), spacing),
}

# Of the bands themselves; all know physical coordinates.
FREQUENCIES: dict[str, dict[str, Any]] = {
    f"{directions}, {'learned' if learnable else 'fixed'}": {"directions": directions, "learnable": learnable}
    for directions in ("axial", "mixed", "uniform")
    for learnable in (True, False)
} | {
    "mixed, half of the channels": {"rotary_ratio": 0.5},
    "mixed, scaling none": {"frequency_scaling": "none"},
    "mixed, scaling linear": {"frequency_scaling": "linear"},
    "mixed, scaling adaptive": {"frequency_scaling": "adaptive"},
}


def drift(network: nn.Module, before: dict[str, Tensor]) -> float:
    """How far wave vectors have gone, as a share of their lengths at the start: the root of the mean square."""
    moved = [(p - before[n]).norm(dim=-1) / before[n].norm(dim=-1) for n, p in wave_vectors(network).items()]
    return float(torch.cat([m.flatten() for m in moved]).square().mean().sqrt()) if moved else 0.0


def wave_vectors(network: nn.Module) -> dict[str, Tensor]:
    """Copies of all that rotate, by name."""
    named = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    return {n: p.detach().clone() for n, p in named.items() if n.endswith("freqs") and p.numel()}
