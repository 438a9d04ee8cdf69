"""Instances made of candidates and classes of pixels."""

import math

import pytest
import torch
from model_cases import cut, image_of, make, padded
from spatial_grouping_attention.models import GroupingViT, PanopticSegments, SegmentationOutput, panoptic_segments
from spatial_grouping_attention.models import segments as module
from torch import Tensor

SIZE = (13, 10)


def sure_of(output: SegmentationOutput, labels: list[int]) -> tuple[SegmentationOutput, Tensor]:
    """Memberships made hard, classes of candidates and of their pixels certain; and whose the pixels are, from 0."""
    with torch.no_grad():
        for assignment in output.assignments:
            assignment.q.mul_(1e4)  # type: ignore[attr-defined]
    wanted = torch.tensor([labels] * len(output.logits))
    share, owners = output.mask_logits.max(1)
    owners = owners.where(share > -0.1, -1)
    pixels = torch.where(owners >= 0, wanted.gather(1, owners.flatten(1).clamp(min=0)).view_as(owners) % 3, 0)
    output.class_logits = 30 * torch.nn.functional.one_hot(wanted, 4).double()
    output.logits = torch.nn.functional.one_hot(pixels, 3).movedim(-1, 1).double()
    return output, owners


def network(**options: object) -> GroupingViT:
    """With one head, memberships are hard when that one's are."""
    settings = {"head": "panoptic", "num_candidates": 4, "stem_stride": 1, "compactness": None, "num_heads": (1, 1, 1)}
    return make(**{**settings, **options})


def same_partition(one: Tensor, other: Tensor) -> bool:
    """Whether two maps part the pixels alike, whatever the numbers; 0 is nobody in both."""
    pairs = torch.stack([one.flatten(), other.flatten()], 1).unique(dim=0)
    return all(len(pairs) == len(pairs[:, i].unique()) for i in (0, 1)) and bool(
        ((pairs == 0).all(1) == (pairs == 0).any(1)).all()
    )


def test_what_is_certain_is_found() -> None:
    """Two things and a third of another class; the fourth candidate is no object."""
    output, owners = sure_of(network()(image_of(SIZE)), [1, 2, 1, 3])
    for i, found in enumerate(panoptic_segments(output)):
        truth = (owners[i] + 1).where((owners[i] >= 0) & (owners[i] < 3), 0)
        assert same_partition(found.instances, truth)
        for number, label in enumerate(found.classes.tolist(), 1):
            assert truth[found.instances == number].unique().tolist() in ([[1], [3]] if label == 1 else [[2]])
        assert torch.equal(found.semantic, output.logits[i].argmax(0))
        assert found.scores.min() > 0.999
    for found in panoptic_segments(output, things=[2]):
        assert found.classes.tolist() == [2]
        assert torch.equal(found.instances > 0, found.semantic == 2)


def found_in(output: SegmentationOutput) -> list[PanopticSegments]:
    return panoptic_segments(output, min_score=0.2, min_overlap=0.0)


def test_only_pixels_of_things_have_instances() -> None:
    images = found_in(network(num_candidates=100)(image_of(SIZE)))
    assert any(found.instances.any() for found in images)
    for found in images:
        assert (found.semantic[found.instances > 0] > 0).all()
        assert sorted(set(found.instances.flatten().tolist()) - {0}) == list(range(1, len(found.classes) + 1))
        assert (found.classes > 0).all()
        assert (found.scores.diff() <= 0).all()
        assert (found.scores > 0.2).all()


def test_order_of_candidates_changes_nothing() -> None:
    output = network(num_candidates=100)(image_of(SIZE))
    want = found_in(output)
    output.candidates, output.class_logits = output.candidates.flip(1), output.class_logits.flip(1)
    for got, wanted in zip(found_in(output), want, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))


def test_padding_changes_nothing() -> None:
    model = network(num_candidates=100)
    want = found_in(model(image_of(SIZE)))
    wide, valid = padded(image_of(SIZE), (19, 17), math.nan)
    for got, wanted in zip(found_in(model(wide, valid=valid)), want, strict=True):
        assert torch.equal(cut(got.instances[None, None], SIZE)[0, 0], wanted.instances)
        assert torch.equal(got.classes, wanted.classes)
        assert not got.instances[~valid[0]].any()
        assert (got.semantic[~valid[0]] == -1).all()


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_images_without_objects_have_none(ndim: int) -> None:
    output = make(ndim, head="panoptic")(image_of((9, 8, 7)[:ndim]))
    output.class_logits = torch.full_like(output.class_logits, -9.0)
    output.class_logits[..., -1] = 9.0
    for found in panoptic_segments(output):
        assert not found.instances.any()
        assert found.classes.shape == found.scores.shape == (0,)


def test_a_fragment_goes_to_the_object_it_was_taken_from() -> None:
    """The second gets a pixel that it holds weakly, the third what it holds, the fourth a bit of much else."""
    members = torch.tensor(
        [
            [0.90, 0.90, 0.35, 0.05, 0.0, 0.0, 0.0],
            [0.05, 0.05, 0.40, 0.05, 0.0, 0.0, 0.0],
            [0.00, 0.00, 0.20, 0.80, 0.0, 0.0, 0.0],
            [0.00, 0.00, 0.00, 0.05, 0.9, 0.9, 0.9],
        ]
    )
    inside = torch.tensor([True, True, True, True, True, False, False])
    scores = torch.ones(4)
    assert module._owners(members, scores, inside, 0.5, 0).tolist() == [0, 0, 0, 2, -1, -1, -1]
    assert module._owners(members, scores, inside, 0.3, 0).tolist() == [0, 0, 0, 2, 3, -1, -1]
    assert module._owners(members, scores, inside, 0.0, 0).tolist() == [0, 0, 1, 2, 3, -1, -1]
    assert module._owners(members, scores, inside, 0.0, 2).tolist() == [0, 0, 0, -1, -1, -1, -1]
    assert module._owners(members[1:2], scores[:1], inside, 0.5, 0).tolist() == [-1] * 7
    # A higher score wins where memberships are alike.
    assert module._owners(members, torch.tensor([0.5, 1.0, 1.0, 1.0]), inside, 0.0, 0)[2] == 1


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"min_score": 1.5}, ValueError, r"min_score must be in .0, 1.; got 1.5"),
        ({"min_overlap": "half"}, TypeError, "min_overlap must be a real number; got 'half'"),
        ({"min_size": -1}, ValueError, "min_size must be at least 0; got -1"),
        ({"things": [1, 3]}, ValueError, r"things must be below the number of classes, 3; got .1, 3."),
        ({"things": [-1]}, ValueError, "things must be at least 0; got -1"),
        ({"things": [1.0]}, TypeError, "things must be an int; got 1.0"),
    ],
)
def test_wrong_arguments_are_refused(keywords: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        panoptic_segments(network()(image_of(SIZE)), **keywords)


def test_outputs_without_candidates_are_refused() -> None:
    with pytest.raises(ValueError, match="output must come from a network with num_candidates; got one without"):
        panoptic_segments(make()(image_of(SIZE)))
