"""From candidates and classes of pixels to segments: instances of things, and the rest by class."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from RoSE.validation import require_int, require_real
from torch import Tensor

from .output import SegmentationOutput, candidates_of


class PanopticSegments(NamedTuple):
    """What is where in one image."""

    instances: Tensor
    """Number of the instance of every pixel, (*size) int64: 1 to n, 0 for none."""
    classes: Tensor
    """Of the instances, (n,) int64."""
    scores: Tensor
    """Probabilities of these classes, (n,) in float32 at least."""
    semantic: Tensor
    """Class of every pixel, (*size) int64; -1 where not valid."""


# Of a pixel, in a candidate, the least that makes it one of its.
LEAST_MEMBERSHIP = 0.1
# Tokens of the first stage that an object has at least: of fewer, memberships do not show the shape.
LEAST_TOKENS = 4


@torch.no_grad()
def panoptic_segments(
    output: SegmentationOutput,
    *,
    things: Sequence[int] | None = None,
    min_score: float = 0.5,
    min_overlap: float = 0.6,
    min_size: int | None = None,
) -> list[PanopticSegments]:
    """Tell the instances in images apart.

    The classes of the pixels say where things are, the candidates say which thing a pixel belongs to: a pixel of a
    thing goes to the candidate for which score times membership is largest (arXiv:2107.06278), among those that are
    some thing with a probability above ``min_score``. A candidate is a fragment of another's object, or holds
    background, where the pixels it gets so are others than those that belong to it by more than half; it is dropped,
    and its pixels go to the others, if a tenth of them belongs there. Groups compete for the background as well, so
    background needs no candidates of its own.

    Args:
        output: of a network with candidates.
        things: classes whose instances are told apart; None for all but 0. All other classes have no instances.
        min_score: a candidate's least probability of its class, in [0, 1].
        min_overlap: least intersection over union of the pixels that a candidate gets and those that belong to it by
            more than half, in [0, 1].
        min_size: pixels that a candidate gets at least; None for those of four tokens of the first stage.

    Returns:
        One entry per image, instances in the order of their scores.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: there are no candidates, or an argument is out of range.
    """
    candidates, class_logits = candidates_of(output)
    require_real("min_score", min_score, minimum=0.0, maximum=1.0)
    require_real("min_overlap", min_overlap, minimum=0.0, maximum=1.0)
    if min_size is None:
        min_size = LEAST_TOKENS * math.prod(output.stem_stride)
    require_int("min_size", min_size, minimum=0, maximum=torch.iinfo(torch.int64).max)
    countable = _countable(things, output.logits.shape[1]).to(output.logits.device)
    semantic = output.logits.argmax(1)
    if output.valid is not None:
        semantic = semantic.masked_fill(~output.valid, -1)
    scores, classes = class_logits.float().softmax(-1)[..., :-1].max(-1)
    kept = (candidates >= 0) & countable[classes] & (scores > min_score)
    order = scores.masked_fill(~kept, -1.0).argsort(dim=1, descending=True, stable=True)[:, : int(kept.sum(1).max())]
    scores, classes, kept = (x.gather(1, order) for x in (scores, classes, kept))
    members = output.masks_of(candidates.gather(1, order).masked_fill(~kept, -1)).exp()
    found = []
    for i, map_of_classes in enumerate(semantic):
        n = int(kept[i].sum())
        inside = countable[map_of_classes.clamp(min=0)] & (map_of_classes >= 0)
        owners = _owners(members[i, :n], scores[i, :n], inside, min_overlap, min_size)
        numbers, instances = torch.unique(owners, return_inverse=True)
        numbers, instances = numbers[numbers >= 0], instances + int((numbers[:1] >= 0).all())
        found.append(PanopticSegments(instances, classes[i, numbers], scores[i, numbers], map_of_classes))
    return found


def _countable(things: Sequence[int] | None, num_classes: int) -> Tensor:
    """Which classes have instances, (num_classes,) boolean."""
    if things is not None and not isinstance(things, Iterable):
        raise TypeError(f"things must be a list of classes; got {things!r}")
    kinds = range(1, num_classes) if things is None else [require_int("things", kind, minimum=0) for kind in things]
    if any(kind >= num_classes for kind in kinds):
        raise ValueError(f"things must be below the number of classes, {num_classes}; got {list(kinds)}")
    countable = torch.zeros(num_classes, dtype=torch.bool)
    countable[list(kinds)] = True
    return countable


def _owners(members: Tensor, scores: Tensor, inside: Tensor, min_overlap: float, min_size: int) -> Tensor:
    """Which candidate (of n) every pixel belongs to, (*size), -1 for none.

    Args:
        members: (n, *size).
        scores: (n,).
        inside: (*size) boolean, where there are things.
        min_overlap, min_size: see :func:`panoptic_segments`.
    """
    nobody = torch.full(inside.shape, -1, dtype=torch.long, device=inside.device)
    if not len(scores):
        return nobody
    best, share = _best(members, scores)
    won, held = (best[where].bincount(minlength=len(scores)) for where in (inside, inside & (share > 0.5)))
    union = won + (members > 0.5).flatten(1).sum(1) - held
    # Once only: what others inherit says nothing of how they hold their own.
    left = ((won > 0) & (won >= min_size) & (held >= min_overlap * union)).nonzero().squeeze(1)
    if not len(left):
        return nobody
    best, share = _best(members[left], scores[left])
    return left[best].where(inside & (share > LEAST_MEMBERSHIP), nobody)


def _best(members: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Where score times membership is largest, and the membership there, (*size) each."""
    best = (scores.reshape(-1, *(1,) * (members.ndim - 1)) * members).argmax(0)
    return best, members.gather(0, best.unsqueeze(0)).squeeze(0)
