"""What training makes small."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from spatial_grouping_attention.models import SegmentationOutput, SetMatchingLoss, objects_of
from torch import Tensor

IGNORED = -100  # the label that cross-entropy leaves out
SMOOTHING = 1e-5  # a class that is nowhere, and found nowhere, has a Dice coefficient of 1

Total = Callable[[Tensor], Tensor]
Criterion = Callable[[SegmentationOutput, Tensor, Tensor, Total], dict[str, Tensor]]


def semantic_losses(output: SegmentationOutput, labels: Tensor, valid: Tensor, total: Total) -> dict[str, Tensor]:
    """:func:`class_losses` of what a network of ours says."""
    return class_losses(output.logits, labels, valid, total)


def class_losses(logits: Tensor, labels: Tensor, valid: Tensor, total: Total) -> dict[str, Tensor]:
    """Cross-entropy, and one minus the Dice coefficient of a batch, averaged over classes.

    Both are made of sums over pixels, and of the sums of all processes: with a part of a batch, every process has the
    losses of the whole.

    Args:
        logits: (B, classes, *size).
        labels: classes (B, *size).
        valid: (B, *size) boolean; other pixels do not count.
        total: sums a tensor over all processes; see :meth:`segmentation.processes.Processes.sum`.

    Returns:
        Scalars "cross-entropy" and "dice", and their sum "total".
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    entropy = F.cross_entropy(logits, labels.masked_fill(~valid, IGNORED), ignore_index=IGNORED, reduction="sum")
    real = valid.unsqueeze(1)
    found = logits.softmax(1) * real
    wanted = F.one_hot(labels, logits.shape[1]).movedim(-1, 1) * real
    # Over the batch: in a single crop many a class has no pixel, and its Dice coefficient then says nothing.
    axes = [0, *range(2, logits.ndim)]
    common, both = (found * wanted).sum(axes), (found + wanted).sum(axes)
    sums = total(torch.cat([torch.stack([entropy, valid.sum()]), common, both]))
    (entropy, pixels), (common, both) = sums[:2], sums[2:].chunk(2)
    entropy, dice = entropy / pixels, (1 - (2 * common + SMOOTHING) / (both + SMOOTHING)).mean()
    return {"total": entropy + dice, "cross-entropy": entropy, "dice": dice}


def instance_losses(output: SegmentationOutput, instances: Tensor, valid: Tensor, total: Total) -> dict[str, Tensor]:
    """Losses of foreground against background, and those of candidates matched to objects.

    Args:
        output: of a network with a panoptic head of two classes.
        instances: (B, *size), 0 for background, any other number an object.
        valid: (B, *size) boolean; other pixels do not count.
        total: sums a tensor over all processes; see :meth:`segmentation.processes.Processes.sum`.

    Returns:
        Scalars: those of :func:`semantic_losses`, "matched classes", "matched masks" and "matched dice"; "total" is
        the sum of all.
    """
    losses = semantic_losses(output, (instances > 0).long(), valid, total)
    matched = SetMatchingLoss(num_classes=2, reduce=total)(output, objects_of(instances, 1))
    return losses | {
        "total": losses["total"] + matched.total,
        "matched classes": matched.classes,
        "matched masks": matched.masks,
        "matched dice": matched.dice,
    }


CRITERIA: dict[str, Criterion] = {"semantic": semantic_losses, "instances": instance_losses}
