"""Train the network of the interactive page, and write what the page reads.

    python docs/examples/interactive_network.py          # about five minutes on one thread

writes into docs/interactive/assets: the network as ONNX, the example images, and what the page must know of both.
The photograph is scikit-image's ``data.coins()``, from the Brooklyn Museum, without known copyright restrictions; so
its parts and the weights may be passed on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from coins_data import Crops, Scene, coins
from coins_training import evaluating
from interactive_export import SIZE, Example, write_assets
from scipy import ndimage
from segmentation.losses import instance_losses
from spatial_grouping_attention.models import GroupingViT, grouping_vit_nano
from torch import Tensor, nn
from tqdm import tqdm

ASSETS = Path(__file__).parents[1] / "interactive" / "assets"
SEEN = 0.5  # share of the photograph's rows that training sees
CROP = 128  # pixels: two coins and what is between them
LEARNING_RATE = 3e-3


def make_network() -> GroupingViT:
    """Three groupings, to groups 4, 8 and 16 pixels apart; the last groups are candidates for whole coins."""
    return grouping_vit_nano(
        in_channels=1,
        num_classes=2,
        dims=(16, 32, 64, 96),
        depths=(0, 0, 1, 1),
        num_heads=(1, 2, 4, 6),
        grouping=("sparse", "sparse", "dense"),
        head="panoptic",
    )


def instances(scene: Scene) -> Scene:
    """The same scene with coins numbered from 1, and 0 for the table."""
    numbered, _ = ndimage.label(scene.labels > 0)
    return replace(scene, labels=numbered.astype(np.int64))


def examples(seen: Scene, unseen: Scene) -> list[Example]:
    """Two parts of the photograph that training never saw, and one that it did."""
    right = unseen.image.shape[1] - SIZE[1]
    return [
        _cut(unseen, 0, "unseen-left", "Unseen, left", spot=(115, 113)),
        _cut(unseen, right, "unseen-right", "Unseen, right", spot=(40, 96)),
        _cut(seen, 0, "seen", "Trained on", spot=(115, 94)),
    ]


def _cut(scene: Scene, left: int, name: str, title: str, spot: tuple[int, int]) -> Example:
    place = slice(SIZE[0]), slice(left, left + SIZE[1])
    return Example(name, title, scene.image[place], scene.labels[place], spot)


def train(network: GroupingViT, crops: Crops, steps: int, batch: int, on_step: Callable[[float], None]) -> None:
    """Cross-entropy and Dice of the pixels, and candidates matched to coins; AdamW, one cycle of the learning rate."""
    optimiser = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=max(steps, 2), pct_start=0.1)
    for _ in range(steps):
        images, labels = crops.batch(batch)
        losses = instance_losses(network(images), labels, torch.ones_like(labels, dtype=torch.bool), _alone)
        optimiser.zero_grad()
        losses["total"].backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        on_step(losses["total"].item())


def _alone(sums: Tensor) -> Tensor:
    """The sums of all processes, which are one."""
    return sums


def accuracy(network: GroupingViT, scene: Scene) -> float:
    """Intersection over union of coins, with every pixel of a scene seen at once."""
    with evaluating(network):
        logits = network(torch.from_numpy(scene.image)[None, None]).logits
    found, wanted = logits[0].argmax(0).numpy() > 0, scene.labels > 0
    return float((found & wanted).sum() / (found | wanted).sum())


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="of the optimiser (%(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="crops per step (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and crops (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder to write into (%(default)s)")
    options = parser.parse_args(arguments)
    for name in ("steps", "batch", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1; got {getattr(options, name)}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, export, write."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    seen, unseen = instances(coins()).split(SEEN)
    network = make_network()
    with tqdm(total=options.steps, disable=None) as bar:

        def on_step(loss: float) -> None:
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update()

        train(network, Crops(seen, CROP, options.seed), options.steps, options.batch, on_step)
    score = accuracy(network, unseen)
    print(f"intersection over union of coins on the unseen half: {100 * score:.1f} %")
    recipe = {"steps": options.steps, "batch": options.batch, "crop": CROP, "seed": options.seed, "iou": score}
    write_assets(options.out, network, examples(seen, unseen), recipe)


if __name__ == "__main__":
    main()
