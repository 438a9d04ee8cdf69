"""How good a network is on the samples that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from segmentation.metrics import instance_scores, semantic_scores
from segmentation.pairs import Sample
from segmentation.prediction import GroupUse, Predictor, add_use
from segmentation.processes import Processes

MAIN_SCORES = {"semantic": "mean IoU", "instances": "AP@0.5"}  # what decides which checkpoint is the best


def validate(
    predictor: Predictor,
    samples: Sequence[Sample],
    num_classes: int,
    processes: Processes,
    on_round: Callable[[int], None],
) -> dict[str, Any]:
    """Scores of whole images, and the share of groups that nobody prefers, per stage.

    Processes share the samples out; all of them have the scores of all samples.

    Args:
        predictor: the network, which this process must have whole, and how it looks at images.
        samples: with reference labels.
        num_classes: of semantic labels.
        processes: that take part.
        on_round: told by all processes, after each of them had a sample, how many samples that were.
    """
    mine = []
    for start in range(0, len(samples), processes.size):
        part = samples[start : start + processes.size]
        if processes.rank < len(part):
            sample = part[processes.rank]
            mine.append(predictor(sample.image, sample.spacing))
        on_round(len(part))
    shares = processes.gather(mine)
    predicted = [shares[i % processes.size][i // processes.size] for i in range(len(samples))]

    def judge() -> dict[str, Any]:
        labels, references = [each.labels for each in predicted], [sample.labels for sample in samples]
        if predictor.task == "instances":
            return instance_scores(labels, references)
        return semantic_scores(labels, references, num_classes)

    use: list[GroupUse] = []
    for each in predicted:
        use = add_use(use, each.use)
    unused = {f"unused groups, stage {stage}": u.unused / u.groups for stage, u in enumerate(use, 1)}
    return {**processes.first(judge), **unused}
