"""Plans of strides, and what segmentation networks refuse."""

import math

import pytest
import torch
from grouping_cases import assert_near
from model_cases import cut, image_of, make, padded
from spatial_grouping_attention.models import grouping_vit_nano, plan


def test_plan_of_isotropic_voxels() -> None:
    assert plan(1.0, (64, 64), 3) == (((2, 2),) * 3, ((3, 3),) * 3)
    assert plan((1.0, 1.5), (64, 64), 2).strides == ((2, 2), (2, 2))
    assert plan(0.3, 64, 1) == (((2,),), ((3,),))


def test_plan_lets_coarse_axes_wait() -> None:
    strides, kernels = plan((5.0, 0.5, 0.5), (30, 256, 256), 5)
    assert strides == ((1, 2, 2), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2))
    assert kernels == ((1, 3, 3), (1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3))
    # A single slice has no spacing that others could wait for, and nothing to coarsen.
    assert plan((0.1, 1.0, 1.0), (1, 64, 64), 2).strides == ((1, 2, 2), (1, 2, 2))
    assert plan(1.0, (2, 64), 2).strides == ((2, 2), (1, 2))


@pytest.mark.parametrize("ratio", [1.0, 1.9, 2.0, 3.0, 10.0])
def test_planned_voxels_become_isotropic(ratio: float) -> None:
    spacing = [ratio, 1.0]
    for stride in plan(spacing, (1024, 1024), 6).strides:
        before = max(spacing) / min(spacing)
        spacing = [d * s for d, s in zip(spacing, stride, strict=True)]
        assert max(spacing) / min(spacing) <= max(before, 2.0)
    assert max(spacing) / min(spacing) < 2.0


