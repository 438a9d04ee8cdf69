"""What is compared: networks of about as many parameters, called with images and the spacing of their pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.nets import UNet
from skimage.filters import threshold_otsu
from spatial_grouping_attention.models import GroupingViT, grouping_vit_nano
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

CLASSES = 3
# The twin has no groupings, whose parameters go into its channels.
TWIN: dict[int, dict[str, Any]] = {
    2: {"downsample": "conv", "dims": (20, 40, 140), "num_heads": (1, 2, 7)},
    3: {"downsample": "conv", "dims": (18, 36, 136), "num_heads": (1, 2, 4)},
}
UNET_CHANNELS = {2: (16, 32, 64, 132), 3: (12, 24, 48, 80)}


class Logits(nn.Module):
    """A network of ours that gives its logits alone."""

    def __init__(self, model: GroupingViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, spacing: tuple[float, ...]) -> Tensor:
        """Images (B, C, *size) -> (B, classes, *size)."""
        logits: Tensor = self.model(image, spacing).logits
        return logits


class PaddedUNet(nn.Module):
    """MONAI's residual U-Net, for any size; it knows nothing of spacing."""

    def __init__(self, spatial_dims: int, classes: int, in_channels: int = 1) -> None:
        super().__init__()
        channels = UNET_CHANNELS[spatial_dims]
        self.multiple = 2 ** (len(channels) - 1)
        self.model = UNet(spatial_dims, in_channels, classes, channels, (2,) * (len(channels) - 1), num_res_units=2)

    def forward(self, image: Tensor, spacing: tuple[float, ...]) -> Tensor:
        """Images (B, C, *size) -> (B, classes, *size)."""
        size = image.shape[2:]
        padding = [p for n in reversed(size) for p in (0, -n % self.multiple)]
        logits: Tensor = self.model(F.pad(image, padding, mode="replicate") if any(padding) else image)
        return logits[(..., *(slice(n) for n in size))]


class Otsu(nn.Module):
    """What a threshold alone gets: the first class where an image is brighter than Otsu's threshold of it."""

    def forward(self, image: Tensor, spacing: tuple[float, ...]) -> Tensor:
        """Images (B, C, *size) -> (B, classes, *size)."""
        bright = torch.stack([one[0] > threshold_otsu(one[0].numpy()) for one in image])
        return F.one_hot(bright.long(), CLASSES).movedim(-1, 1).float()


def ours(spatial_dims: int, spacing: tuple[float, ...], in_channels: int = 1, **options: Any) -> nn.Module:
    """Nano, or a variant of it."""
    return Logits(grouping_vit_nano(spatial_dims, in_channels, CLASSES, spacing=spacing, **options))


NETWORKS: dict[str, Callable[[int, tuple[float, ...]], nn.Module]] = {
    "grouping, native masks": lambda dims, spacing: ours(dims, spacing, head="native"),
    "grouping, fused (nano)": ours,
    "uniform twin, bilinear": lambda dims, spacing: ours(dims, spacing, head="bilinear", **TWIN[dims]),
    "uniform twin, FPN": lambda dims, spacing: ours(dims, spacing, head="fpn", **TWIN[dims]),
    "U-Net": lambda dims, spacing: PaddedUNet(dims, CLASSES),
}
OTSU = "Otsu's threshold"  # of nuclei


def size_of(network: nn.Module, shape: tuple[int, ...], spacing: tuple[float, ...]) -> dict[str, float]:
    """Parameters, and multiply-adds of one image (C, *size), in millions."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, *shape), spacing)
    parameters = sum(p.numel() for p in network.parameters())
    return {"parameters": parameters / 1e6, "multiply-adds": counter.get_total_flops() / 2e6}
