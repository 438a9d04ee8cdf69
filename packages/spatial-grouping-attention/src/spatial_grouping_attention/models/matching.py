"""What candidates are trained on: every object is matched with one candidate, and the others are no objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from RoSE.validation import require_boolean, require_int, require_integral, require_real, require_sizes
from torch import Tensor, nn

from .output import SegmentationOutput

# Memberships closer to 1 than this count as this far: what belongs to others has a finite logarithm.
CLOSEST = 1e-6
# Slots that count for nothing.
IGNORED = -100


class Objects(NamedTuple):
    """The objects of one image."""

    labels: Tensor
    """Class of every object, (n,) integers."""
    masks: Tensor
    """Which pixels are its, (n, *size) boolean."""


class MatchingLosses(NamedTuple):
    """Terms of a loss, with their weights in them."""

    total: Tensor
    """Their sum."""
    classes: Tensor
    """Cross-entropy of the candidates' classes."""
    masks: Tensor
    """Binary cross-entropy of the matched candidates' masks."""
    dice: Tensor
    """Dice loss of the matched candidates' masks."""


class Pair(NamedTuple):
    """An image's matched candidates and objects, one of each per entry."""

    candidates: Tensor
    objects: Tensor


class SetMatchingLoss(nn.Module):
    """Match objects with candidates at the least total cost, and score the pairs (arXiv:2107.06278, arXiv:2112.01527).

    The cost of a pair is what it would add to the loss: the (negative) probability of the object's class, and binary
    cross-entropy and dice loss between its mask and the candidate's memberships. Matched candidates learn the class and
    the mask of their objects, all others the class "no object". Where there are more objects than candidates, the
    objects that fit worst are left out.

    Pixels that are not valid count for nothing, and neither do objects without a valid pixel.

    Args:
        num_classes: classes of objects, as the network's.
        class_weight, mask_weight, dice_weight: of the terms, in costs and losses.
        no_object_weight: of "no object" in the cross-entropy, in which other classes have a weight of 1.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a weight is negative, or ``num_classes`` below 1.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        class_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        no_object_weight: float = 0.1,
    ) -> None:
        super().__init__()
        self.num_classes = require_int("num_classes", num_classes, minimum=1)
        self.class_weight = require_real("class_weight", class_weight, minimum=0.0)
        self.mask_weight = require_real("mask_weight", mask_weight, minimum=0.0)
        self.dice_weight = require_real("dice_weight", dice_weight, minimum=0.0)
        self.no_object_weight = require_real("no_object_weight", no_object_weight, minimum=0.0)

    def forward(self, output: SegmentationOutput, targets: Sequence[tuple[Tensor, Tensor]]) -> MatchingLosses:
        """Compare what a network with a panoptic head found with the objects of every image.

        Args:
            output: of the network.
            targets: one :class:`Objects` per image, or a pair of its parts.

        Returns:
            The terms and their sum, averages over the objects of the batch.

        Raises:
            TypeError: labels are not integers, or masks not boolean.
            ValueError: shapes disagree, a label is out of range, the output has no candidates or is not finite.
            ImportError: scipy is not installed.
        """
        if output.candidates is None or output.class_logits is None:
            raise ValueError('output must come from a network with head="panoptic"; got one without candidates')
        images = self._visible(output, targets)
        pairs = self._pairs(output, output.class_logits.float(), images)
        classes = self._classes(output.candidates, output.class_logits.float(), images, pairs)
        masks, dice = self._masks(output, images, pairs)
        return MatchingLosses(classes + masks + dice, classes, masks, dice)

    def _visible(self, output: SegmentationOutput, targets: Sequence[tuple[Tensor, Tensor]]) -> list[Objects]:
        """What images have to be matched: masks (n, pixels) over the valid pixels only, none of them empty."""
        batch, size = output.logits.shape[0], tuple(output.logits.shape[2:])
        if len(targets) != batch:
            raise ValueError(f"targets must have one entry per image, {batch}; got {len(targets)}")
        images = []
        for i, (labels, masks) in enumerate(targets):
            require_sizes(f"labels of targets[{i}]", require_integral(f"labels of targets[{i}]", labels), "n")
            require_boolean(f"masks of targets[{i}]", masks)
            if tuple(masks.shape) != (len(labels), *size):
                expected = (len(labels), *size)
                raise ValueError(f"masks of targets[{i}] must have shape {expected}; got {tuple(masks.shape)}")
            if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
                raise ValueError(
                    f"labels of targets[{i}] must be in [0, {self.num_classes}); got {labels.unique().tolist()}"
                )
            seen = _valid_pixels(masks.flatten(1), output.valid, i)
            kept = seen.any(1)
            images.append(Objects(labels[kept].long(), seen[kept]))
        return images

    @torch.no_grad()
    def _pairs(self, output: SegmentationOutput, class_logits: Tensor, images: Sequence[Objects]) -> list[Pair]:
        """Match every image's objects with its candidates."""
        assert output.candidates is not None
        pairs = []
        log_members = output.masks_of(output.candidates).flatten(2)
        for i, (labels, masks) in enumerate(images):
            real = (output.candidates[i] >= 0).nonzero().squeeze(1)
            members = _valid_pixels(log_members[i, real], output.valid, i)
            probability = class_logits[i, real].softmax(-1)[:, labels]
            entropy, dice = pair_costs(members, masks.to(members.dtype))
            cost = -self.class_weight * probability + self.mask_weight * entropy + self.dice_weight * dice
            candidates, objects = match(cost)
            pairs.append(Pair(real[candidates], objects))
        return pairs

    def _classes(
        self, candidates: Tensor, class_logits: Tensor, images: Sequence[Objects], pairs: Sequence[Pair]
    ) -> Tensor:
        """Cross-entropy of all candidates' classes, averaged by weights."""
        wanted = torch.full_like(candidates, self.num_classes).masked_fill(candidates < 0, IGNORED)
        for row, (labels, _), pair in zip(wanted, images, pairs, strict=True):
            row[pair.candidates] = labels[pair.objects]
        weights = class_logits.new_ones(self.num_classes + 1)
        weights[-1] = self.no_object_weight
        total = F.cross_entropy(
            class_logits.flatten(0, 1), wanted.flatten(), weights, ignore_index=IGNORED, reduction="sum"
        )
        weight = weights[wanted[wanted != IGNORED]].sum()
        return self.class_weight * total / weight.clamp(min=torch.finfo(weight.dtype).tiny)

    def _masks(
        self, output: SegmentationOutput, images: Sequence[Objects], pairs: Sequence[Pair]
    ) -> tuple[Tensor, Tensor]:
        """Mask losses of the pairs, averaged over them; only their masks are made with a gradient."""
        assert output.candidates is not None
        counts = [len(pair.candidates) for pair in pairs]
        chosen = output.candidates.new_full((len(pairs), max(*counts, 1)), -1)
        for row, of_image, pair, n in zip(chosen, output.candidates, pairs, counts, strict=True):
            row[:n] = of_image[pair.candidates]
        log_members = output.masks_of(chosen).flatten(2)
        entropy = dice = log_members.sum() * 0.0
        for i, (image, pair, n) in enumerate(zip(images, pairs, counts, strict=True)):
            members = _valid_pixels(log_members[i, :n], output.valid, i)
            masks = image.masks[pair.objects].to(members.dtype)
            entropy = entropy + mask_entropy(members, masks).sum()
            dice = dice + dice_loss(members, masks).sum()
        pairs_in_all = max(sum(counts), 1)
        return self.mask_weight * entropy / pairs_in_all, self.dice_weight * dice / pairs_in_all