def test_a_planned_network_runs() -> None:
    steps = plan((5.0, 0.5, 0.5), (6, 20, 20), 3).with_stem(1)
    assert steps == ((1, 2, 2), ((1, 2, 2), (1, 2, 2)), ((1, 3, 3), (1, 3, 3)))
    model = make(3, spacing=(5.0, 0.5, 0.5), **steps._asdict())  # type: ignore[attr-defined]
    image = image_of((3, 11, 9))
    output = model(image)
    assert [grid.shape for grid in output.grids] == [(3, 6, 5), (3, 3, 3), (3, 2, 2)]
    wide, valid = padded(image, (5, 14, 18), math.nan)
    assert_near(cut(model(wide, valid=valid).logits, (3, 11, 9)), output.logits, 1e-10)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"dims": (8,)}, ValueError, "dims must be one int per stage, two stages or more; got"),
        ({"dims": 8}, TypeError, "dims must be one int per stage, two stages or more; got 8"),
        ({"depths": (1, 1)}, ValueError, "depths must be 3 ints, one per stage; got"),
        ({"depths": (1, -1, 1)}, ValueError, "depths.1. must be at least 0; got -1"),
        ({"num_heads": (2, 2, 3)}, ValueError, "dim must be divisible by num_heads; got"),
        ({"num_heads": (2, 2, 16)}, ValueError, "even"),
        ({"stem_stride": 0}, ValueError, "stem_stride must be at least 1; got 0|stem_stride.* must be at least 1"),
        ({"strides": 3}, ValueError, "strides.0..0. must be one of 1, 2; got 3"),
        ({"strides": (2, 2, 2)}, ValueError, "strides must be an int or 2 entries, one per grouping; got"),
        ({"strides": "2"}, ValueError, "strides must be an int or 2 entries"),
        ({"strides": 2.0}, TypeError, "strides must be an int or 2 entries, one per grouping; got 2.0 of type float"),
        ({"kernels": 2}, ValueError, "kernels.0. must be odd on every axis; got"),
        ({"window": 4}, ValueError, "window must be odd on every axis; got"),
        ({"grouping_window": 2}, ValueError, "grouping_window must be odd on every axis; got"),
        ({"grouping": ("sparse",)}, ValueError, "grouping must be a name or 2 names, one per grouping; got"),
        ({"grouping": ("sparse", "full")}, ValueError, "grouping.1. must be one of 'sparse', 'dense'; got 'full'"),
        ({"grouping": "full"}, ValueError, "grouping must be one of 'sparse', 'dense'; got 'full'"),
        ({"grouping": 3}, TypeError, "grouping must be a name or 2 names, one per grouping; got 3"),
        ({"downsample": "pool"}, ValueError, "downsample must be one of 'group', 'conv'; got 'pool'"),
        ({"head": "unet"}, ValueError, "head must be one of 'native', 'fused', 'bilinear', .*; got 'unet'"),
        ({"mlp_ratio": 0.0}, ValueError, "mlp_ratio must be greater than 0; got 0.0"),
        ({"mlp": "conv", "mlp_ratio": 0.0}, ValueError, "mlp_ratio must be greater than 0; got 0.0"),
        ({"mlp": "conv", "mlp_ratio": "x"}, TypeError, "mlp_ratio must be a real number; got 'x'"),
        ({"mlp": "mix"}, ValueError, "mlp must be one of 'linear', 'conv'; got 'mix'"),
        ({"stem": "mlp"}, ValueError, "stem must be one of 'patch', 'conv'; got 'mlp'"),
        ({"head": "native", "downsample": "conv"}, ValueError, 'head must be "bilinear" or "fpn" where downsample'),
        ({"head": "panoptic", "downsample": "conv"}, ValueError, 'head must be "bilinear" .*; got "panoptic"'),
        ({"num_candidates": 0}, ValueError, "num_candidates must be at least 1; got 0"),
        ({"num_candidates": 9, "downsample": "conv"}, ValueError, "num_candidates must be None where .*; got 9"),
        ({"head_width": 0}, ValueError, "head_width must be at least 1; got 0"),
        ({"drop_path": 1.0}, ValueError, r"drop_path must be in \[0, 1\); got 1.0"),
        ({"checkpoint": "all"}, TypeError, "checkpoint must be True or False; got 'all'"),
        ({"spacing": torch.ones(2)}, TypeError, "spacing must be a number or one number per axis; got a tensor"),
        ({"spacing": 0.0}, ValueError, "spacing.* must be greater than 0; got 0"),
        ({"compactness": -1.0}, ValueError, "compactness must be greater than 0; got -1"),
        ({"windows": 7}, TypeError, r"GroupingViT\(\) got an unexpected keyword argument 'windows'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_options_are_refused(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(**changes)


@pytest.mark.parametrize("downsample", ["group", "conv"])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("iters", -1, "iters must be at least 0; got -1"),
        ("grouping_mlp_ratio", 0.0, "grouping_mlp_ratio must be greater than 0; got 0.0"),
        ("compactness", 0.0, "compactness must be greater than 0; got 0.0"),
        ("temperature", "hot", "temperature must be one of 'fixed', 'learned'; got 'hot'"),
        ("mlp_ratio", -1.0, "mlp_ratio must be greater than 0; got -1.0"),
    ],
)
def test_options_are_judged_where_nothing_uses_them(downsample: str, name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(depths=(0, 0, 0), downsample=downsample, **{name: value})


@pytest.mark.parametrize(("position", "value"), [(0, 4), (1, 0), (2, 0)])
def test_wrong_sizes_of_the_problem_are_refused(position: int, value: int) -> None:
    arguments = [2, 1, 3]
    arguments[position] = value
    with pytest.raises(ValueError, match=f"must be .*; got {value}"):
        grouping_vit_nano(*arguments, device="meta")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(1, 2, 8),), ValueError, "image must .*B, C=2, height, width.*; got"),
        ((torch.zeros(1, 2, 0, 8),), ValueError, "size of the image.0. must be at least 1; got 0"),
        ((torch.zeros(1, 3, 8, 8),), ValueError, "image must .*C=2.*; got"),
        ((torch.zeros(1, 2, 8, 8, dtype=torch.uint8),), TypeError, "image must be float64, .*; got torch.uint8"),
        (("image",), TypeError, "image must be a torch.Tensor; got str"),
        ((torch.zeros(1, 2, 8, 8), (1.0, 0.0)), ValueError, "spacing.1. must be greater than 0; got 0"),
        ((torch.zeros(1, 2, 8, 8), (1.0, 1.0, 1.0)), ValueError, "spacing must have one value for each of the 2 axes"),
        ((torch.zeros(1, 2, 8, 8), torch.ones(3, 2)), ValueError, "spacing must have the batch size 1 .*; got 3"),
        ((torch.zeros(1, 2, 8, 8), None, torch.ones(1, 8, 8)), TypeError, "valid must be boolean; got torch.float32"),
        (
            (torch.zeros(1, 2, 8, 8), None, torch.ones(1, 64, dtype=torch.bool)),
            ValueError,
            r"valid must have shape \(1, 8, 8\) \(B, \*size\); got \(1, 64\)",
        ),
    ],
)
def test_wrong_images_are_refused(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()(*arguments)


@pytest.mark.parametrize("levels", [-1, 2, 1.0])
def test_wrong_plans_are_refused(levels: object) -> None:
    with pytest.raises((ValueError, TypeError), match=r"levels must be .*; got"):
        plan(1.0, (8, 8), 2).with_stem(levels)
    for arguments in ((0.0, (8, 8), 1), (1.0, (8, 0), 1), ((1.0,), (8, 8), 1), (1.0, (8, 8), 0)):
        with pytest.raises(ValueError, match=r"must .*; got"):
            plan(*arguments)
