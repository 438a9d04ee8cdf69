"""Scores are those of the definitions: by hand, and beside libraries that have some of them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics import compute_panoptic_quality
from segmentation.instances import BACKGROUND, BORDER, INSIDE, instance_classes, separate
from segmentation.metrics import instance_scores, iou_matrix, match, semantic_scores
from skimage.segmentation import relabel_sequential
from torchmetrics.detection import PanopticQuality
from torchmetrics.segmentation import DiceScore

pytestmark = pytest.mark.training

SHAPES = st.sampled_from([(12, 15), (5, 8, 7)])


def rectangles(shape: tuple[int, ...], seed: int, count: int) -> np.ndarray:
    """Objects that lie over each other, numbered with gaps."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.int32)
    for number in rng.permutation(3 * count)[:count] + 1:
        corner = [rng.integers(0, n - 1) for n in shape]
        labels[tuple(slice(c, c + rng.integers(1, n // 2 + 1)) for c, n in zip(corner, shape, strict=True))] = number
    return labels


def one_hot(classes: np.ndarray, sharpness: float = 8.0) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.from_numpy(classes), 3).movedim(-1, 0) * sharpness


class TestSemanticScores:
    def test_by_hand(self):
        """Two images; the counts of both together make IoU and Dice."""
        predictions = np.array([[0, 0, 1, 1]]), np.array([[1, 1, 1, 1]])
        references = np.array([[0, 1, 1, 1]]), np.array([[1, 1, 0, 0]])
        scores = semantic_scores(predictions, references, 3)
        assert scores["IoU per class"][:2] == pytest.approx([1 / 4, 4 / 7])
        assert scores["Dice per class"][:2] == pytest.approx([2 / 5, 8 / 11])
        assert np.isnan(scores["IoU per class"][2])
        assert np.isnan(scores["Dice per class"][2])
        assert scores["mean IoU"] == pytest.approx((1 / 4 + 4 / 7) / 2)

    def test_a_class_that_was_only_predicted_is_wrong(self):
        scores = semantic_scores([np.array([[0, 2]])], [np.array([[0, 0]])], 3)
        assert scores["IoU per class"][::2] == [0.5, 0.0]
        assert scores["mean IoU"] == 0.25

    def test_boundary_is_the_mean_over_classes_then_images(self):
        left, right = (np.repeat([[0] * n + [1] * (12 - n)], 12, axis=0) for n in (6, 9))
        assert semantic_scores([left], [left], 2)["boundary F"] == 1.0
        assert semantic_scores([left], [right], 2)["boundary F"] == 0.0
        assert semantic_scores([left], [right], 2, tolerance=3)["boundary F"] == 1.0
        assert semantic_scores([left, right], [left, left], 2)["boundary F"] == 0.5
        # An image of one class has no boundary and does not count.
        assert semantic_scores([left, left * 0], [left, left * 0], 2)["boundary F"] == 1.0

    @given(SHAPES, st.integers(0, 999))
    @settings(max_examples=25, deadline=None)
    def test_dice_is_that_of_torchmetrics(self, shape, seed):
        rng = np.random.default_rng(seed)
        predictions, references = rng.integers(0, 4, (2, 3, *shape))
        dice = DiceScore(5, average="none", aggregation_level="global", input_format="index")
        dice.update(torch.from_numpy(predictions), torch.from_numpy(references))
        ours = semantic_scores(predictions, references, 5)["Dice per class"]
        assert np.allclose(ours, dice.compute().flatten().numpy(), equal_nan=True)

    def test_shapes_must_agree(self):
        with pytest.raises(ValueError, match=r"prediction 1 must have its reference's shape \(2, 3\); got \(3, 2\)"):
            semantic_scores([np.zeros((2, 3), int), np.zeros((3, 2), int)], [np.zeros((2, 3), int)] * 2, 2)
        with pytest.raises(ValueError, match="zip"):
            semantic_scores([np.zeros((2, 3), int)], [], 2)


class TestInstanceScores:
    def test_by_hand(self):
        """Four real objects of 10 pixels: one found whole, one to 8 pixels, one to 6, one not; one was invented."""
        reference, predicted = np.zeros((2, 12, 10), int)
        reference[0], reference[2], reference[4], reference[6] = 1, 2, 3, 9
        predicted[0], predicted[2, :8], predicted[4, :6], predicted[9] = 7, 1, 2, 3
        scores = instance_scores([predicted], [reference])
        assert scores["AP@0.5"] == scores["AP@0.5 pooled"] == 3 / (3 + 1 + 1)
        assert scores["AP@0.75"] == 2 / (2 + 2 + 2)
        assert scores["SQ"] == pytest.approx((1 + 0.8 + 0.6) / 3)
        assert scores["RQ"] == 3 / (3 + 0.5 + 0.5)
        assert scores["PQ"] == pytest.approx(scores["SQ"] * scores["RQ"])

    def test_mean_over_images_and_pooled(self):
        """One image with one object, found; one with three, of which none was found."""
        one = np.zeros((6, 6), int)
        one[0] = 1
        three = np.diag([1, 2, 3, 0, 0, 0])
        scores = instance_scores([one, three * 0], [one, three])
        assert scores["AP@0.5"] == 0.5
        assert scores["AP@0.5 pooled"] == 0.25

    def test_nothing_found_where_nothing_is(self):
        nothing, one = np.zeros((4, 4), int), np.eye(4, dtype=int)
        assert instance_scores([nothing, one], [nothing, one])["AP@0.5"] == 1.0
        assert all(np.isnan(score) for score in instance_scores([nothing], [nothing]).values())
        assert instance_scores([one], [nothing])["AP@0.5"] == 0.0
        with pytest.raises(ValueError, match="at least one image"):
            instance_scores([], [])

    @given(SHAPES, st.integers(0, 999))
    @settings(max_examples=40, deadline=None)
    def test_panoptic_quality_is_that_of_two_libraries(self, shape, seed):
        references = [rectangles(shape, seed + i, 6) for i in range(2)]
        # What moves by a pixel is found again, most of the time.
        predictions = [np.roll(reference, 1, 0) for reference in references]
        ours = instance_scores(predictions, references)
        quality = PanopticQuality(things={1}, stuffs={0}, return_per_class=True, return_sq_and_rq=True)
        counts = torch.zeros(4)
        for predicted, reference in zip(predictions, references, strict=True):
            both = [
                torch.from_numpy(relabel_sequential(labels)[0].astype(np.int64)) for labels in (predicted, reference)
            ]
            quality.update(*(torch.stack([(labels > 0).long(), labels], -1)[None] for labels in both))
            counts += compute_panoptic_quality(*both, remap=False, output_confusion_matrix=True)
        expected = quality.compute()[0].tolist()
        assert [np.nan_to_num(ours[name]) for name in ("PQ", "SQ", "RQ")] == pytest.approx(expected)
        true, false_positive, false_negative, overlap = counts.tolist()
        assert ours["PQ"] == pytest.approx(overlap / (true + (false_positive + false_negative) / 2), abs=1e-6)

    def test_half_is_enough_for_a_match_but_not_for_panoptic_quality(self):
        scores = instance_scores([np.array([[1, 1, 0]])], [np.array([[1, 0, 0]])])
        assert scores["AP@0.5"] == 1.0
        assert scores["PQ"] == 0.0

    @given(SHAPES, st.integers(0, 999))
    @settings(max_examples=25, deadline=None)
    def test_laws(self, shape, seed):
        one, other = (rectangles(shape, seed + i, 6) for i in range(2))
        same = instance_scores([one], [one])
        assert set(same.values()) == {1.0}
        scores, swapped = instance_scores([one], [other]), instance_scores([other], [one])
        for name in scores:
            assert scores[name] == pytest.approx(swapped[name], nan_ok=True)
        numbers = np.random.default_rng(seed).permutation(one.max() + 1) + 50
        renamed = np.where(one > 0, numbers[one], 0)
        for name, score in instance_scores([renamed], [other]).items():
            assert score == pytest.approx(scores[name], nan_ok=True)
        assert scores["AP@0.75"] <= scores["AP@0.5"]

    @given(SHAPES, st.integers(0, 999))
    @settings(max_examples=25, deadline=None)
    def test_overlaps(self, shape, seed):
        real, found = rectangles(shape, seed, 5), rectangles(shape, seed + 1, 4)
        numbers = [[n for n in np.unique(labels) if n] for labels in (real, found)]
        expected = [
            [((real == r) & (found == f)).sum() / ((real == r) | (found == f)).sum() for f in numbers[1]]
            for r in numbers[0]
        ]
        assert np.allclose(iou_matrix(found, real), expected)

    @pytest.mark.parametrize(
        ("overlaps", "threshold", "expected"),
        [
            # The best pair would leave two without a partner.
            ([[0.4, 0.3], [0.3, 0.0]], 0.3, 2),
            ([[0.4, 0.3], [0.3, 0.0]], 0.4, 1),
            ([[0.5]], 0.5, 1),
            ([[0.49999]], 0.5, 0),
            ([[0.3, 0.3, 0.3]], 0.3, 1),
        ],
    )
    def test_as_many_matches_as_possible(self, overlaps, threshold, expected):
        result = match(np.array(overlaps), threshold)
        assert result.true == expected
        assert result.false_negative == len(overlaps) - expected
        assert result.false_positive == len(overlaps[0]) - expected


class TestInstancesByClasses:
    def discs(self, dims: int, gap: int) -> np.ndarray:
        """Balls in a row that touch (a gap of 0) or do not, or the first of which covers the second one in part."""
        shape = (17,) * (dims - 1) + (50,)
        indices = np.indices(shape)
        labels = np.zeros(shape, np.int32)
        for number, middle in ((2, 8 + 12 + gap), (1, 8), (3, 40)):
            distance = sum((indices[axis] - 8) ** 2 for axis in range(dims - 1)) + (indices[-1] - middle) ** 2
            labels[distance < 6.5**2] = number
        return labels

    @pytest.mark.parametrize("gap", [-2, 0, 3])
    @pytest.mark.parametrize("dims", [2, 3])
    def test_objects_come_back(self, dims, gap):
        labels = self.discs(dims, gap)
        objects = separate(one_hot(instance_classes(labels)))
        assert objects.dtype == np.int32
        assert len(np.unique(objects)) == 4
        assert np.array_equal(objects > 0, labels > 0)
        assert instance_scores([objects], [labels])["AP@0.75"] == 1.0
        assert instance_scores([objects], [labels])["SQ"] > 0.97

    @pytest.mark.parametrize("dims", [2, 3])
    def test_classes(self, dims):
        labels = self.discs(dims, 0)
        classes = instance_classes(labels)
        assert classes.dtype == np.int64
        assert np.array_equal(classes == BACKGROUND, labels == 0)
        inside = np.where(classes == INSIDE, labels, 0)
        border = (classes == BORDER) & (labels > 0)
        for axis in range(dims):
            ahead, behind = np.delete(labels, 0, axis), np.delete(labels, -1, axis)
            differ = ahead != behind
            # Wherever the label changes, what is labelled on either side is border.
            assert not np.delete(inside, 0, axis)[differ].any()
            assert not np.delete(inside, -1, axis)[differ].any()
        assert {1, 2, 3} == set(np.unique(inside[inside > 0])) == set(np.unique(labels[border]))

    def test_thin_objects_are_inside_as_a_whole(self):
        labels = np.zeros((12, 12), int)
        labels[1] = 1
        labels[4:6] = 2
        labels[8, 3] = 3
        labels[10:, 8:] = 4
        classes = instance_classes(labels)
        for number in (1, 2, 3, 4):
            assert (classes[labels == number] == INSIDE).any()
        assert (classes[:9][labels[:9] > 0] == INSIDE).all()
        assert instance_scores([separate(one_hot(classes))], [labels])["AP@0.75"] == 1.0

    def test_the_end_of_the_image_is_no_border(self):
        assert (instance_classes(np.ones((5, 6), int)) == INSIDE).all()
        labels = np.repeat([[1, 1, 1, 2, 2, 2]], 5, axis=0)
        assert (instance_classes(labels) == [INSIDE, INSIDE, BORDER, BORDER, INSIDE, INSIDE]).all()

    def test_nothing(self):
        nothing = np.zeros((5, 6), int)
        assert not instance_classes(nothing).any()
        assert not separate(one_hot(instance_classes(nothing))).any()

    def test_border_without_an_inside_is_no_object(self):
        classes = np.zeros((9, 9), np.int64)
        classes[1:3, 1:3] = BORDER
        classes[5:8, 5:8] = BORDER
        classes[6, 6] = INSIDE
        objects = separate(one_hot(classes))
        assert np.array_equal(objects, np.where(np.indices((9, 9)).min(0) >= 5, classes > 0, 0))

    def test_the_saddle_between_two_insides_is_the_least_likely_one(self):
        inside = np.array([9.0, 9, 4, 3, 1, 5, 9, 9])
        logits = np.stack([np.full(8, -9.0), inside, np.full(8, 6.0)])[:, None]
        assert separate(logits).tolist() in ([[1, 1, 1, 1, 1, 2, 2, 2]], [[1, 1, 1, 1, 2, 2, 2, 2]])
