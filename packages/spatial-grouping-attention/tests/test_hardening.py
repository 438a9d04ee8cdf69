"""Faults that fuzzing found (``nox -s fuzz``), each told in words before anything is computed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from grouping_cases import make_case
from layer_cases import VARIANTS, make_layer
from RoSE import Grid
from spatial_grouping_attention import DeformableAssignment, Neighbourhood, WindowedSelfAttention, compose, functional
from spatial_grouping_attention.assignment import Assignment
from spatial_grouping_attention.models import (
    GroupingViT,
    SegmentationOutput,
    SetMatchingLoss,
    objects_of,
    panoptic_segments,
)
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

SEEN = Neighbourhood((6,), (3,), 2, 3, 1, 3)


@pytest.mark.parametrize("name", ["stride", "kernel_size", "padding", "window", "dilation"])
@pytest.mark.parametrize("number", [2**31 + 1, 2**63 + 1, 2**70 + 1])
def test_relations_stay_within_64_bits(name: str, number: int) -> None:
    entries = {"stride": 2, "kernel_size": 3, "padding": 1, "window": 3, "dilation": 1, name: number}
    with pytest.raises(ValueError, match=f"{name} must be at most 2147483647; got {number}"):
        Neighbourhood((6,), (3,), **entries)


def test_the_widest_relation_is_served() -> None:
    widest = Neighbourhood((6,), (3,), 2, 3, 1, 2**31 - 1, 2**31 - 1)
    case = make_case(widest).to(torch.float32)
    out, _ = functional.grouping_attention(case.q, case.k, case.v, widest)
    assert widest.mask().sum() == 6  # of the dilated window only its middle is there
    assert out.isfinite().all()


def members(variant: str) -> Assignment:
    return VARIANTS[variant](8, 1, 3, 2)(torch.randn(1, 6, 8)).assignment


@pytest.mark.parametrize("wrong", ["yes", 1, None])
@pytest.mark.parametrize("variant", ["sparse", "deformable", "chain"])
def test_what_is_no_flag(variant: str, wrong: object) -> None:
    assignment = compose([members("sparse")]) if variant == "chain" else members(variant)
    assert isinstance(assignment, DeformableAssignment) == (variant == "deformable")
    for name in ("nested", "per_head"):
        with pytest.raises(TypeError, match=f"{name} must be True or False; got"):
            assignment.labels(**{name: wrong})
    with pytest.raises(TypeError, match="per_head must be True or False; got"):
        assignment.matrix(per_head=wrong)
    for method in (assignment.usage, assignment.boundaries):
        with pytest.raises(TypeError, match="nested must be True or False; got"):
            method(nested=wrong)


@pytest.mark.parametrize("wrong", [None, 3, "alone"])
def test_chains_of_nothing_that_could_be_one(wrong: object) -> None:
    given = members("sparse") if wrong == "alone" else wrong
    with pytest.raises(TypeError, match=f"^assignments must be a sequence of Assignments; got {type(given).__name__}$"):
        compose(given)


@pytest.mark.parametrize("variant", [*VARIANTS, "window"])
def test_a_grid_that_does_not_fit_is_called_what_the_caller_calls_it(variant: str) -> None:
    layer = WindowedSelfAttention(8, 2, 1) if variant == "window" else VARIANTS[variant](8, 1, 3, 2)
    name = "grid" if variant == "window" else "input_grid"
    with pytest.raises(ValueError, match=rf"^{name} must have one point for each of the 6 tokens; got \(5,\)"):
        layer(torch.randn(1, 6, 8), **{name: Grid(5)})


def found() -> SegmentationOutput:
    torch.manual_seed(0)
    network = GroupingViT(1, 1, 2, dims=(4, 4), depths=(0, 0), num_heads=(1, 1), stem_stride=1, num_candidates=2)
    return network(torch.randn(1, 1, 6))


OBJECTS = (torch.zeros(1, dtype=torch.int64), torch.ones(1, 6, dtype=torch.bool))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: SetMatchingLoss(2)(torch.ones(1, 2, 6), [OBJECTS]), "output must be a SegmentationOutput; got Tensor"),
        (lambda: panoptic_segments({"logits": 1}), "output must be a SegmentationOutput; got dict"),
        (lambda: SetMatchingLoss(2)(found(), None), "targets must be a list of Objects, .*; got NoneType"),
        (lambda: SetMatchingLoss(2)(found(), [OBJECTS[0]]), r"targets\[0\] must be Objects, .*; got Tensor"),
        (lambda: SetMatchingLoss(2)(found(), [(*OBJECTS, 1)]), r"targets\[0\] must be Objects, .*; got tuple"),
        (lambda: panoptic_segments(found(), things=1), "things must be a list of classes; got 1"),
        (lambda: found().memberships().sum([1.0]), "values must be a torch.Tensor; got list"),
        (lambda: found().memberships().sum(torch.ones(1, 1, 6).long()), "values must be float64, .*int64"),
    ],
)
def test_what_is_no_output_and_no_target(call: Callable[[], object], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        call()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: SetMatchingLoss(3)(found(), [OBJECTS]), "num_classes must be the network's, 2; got 3"),
        (lambda: objects_of(OBJECTS[0][None], 2**70), "classes must be at most 9223372036854775807; got"),
        (lambda: panoptic_segments(found(), min_size=2**70), "min_size must be at most 9223372036854775807; got"),
    ],
)
def test_numbers_that_do_not_fit(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("shape", [(1, 1, 5), (2, 1, 6), (1, 6), (1, 1, 6, 1)])
def test_values_of_other_pixels(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"values must have shape \(B=1, C, width=6\); got"):
        found().memberships().sum(torch.ones(shape))


@pytest.mark.parametrize("number", [1e39, -1e300])
def test_scales_that_logits_cannot_hold(number: float) -> None:
    case = make_case(SEEN).to(torch.float32)
    with pytest.raises(ValueError, match=r"scale must be in \[-3.40282e\+38, 3.40282e\+38\]; got"):
        functional.assign(case.q, case.k, case.q, SEEN, scale=number)


@pytest.mark.parametrize(("number", "dtype"), [(1e39, None), (1e5, torch.float16)])
@pytest.mark.parametrize("variant", [*VARIANTS, "window"])
def test_compactness_that_its_parameter_cannot_hold(variant: str, number: float, dtype: torch.dtype | None) -> None:
    make, sizes = (WindowedSelfAttention, (8, 2, 1)) if variant == "window" else (VARIANTS[variant], (8, 1, 3, 2))
    with pytest.raises(ValueError, match=r"compactness must be in \[0, .*\]; got"):
        make(*sizes, compactness=number, dtype=dtype)


@pytest.mark.parametrize("name", ["class_weight", "mask_weight", "dice_weight", "no_object_weight"])
def test_weights_that_losses_cannot_hold(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be in \[0, 3.40282e\+38\]; got 1e\+300"):
        SetMatchingLoss(2, **{name: 1e300})


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [x.untyped_storage().nbytes() for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.size = max([self.size, *made])
        return result


@pytest.mark.parametrize("members", [*VARIANTS, "chain"])
def test_matrices_that_are_too_large_are_refused_before_they_are_made(members: str) -> None:
    first, second = make_layer("sparse" if members == "chain" else members), make_layer("dense")
    output = first(torch.randn(3, 96, 8), 1.0, (8, 12))
    assignment = output.assignment
    if members == "chain":
        assignment = compose([assignment, second(output.x_out, input_grid=output.grid).assignment])
    size = 3 * 2 * 96 * assignment.num_groups * 4  # of three samples and two heads, whose mean is taken
    assert assignment.matrix(max_bytes=size).nbytes == size // 2
    with Largest() as made:
        for asked in ({}, {"per_head": True})[: 1 + (members != "chain")]:
            with pytest.raises(
                ValueError,
                match=rf"^the matrices .*max_bytes = {size - 1} bytes; got {size} bytes for 96 .* do without",
            ):
                assignment.matrix(max_bytes=size - 1, **asked)
    assert made.size == 0
    with pytest.raises(ValueError, match="max_bytes must be at least 1; got 0"):
        assignment.matrix(max_bytes=0)
