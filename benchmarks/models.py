"""How long whole networks take, beside their twins, timm's Swin-T and MONAI's SwinUNETR, on one CPU thread.

``python benchmarks/models.py [--json FILE] [--only TITLE] [--rounds N]``; ``--count`` counts what others do instead
(transformers' SegFormer, with the published settings and no weights).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from rotation import optional, timm_layers
from spatial_grouping_attention.models import grouping_vit_nano, grouping_vit_tiny
from timing import alternate, print_table, write_json
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

CLASSES = 4
# SegFormer's published settings: channels, depths, and channels of the decoder (arXiv:2105.15203, table 6).
SEGFORMERS = {
    "SegFormer-B0": ([32, 64, 160, 256], [2, 2, 2, 2], 256),
    "SegFormer-B2": ([64, 128, 320, 512], [3, 4, 6, 3], 768),
}


def swin_tiny() -> nn.Module | None:
    """Swin-T without its classifier, if timm is installed."""
    timm = optional("timm") if timm_layers() else None
    return None if timm is None else timm.create_model("swin_tiny_patch4_window7_224", num_classes=0)


def swin_unetr(spatial_dims: int, feature_size: int) -> nn.Module | None:
    """MONAI's SwinUNETR, if MONAI is installed."""
    nets = optional("monai.networks.nets")
    return nets and nets.SwinUNETR(1, CLASSES, feature_size=feature_size, spatial_dims=spatial_dims)


def networks() -> dict[str, tuple[tuple[int, ...], dict[str, nn.Module | None]]]:
    """Title -> shape of an image (C, *size) and the networks that take it, the first the one all are compared with."""
    return {
        "224 x 224, backbones": (
            (3, 224, 224),
            {
                "grouping_vit_tiny": grouping_vit_tiny(),
                "its twin": grouping_vit_tiny(downsample="conv"),
                "timm Swin-T": swin_tiny(),
            },
        ),
        "256 x 256, segmentation": (
            (1, 256, 256),
            {
                "grouping_vit_nano": grouping_vit_nano(2, 1, CLASSES),
                "its twin": grouping_vit_nano(2, 1, CLASSES, downsample="conv"),
                "SwinUNETR, 12 channels": swin_unetr(2, 12),
                "SwinUNETR, 24 channels": swin_unetr(2, 24),
            },
        ),
        "64 x 64 x 64, segmentation": (
            (1, 64, 64, 64),
            {
                "grouping_vit_nano": grouping_vit_nano(3, 1, CLASSES),
                "its twin": grouping_vit_nano(3, 1, CLASSES, downsample="conv"),
                "SwinUNETR, 12 channels": swin_unetr(3, 12),
                "SwinUNETR, 24 channels": swin_unetr(3, 24),
            },
        ),
    }


def result_of(network: nn.Module, image: Tensor) -> Tensor:
    """What a network is for: logits of pixels, or features."""
    output = network(image)
    logits: Tensor = output if torch.is_tensor(output) else output.logits
    return logits


def check(name: str, network: nn.Module, image: Tensor) -> None:
    """Stop before a network is timed that does not do what it is timed for."""
    network.eval()
    with torch.no_grad():
        result = result_of(network, image)
    assert result.isfinite().all(), f"{name} gives what is not finite"
    expected = (1, 768) if "Swin-T" in name else (1, 150 if image.shape[1] == 3 else CLASSES, *image.shape[2:])
    assert result.shape == expected, f"{name} gives {tuple(result.shape)}, not {expected}"


def forward(network: nn.Module, image: Tensor) -> Callable[[], Any]:
    """Inference."""

    def step() -> None:
        network.eval()
        with torch.no_grad():
            result_of(network, image)

    return step


def training_step(network: nn.Module, image: Tensor) -> Callable[[], Any]:
    """Forward, and gradients to all parameters."""

    def step() -> None:
        network.train()
        result_of(network, image).square().mean().backward()
        network.zero_grad()

    return step


def count(network: nn.Module, image: Tensor, head: str) -> dict[str, float]:
    """Millions of parameters and 1e9 multiply-adds, in all and without what ``head`` names; on meta tensors."""
    network.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(image)
    ours = sum(sum(flops.values()) for name, flops in counter.get_flop_counts().items() if name.endswith(f".{head}"))
    parameters = {name: p.numel() for name, p in network.named_parameters()}
    without = sum(n for name, n in parameters.items() if head not in name)
    return {
        "parameters": sum(parameters.values()) / 1e6,
        "parameters without head": without / 1e6,
        "multiply-adds": counter.get_total_flops() / 2e9,
        "multiply-adds without head": (counter.get_total_flops() - ours) / 2e9,
    }


def counts() -> dict[str, Any]:
    """SegFormers of the published settings, 150 classes, 512 x 512."""
    transformers = optional("transformers")
    if transformers is None:
        raise SystemExit("counting SegFormer needs transformers")
    image, found = torch.empty(1, 3, 512, 512, device="meta"), {}
    for name, (dims, depths, decoder) in SEGFORMERS.items():
        settings = transformers.SegformerConfig(
            hidden_sizes=dims, depths=depths, decoder_hidden_size=decoder, num_labels=150
        )
        with torch.device("meta"):
            network = transformers.SegformerForSemanticSegmentation(settings)
        found[name] = count(network, image, "decode_head")
        print(name, {key: round(value, 2) for key, value in found[name].items()})
    return found


def latencies(only: str | None, rounds: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for title, (shape, contenders) in networks().items():
        if only is not None and only not in title:
            continue
        torch.manual_seed(0)
        image = torch.randn(1, *shape)
        present = {name: network for name, network in contenders.items() if network is not None}
        base = next(iter(present))
        for name, network in present.items():
            check(name, network, image)
        parameters = {name: sum(p.numel() for p in network.parameters()) / 1e6 for name, network in present.items()}
        results[title] = {"parameters in millions": parameters}
        for kind, make in (("forward", forward), ("forward + backward", training_step)):
            calls = {name: make(network, image) for name, network in present.items()}
            # Other work on the machine must not count, and one thread does all of this.
            results[title][kind] = alternate(calls, rounds, time.process_time)
            print_table(f"{title}, {kind}", base, results[title][kind])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--only", help="part of a title")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--count", action="store_true", help="count what others do, and time nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.count:
        write_json(arguments.json, counts())
    else:
        write_json(arguments.json, latencies(arguments.only, arguments.rounds))


if __name__ == "__main__":
    main()
