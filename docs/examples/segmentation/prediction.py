"""From an image of any size to a label image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.segmentation import relabel_sequential
from spatial_grouping_attention import compose
from spatial_grouping_attention.models import SegmentationOutput, panoptic_segments
from torch import Tensor, nn

from segmentation.augment import normalise
from segmentation.blocks import Block, Blocks, Window, tile_shape
from segmentation.loop import autocast
from segmentation.resample import resize, resize_labels, size_at

# Pixels that are predicted in one piece, in crops of training. Attention that sees all of an image has only seen crops:
# nano, trained on 128 x 128, loses a point of mean IoU on an image of 1801 x 1901 seen whole, in six times the time.
LARGEST_IN_CROPS = 4


class GroupUse(NamedTuple):
    """Of one stage."""

    unused: int
    """Groups that are no token's most likely one."""
    groups: int
    """All of them."""


class Prediction(NamedTuple):
    """What a network makes of an image."""

    labels: NDArray[np.int32]
    """(*size): classes, or 0 for background and 1, 2, ... for instances."""
    use: list[GroupUse]
    """Of every stage; summed over tiles."""


class Predictor:
    """A network, and how it looks at images.

    Args:
        network: to predict with; put into evaluation mode.
        task: ``"semantic"`` or ``"instances"``.
        precision: see :class:`segmentation.settings.Settings`.
        largest: pixels, as the network sees them, of an image that is seen as a whole. Larger ones are cut into tiles
            that overlap, whose logits are blended with Gaussian weights. Instances are never cut: which parts in two
            tiles are one object is not known from logits.
        spacing: that images are brought to before the network sees them; None for their own.
    """

    def __init__(
        self, network: nn.Module, task: str, precision: str, largest: int, spacing: Sequence[float] | None = None
    ) -> None:
        self.network = network.eval()
        self.task = task
        self.precision = precision
        self.largest = largest
        self.spacing = spacing
        self.device = next(network.parameters()).device

    def __call__(self, image: NDArray[np.generic], spacing: Sequence[float]) -> Prediction:
        """Predict one image (C, *size), as the file has it."""
        pixels = normalise(image)[None]
        size = tuple(pixels.shape[2:])
        tile = size if self.task == "instances" else tile_of(size, spacing, self.largest, self.spacing)
        if tile == size:
            output = self.look(pixels, spacing)
            return Prediction(self.decide(output, size), count_groups(output))
        use: list[GroupUse] = []

        def look(window: Window) -> Tensor:
            part = pixels[(..., *window)]
            output = self.look(part, spacing)
            use[:] = add_use(use, count_groups(output))
            return logits_of(output, part.shape[2:])

        labels = blend(look, Blocks.single(size, tile)[0])
        return Prediction(labels.astype(np.int32), use)

    def logits(self, pixels: NDArray[np.float32], spacing: Sequence[float]) -> Tensor:
        """Logits (classes, *size) of one normalised image (C, *size), and nothing else that the network gives."""
        return logits_of(self.look(torch.from_numpy(pixels)[None], spacing), pixels.shape[1:])

    def look(self, pixels: Tensor, spacing: Sequence[float]) -> SegmentationOutput:
        """All that the network says of one normalised image (1, C, *size), in the pixels that it sees."""
        if self.spacing is not None:
            pixels, spacing = resize(pixels, size_at(pixels.shape[2:], spacing, self.spacing)), self.spacing
        with torch.no_grad(), autocast(self.device, self.precision):
            output: SegmentationOutput = self.network(pixels.to(self.device), tuple(spacing))
        return output

    def decide(self, output: SegmentationOutput, size: Sequence[int]) -> NDArray[np.int32]:
        """Labels of an image (*size) of what :meth:`look` gave."""
        as_seen = tuple(output.logits.shape[2:]) == tuple(size)
        if self.task == "semantic":
            logits = output.logits[0] if as_seen else logits_of(output, size)
            return logits.argmax(0).cpu().numpy().astype(np.int32)
        instances = panoptic_segments(output, things=[1])[0].instances.cpu().numpy().astype(np.int32)
        # What is smaller than a pixel of the image is lost on the way.
        return instances if as_seen else relabel_sequential(resize_labels(instances, size))[0].astype(np.int32)