def objects_of(instances: Tensor, classes: int | Tensor) -> list[Objects]:
    """Take instance maps apart.

    Args:
        instances: (B, *size) integers; 0 for pixels of no instance, which numbers stand for the others does not matter.
        classes: of all instances, or of every pixel (B, *size) integers; an instance has the class that most of its
            pixels have, and the smallest of several such.

    Returns:
        One :class:`Objects` per image, in the order of the instances' numbers.

    Raises:
        TypeError: a tensor does not hold integers.
        ValueError: shapes disagree.
    """
    require_integral("instances", instances)
    if isinstance(classes, Tensor):
        if require_integral("classes", classes).shape != instances.shape:
            raise ValueError(f"classes must have shape {tuple(instances.shape)}; got {tuple(classes.shape)}")
    else:
        require_int("classes", classes, minimum=0)
    found = []
    for i, image in enumerate(instances):
        numbers = image.unique()
        numbers = numbers[numbers != 0]
        masks = image == numbers.reshape(-1, *(1,) * image.ndim)
        if isinstance(classes, Tensor):
            labels = torch.stack([classes[i][mask].mode().values for mask in masks]) if len(masks) else numbers
        else:
            labels = torch.full_like(numbers, classes)
        found.append(Objects(labels.long(), masks))
    return found


def log_complement(log_members: Tensor) -> Tensor:
    """``log(1 - p)`` from ``log p``."""
    return (-log_members.clamp(max=-CLOSEST).expm1()).log()


def mask_entropy(log_members: Tensor, masks: Tensor) -> Tensor:
    """Binary cross-entropy (n,) of memberships with masks, both (n, pixels), averaged over the pixels."""
    return -torch.where(masks > 0, log_members, log_complement(log_members)).mean(1)


def dice_loss(log_members: Tensor, masks: Tensor) -> Tensor:
    """``1 - (2 |A B| + 1) / (|A| + |B| + 1)``, (n,), of memberships and masks, both (n, pixels)."""
    members = log_members.exp()
    return 1 - (2 * (members * masks).sum(1) + 1) / (members.sum(1) + masks.sum(1) + 1)


def pair_costs(log_members: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`mask_entropy` and :func:`dice_loss` (G, n) of all candidates (G, pixels) with all objects (n, pixels)."""
    others = log_complement(log_members)
    entropy = -((log_members - others) @ masks.T + others.sum(1, keepdim=True)) / max(masks.shape[1], 1)
    members = log_members.exp()
    sizes = members.sum(1, keepdim=True) + masks.sum(1)
    return entropy, 1 - (2 * members @ masks.T + 1) / (sizes + 1)


def match(cost: Tensor) -> Pair:
    """The pairing of least total cost (G, n): of min(G, n) pairs, no row or column in two of them.

    Raises:
        ValueError: a cost is not finite.
        ImportError: scipy is not installed.
    """
    if not bool(cost.isfinite().all()):
        raise ValueError("candidates must have finite classes and masks; got some that are not: has training diverged?")
    rows, columns = _linear_sum_assignment()(cost.cpu().numpy())
    return Pair(torch.as_tensor(rows, device=cost.device), torch.as_tensor(columns, device=cost.device))


def _linear_sum_assignment() -> Any:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("SetMatchingLoss needs scipy: pip install 'spatial-grouping-attention[matching]'") from error
    return linear_sum_assignment


def _valid_pixels(rows: Tensor, valid: Tensor | None, image: int) -> Tensor:
    """Rows (n, pixels) of an image without its padding."""
    return rows if valid is None else rows[:, valid[image].flatten()]
