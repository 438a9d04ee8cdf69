"""From candidates and classes of pixels to segments: instances of things, and the rest by class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from RoSE.validation import require_int, require_real
from torch import Tensor

from .output import SegmentationOutput


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


@torch.no_grad()
def panoptic_segments(
    output: SegmentationOutput,
    *,
    things: Sequence[int] | None = None,
    min_score: float = 0.5,
    min_membership: float = 0.5,
) -> list[PanopticSegments]:
    """Tell the instances in images apart.

    The classes of the pixels say where things are, at the full resolution of the semantic head; the candidates say
    which thing a pixel belongs to. A pixel of a thing goes to the candidate for which score times membership is largest
    (arXiv:2107.06278), among those that are some thing with a probability above ``min_score``. A candidate to which
    the pixels it gets so belong by little is a fragment of another's object: it is dropped, and they go to the others.
    Groups compete for the background as well, so background needs no threshold of its own.

    Args:
        output: of a network with a panoptic head.
        things: classes whose instances are told apart; None for all but 0. All other classes have no instances.
        min_score: a candidate's least probability of its class, in [0, 1].
        min_membership: of its pixels in a candidate, the least that their average may be, in [0, 1].

    Returns:
        One entry per image, instances in the order of their scores.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: there are no candidates, or an argument is out of range.
    """
    if output.candidates is None or output.class_logits is None:
        raise ValueError('output must come from a network with head="panoptic"; got one without candidates')
    require_real("min_score", min_score, minimum=0.0, maximum=1.0)
    require_real("min_membership", min_membership, minimum=0.0, maximum=1.0)
    num_classes = output.logits.shape[1]
    kinds = range(1, num_classes) if things is None else [require_int("things", kind, minimum=0) for kind in things]
    if any(kind >= num_classes for kind in kinds):
        raise ValueError(f"things must be below the number of classes, {num_classes}; got {list(kinds)}")
    semantic = output.logits.argmax(1)
    if output.valid is not None:
        semantic = semantic.masked_fill(~output.valid, -1)
    countable = torch.zeros(num_classes, dtype=torch.bool, device=semantic.device)
    countable[list(kinds)] = True
    scores, classes = output.class_logits.float().softmax(-1)[..., :-1].max(-1)
    kept = (output.candidates >= 0) & countable[classes] & (scores > min_score)
    order = scores.masked_fill(~kept, -1.0).argsort(dim=1, descending=True, stable=True)[:, : int(kept.sum(1).max())]
    scores, classes, kept = (x.gather(1, order) for x in (scores, classes, kept))
    members = output.masks_of(output.candidates.gather(1, order).masked_fill(~kept, -1)).exp()
    found = []
    for i, map_of_classes in enumerate(semantic):
        n = int(kept[i].sum())
        inside = countable[map_of_classes.clamp(min=0)] & (map_of_classes >= 0)
        owners = _owners(members[i, :n], scores[i, :n], inside, min_membership)
        numbers, instances = torch.unique(owners, return_inverse=True)
        numbers, instances = numbers[numbers >= 0], instances + int((numbers[:1] >= 0).all())
        found.append(PanopticSegments(instances, classes[i, numbers], scores[i, numbers], map_of_classes))
    return found


def _owners(members: Tensor, scores: Tensor, inside: Tensor, min_membership: float) -> Tensor:
    """Which candidate (of n) every pixel belongs to, (*size), -1 for none.

    Args:
        members: (n, *size).
        scores: (n,).
        inside: (*size) boolean, where there are things.
        min_membership: see :func:`panoptic_segments`.
    """
    left = torch.arange(len(scores), device=scores.device)
    nobody = torch.full(inside.shape, -1, dtype=torch.long, device=inside.device)
    if not len(left):
        return nobody
    weighed = scores.reshape(-1, *(1,) * inside.ndim) * members
    best = weighed.argmax(0)
    held = members.gather(0, best.unsqueeze(0)).squeeze(0)[inside]
    won = best[inside]
    share = held.new_zeros(len(left)).index_add(0, won, held) / won.bincount(minlength=len(left))
    # Once only: what others inherit says nothing of how they hold their own.
    left = left[share >= min_membership]
    return left[weighed[left].argmax(0)].where(inside, nobody) if len(left) else nobody
