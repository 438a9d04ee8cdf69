"""Parameters and multiply-adds of what others use instead: transformers' SegFormer, with the published settings.

``python benchmarks/counts.py [--json FILE]``: 150 classes, 512 x 512, on meta tensors; needs transformers, no weights.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

# Channels, depths, and channels of the decoder (arXiv:2105.15203, table 6).
SEGFORMERS = {
    "SegFormer-B0": ([32, 64, 160, 256], [2, 2, 2, 2], 256),
    "SegFormer-B2": ([64, 128, 320, 512], [3, 4, 6, 3], 768),
}


def count(network: nn.Module, image: Tensor, head: str) -> dict[str, float]:
    """Millions of parameters and 1e9 multiply-adds, in all and without what ``head`` names."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the counts here")
    arguments = parser.parse_args()
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    image, found = torch.empty(1, 3, 512, 512, device="meta"), {}
    for name, (dims, depths, decoder) in SEGFORMERS.items():
        settings = SegformerConfig(hidden_sizes=dims, depths=depths, decoder_hidden_size=decoder, num_labels=150)
        with torch.device("meta"):
            network = SegformerForSemanticSegmentation(settings)
        found[name] = count(network, image, "decode_head")
        print(name, {key: round(value, 2) for key, value in found[name].items()})
    if arguments.json:
        arguments.json.write_text(json.dumps({"torch": torch.__version__, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