def logits_of(output: SegmentationOutput, size: Sequence[int]) -> Tensor:
    """Logits (classes, *size) of one image, in its own pixels, on the CPU."""
    return resize(output.logits.float().cpu(), size)[0]


def blend(look: Callable[[Window], Tensor], block: Block) -> NDArray[np.uint8]:
    """Classes of the voxels that a block owns, from the weighted logits of its tiles.

    Args:
        look: told a window of the volume; gives logits (classes, *tile) of the network that sees it, on the CPU.
        block: of a volume.
    """
    corner = [own.start for own in block.owned]
    weights, total = None, None
    for tile in block.tiles:
        logits = look(tile.window)
        if weights is None or total is None:
            weights = bell(logits.shape[1:])
            total = torch.zeros(len(logits), *(own.stop - own.start for own in block.owned))
        seen = _relative(tile.used, [part.start for part in tile.window])
        total[(slice(None), *_relative(tile.used, corner))] += (logits * weights)[(slice(None), *seen)]
    assert total is not None
    labels = np.empty(total.shape[1:], np.min_scalar_type(len(total) - 1))
    # Plane by plane: argmax makes 64-bit integers.
    for row in range(len(labels)):
        labels[row] = total[:, row].argmax(0).numpy()
    return labels


def bell(tile: Sequence[int]) -> Tensor:
    """Gaussian weights (*tile), those of MONAI's sliding window; to import that would cost every process 300 MB."""
    weights = torch.ones(())
    for length in tile:
        places = torch.arange(length) - (length - 1) / 2
        weights = weights[..., None] * torch.exp(-((places / (length / 8)) ** 2) / 2)
    return weights.clamp(min=1e-3)


def _relative(window: Window, corner: Sequence[int]) -> Window:
    """A window as seen from a corner."""
    return tuple(slice(w.start - c, w.stop - c) for w, c in zip(window, corner, strict=True))


def largest_piece(crop: Sequence[int], asked: int | None) -> int:
    """Pixels of the largest image that is predicted whole: as asked for, or by the size of training's crops."""
    return asked or LARGEST_IN_CROPS * math.prod(crop)


def tile_of(
    size: Sequence[int], spacing: Sequence[float], largest: int, seen_spacing: Sequence[float] | None
) -> tuple[int, ...]:
    """A tile of an image that the network sees as ``largest`` pixels at most, if a single one is not more already."""
    if seen_spacing is None:
        return tile_shape(size, spacing, largest)
    pixels = max(1, round(largest * math.prod(seen_spacing) / math.prod(spacing)))
    while True:
        tile = tile_shape(size, spacing, pixels)
        seen = math.prod(size_at(tile, spacing, seen_spacing))
        if seen <= largest or math.prod(tile) == 1:
            return tile
        pixels = max(1, min(math.prod(tile) - 1, pixels * largest // seen))


def count_groups(output: SegmentationOutput) -> list[GroupUse]:
    """How many groups of every stage nobody prefers; of a batch without padding."""
    return [GroupUse(int(a.usage().unused.sum()), a.batch_size * a.num_groups) for a in output.assignments]


def add_use(first: Sequence[GroupUse], second: Sequence[GroupUse]) -> list[GroupUse]:
    """Sum of two counts, stage by stage; either may be empty."""
    if not first or not second:
        return list(first or second)
    return [GroupUse(a.unused + b.unused, a.groups + b.groups) for a, b in zip(first, second, strict=True)]


def group_labels(output: SegmentationOutput, size: Sequence[int]) -> list[NDArray[np.int64]]:
    """The group of every pixel of the first image, one map (*size) per stage; segments are nested."""
    maps = []
    for stage in range(len(output.assignments)):
        chain = compose(output.assignments[: stage + 1])
        tokens = chain.labels(nested=True)[0].reshape(chain.input_shape).cpu().numpy()
        rows = [np.arange(n) * tokens.shape[axis] // n for axis, n in enumerate(size)]
        maps.append(tokens[np.ix_(*rows)])
    return maps
