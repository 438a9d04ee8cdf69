"""How good a network is on the samples that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from segmentation.metrics import instance_scores, semantic_scores
from segmentation.pairs import Sample
from segmentation.prediction import GroupUse, Predictor, add_use

MAIN_SCORES = {"semantic": "mean IoU", "instances": "AP@0.5"}  # what decides which checkpoint is the best


def validate(
    predictor: Predictor, samples: Sequence[Sample], num_classes: int, on_sample: Callable[[], None]
) -> dict[str, Any]:
    """Scores of whole images, and the share of groups that nobody prefers, per stage.

    Args:
        predictor: the network, and how it looks at images.
        samples: with reference labels.
        num_classes: of semantic labels.
        on_sample: called after every sample.
    """
    predictions, use = [], list[GroupUse]()
    for sample in samples:
        predicted = predictor(sample.image, sample.spacing)
        predictions.append(predicted.labels)
        use = add_use(use, predicted.use)
        on_sample()
    references = [sample.labels for sample in samples]
    if predictor.task == "instances":
        scores = instance_scores(predictions, references)
    else:
        scores = semantic_scores(predictions, references, num_classes)
    unused = {f"unused groups, stage {stage}": u.unused / u.groups for stage, u in enumerate(use, 1)}
    return {**scores, **unused}
