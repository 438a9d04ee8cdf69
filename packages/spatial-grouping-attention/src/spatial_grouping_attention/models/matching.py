"""What candidates are trained on: every object is matched with one candidate, and the others are no objects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from RoSE.validation import require_boolean, require_int, require_integral, require_real, require_sizes
from torch import Tensor, nn

from .output import SegmentationOutput, candidates_of
from .panoptic import wide

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


class SetMatchingLoss(nn.Module):
    """Match objects with candidates at the least total cost, and score the pairs (arXiv:2107.06278, arXiv:2112.01527).

    A pair costs the dice loss between the object's mask and the candidate's memberships, less the probability of the
    object's class. Matched candidates learn the class and the mask of their objects (binary cross-entropy and dice
    loss of the memberships), all others the class "no object". Where there are more objects than candidates, the
    objects that fit worst are left out.

    No mask is made of a candidate that is not matched.

    Pixels that are not valid count for nothing, and neither do objects without a valid pixel.

    Where processes share the images of a batch out, averages over the objects of one process are not those of the
    batch: processes have different numbers of them. With ``reduce`` every process has the terms of the whole batch.
    Its gradient must be the sum of the processes' gradients, as is that of a sum over all processes; the mean over
    processes that DDP and FSDP take of the parameters' gradients is then the gradient of the whole batch.

    Args:
        num_classes: classes of objects, as the network's.
        class_weight, mask_weight, dice_weight: of the terms, the first and the last also in costs.
        no_object_weight: of "no object" in the cross-entropy, in which other classes have a weight of 1. Below 1 it
            raises all scores; MaskFormer's 0.1 is for a hundred candidates, not for all groups of a large grid.
        reduce: function of a tensor (5,), which sums it over all processes, differentiably; None for one process.

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
        no_object_weight: float = 0.4,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = require_int("num_classes", num_classes, minimum=1)
        most = torch.finfo(torch.float32).max
        self.class_weight = require_real("class_weight", class_weight, minimum=0.0, maximum=most)
        self.mask_weight = require_real("mask_weight", mask_weight, minimum=0.0, maximum=most)
        self.dice_weight = require_real("dice_weight", dice_weight, minimum=0.0, maximum=most)
        self.no_object_weight = require_real("no_object_weight", no_object_weight, minimum=0.0, maximum=most)
        if reduce is not None and not callable(reduce):
            raise TypeError(f"reduce must be a function of a tensor, or None; got {reduce!r}")
        self.reduce = reduce

    def forward(self, output: SegmentationOutput, targets: Sequence[tuple[Tensor, Tensor]]) -> MatchingLosses:
        """Compare what a network with candidates found with the objects of every image.

        Args:
            output: of the network.
            targets: one :class:`Objects` per image, or a pair of its parts.

        Returns:
            The terms and their sum, averages over the objects of the batch (of all processes, with ``reduce``).

        Raises:
            TypeError: labels are not integers, or masks not boolean.
            ValueError: shapes disagree, a label is out of range, the output has no candidates or is not finite.
            ImportError: scipy is not installed.
        """
        candidates, class_logits = candidates_of(output)
        if class_logits.shape[-1] != self.num_classes + 1:
            raise ValueError(f"num_classes must be the network's, {class_logits.shape[-1] - 1}; got {self.num_classes}")
        class_logits = class_logits.to(wide(class_logits.dtype))
        objects = self._batch(output, targets)
        slots = self._slots(output, candidates, class_logits, objects)
        chosen = candidates.gather(1, slots.clamp(min=0)).masked_fill(slots < 0, -1)
        masks, dice = mask_losses(output.masks_of(chosen).flatten(2), objects.masks, _valid_pixels(output))
        pairs = slots >= 0
        sums = (
            *self._classes(candidates, class_logits, objects.labels, slots),
            *(losses.masked_select(pairs).sum() for losses in (masks, dice)),
            pairs.sum(),
        )
        total = torch.stack([each.to(class_logits.dtype) for each in sums])
        classes, weight, masks, dice, number = total if self.reduce is None else self.reduce(total)
        classes = self.class_weight * classes / weight.clamp(min=torch.finfo(weight.dtype).tiny)
        masks, dice = (w * s / number.clamp(min=1) for w, s in ((self.mask_weight, masks), (self.dice_weight, dice)))
        return MatchingLosses(classes + masks + dice, classes, masks, dice)

    def _batch(self, output: SegmentationOutput, targets: Sequence[tuple[Tensor, Tensor]]) -> Objects:
        """All images' objects that have a valid pixel: labels (B, K), -1 for none, and masks (B, K, pixels)."""
        batch, size = output.logits.shape[0], tuple(output.logits.shape[2:])
        if not isinstance(targets, Sequence):
            raise TypeError(f"targets must be a list of Objects, one per image; got {type(targets).__name__}")
        if len(targets) != batch:
            raise ValueError(f"targets must have one entry per image, {batch}; got {len(targets)}")
        valid, images = _valid_pixels(output), []
        for i, pair in enumerate(targets):
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise TypeError(f"targets[{i}] must be Objects, labels and masks; got {type(pair).__name__}")
            labels, masks = pair
            self._require_objects(f"targets[{i}]", labels, masks, size)
            seen = masks.flatten(1) & valid[i]
            kept = seen.any(1)
            images.append((labels[kept].long(), seen[kept]))
        most = max(1, *(len(labels) for labels, _ in images))
        missing = [most - len(labels) for labels, _ in images]
        return Objects(
            torch.stack([F.pad(labels, (0, n), value=-1) for (labels, _), n in zip(images, missing, strict=True)]),
            torch.stack([F.pad(masks, (0, 0, 0, n)) for (_, masks), n in zip(images, missing, strict=True)]),
        )

    def _require_objects(self, name: str, labels: Tensor, masks: Tensor, size: tuple[int, ...]) -> None:
        require_sizes(f"labels of {name}", require_integral(f"labels of {name}", labels), "n")
        expected = len(labels), *size
        if tuple(require_boolean(f"masks of {name}", masks).shape) != expected:
            raise ValueError(f"masks of {name} must have shape {expected}; got {tuple(masks.shape)}")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ValueError(f"labels of {name} must be in [0, {self.num_classes}); got {sorted(set(labels.tolist()))}")

    @torch.no_grad()
    def _slots(
        self, output: SegmentationOutput, candidates_of_all: Tensor, class_logits: Tensor, objects: Objects
    ) -> Tensor:
        """Match every image's objects with its candidates: which of these is whose, (B, K), -1 for none."""
        slots = torch.full_like(objects.labels, -1)
        for i, (inside, mass) in enumerate(zip(*overlaps(output, objects.masks), strict=True)):
            candidates, wanted = (candidates_of_all[i] >= 0).nonzero().squeeze(1), objects.labels[i] >= 0
            groups, labels = candidates_of_all[i, candidates], objects.labels[i, wanted]
            dice = dice_loss(inside[groups][:, wanted], mass[groups].unsqueeze(1), objects.masks[i, wanted].sum(1))
            cost = self.dice_weight * dice - self.class_weight * class_logits[i, candidates].softmax(-1)[:, labels]
            rows, columns = match(cost)
            slots[i, columns] = candidates[rows]
        return slots

    def _classes(
        self, candidates: Tensor, class_logits: Tensor, labels: Tensor, slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy of all candidates' classes, summed by weights, and the sum of the weights."""
        wanted = torch.full_like(candidates, self.num_classes).masked_fill(candidates < 0, IGNORED)
        image, entry = (slots >= 0).nonzero(as_tuple=True)
        wanted[image, slots[image, entry]] = labels[image, entry]
        weights = class_logits.new_ones(self.num_classes + 1)
        weights[-1] = self.no_object_weight
        losses = F.cross_entropy(class_logits.mT, wanted, weights, ignore_index=IGNORED, reduction="sum")
        return losses, weights[wanted[wanted != IGNORED]].sum()


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
        require_int("classes", classes, minimum=0, maximum=torch.iinfo(torch.int64).max)
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


def overlaps(output: SegmentationOutput, masks: Tensor) -> tuple[Tensor, Tensor]:
    """How much of every group lies inside of every mask, and how much of it there is.

    Sums over the members of groups say this without any group's mask: memory is that of the objects' masks.

    Args:
        output: of the network.
        masks: (B, K, pixels) boolean.

    Returns:
        Pixels, counted by memberships: (B, N_out, K) and (B, N_out).
    """
    every = torch.cat((masks, _valid_pixels(output).unsqueeze(1)), 1)
    sums = output.memberships().sum(torch.unflatten(every.to(wide(output.logits.dtype)), 2, output.logits.shape[2:]))
    return sums[..., :-1], sums[..., -1]


def mask_losses(log_members: Tensor, masks: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of pairs of a soft and a hard mask.

    Args:
        log_members: logarithms of memberships (B, K, pixels).
        masks: (B, K, pixels) boolean.
        valid: (B, pixels) boolean; memberships and masks have nothing elsewhere.

    Returns:
        Binary cross-entropy, averaged over the valid pixels, and :func:`dice_loss`: (B, K).
    """
    entropy = -torch.where(masks, log_members, log_complement(log_members)).sum(2)
    members = log_members.exp()
    dice = dice_loss((members * masks).sum(2), members.sum(2), masks.sum(2))
    return entropy / valid.sum(1, keepdim=True).clamp(min=1), dice


def log_complement(log_members: Tensor) -> Tensor:
    """``log(1 - p)`` from ``log p``."""
    return (-log_members.clamp(max=-CLOSEST).expm1()).log()


def dice_loss(inside: Tensor, mass: Tensor, area: Tensor) -> Tensor:
    """Of a soft mask of a given mass, part of it inside of an object of a given area; 1 is added to both sides."""
    return 1 - (2 * inside + 1) / (mass + area + 1)


def match(cost: Tensor) -> tuple[Tensor, Tensor]:
    """The pairing of least total cost (G, n): of min(G, n) pairs, no row or column in two of them.

    Returns:
        Rows and columns of the pairs.

    Raises:
        ValueError: a cost is not finite.
        ImportError: scipy is not installed.
    """
    if not bool(cost.isfinite().all()):
        raise ValueError("candidates must have finite classes and masks; got some that are not: has training diverged?")
    rows, columns = _linear_sum_assignment()(cost.cpu().numpy())
    return torch.as_tensor(rows, device=cost.device), torch.as_tensor(columns, device=cost.device)


def _linear_sum_assignment() -> Any:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("SetMatchingLoss needs scipy: pip install 'spatial-grouping-attention[matching]'") from error
    return linear_sum_assignment


def _valid_pixels(output: SegmentationOutput) -> Tensor:
    """Which pixels are real, (B, pixels)."""
    if output.valid is None:
        return output.logits.new_ones(output.logits.shape[0], output.logits[0, 0].numel(), dtype=torch.bool)
    return output.valid.flatten(1)
