"""What training makes small."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from monai.losses import MaskedDiceLoss
from spatial_grouping_attention.models import SegmentationOutput, SetMatchingLoss, objects_of
from torch import Tensor

IGNORED = -100  # the label that cross-entropy leaves out

Criterion = Callable[[SegmentationOutput, Tensor, Tensor], dict[str, Tensor]]


def semantic_losses(output: SegmentationOutput, labels: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """Cross-entropy, and one minus the Dice coefficient of a batch, averaged over classes.

    Args:
        output: of the network.
        labels: classes (B, *size).
        valid: (B, *size) boolean; other pixels do not count.

    Returns:
        Scalars "cross-entropy" and "dice", and their sum "total".
    """
    logits = output.logits.float()
    entropy = F.cross_entropy(logits, labels.masked_fill(~valid, IGNORED), ignore_index=IGNORED)
    one_hot = F.one_hot(labels, logits.shape[1]).movedim(-1, 1)
    # Over the batch: in a single crop many a class has no pixel, and its Dice coefficient then says nothing.
    dice = MaskedDiceLoss(softmax=True, batch=True)(logits, one_hot, valid.unsqueeze(1))
    return {"total": entropy + dice, "cross-entropy": entropy, "dice": dice}


def instance_losses(output: SegmentationOutput, instances: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """Losses of foreground against background, and those of candidates matched to objects.

    Args:
        output: of a network with a panoptic head of two classes.
        instances: (B, *size), 0 for background, any other number an object.
        valid: (B, *size) boolean; other pixels do not count.

    Returns:
        Scalars: those of :func:`semantic_losses`, "matched classes", "matched masks" and "matched dice"; "total" is
        the sum of all.
    """
    losses = semantic_losses(output, (instances > 0).long(), valid)
    matched = SetMatchingLoss(num_classes=2)(output, objects_of(instances, 1))
    return losses | {
        "total": losses["total"] + matched.total,
        "matched classes": matched.classes,
        "matched masks": matched.masks,
        "matched dice": matched.dice,
    }


CRITERIA: dict[str, Criterion] = {"semantic": semantic_losses, "instances": instance_losses}
