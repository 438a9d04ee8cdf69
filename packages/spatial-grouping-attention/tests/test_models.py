"""Segmentation networks: any size, any spacing, no influence of padding, and classes carried by memberships alone."""

import inspect
import io
import itertools
import math

import pytest
import torch
from grouping_cases import assert_near
from model_cases import LARGER, SIZES, SPACINGS, cut, image_of, make, padded
from RoSE import Grid
from spatial_grouping_attention import Assignment, compose
from spatial_grouping_attention.models import (
    GroupingViT,
    SegmentationOutput,
    grouping_vit_base,
    grouping_vit_large,
    grouping_vit_nano,
    grouping_vit_tiny,
)
from spatial_grouping_attention.models.stage import is_slow_with_channels_last
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

# Every way from pixels to features and back, as (stem, downsample, head).
WAYS = [
    ("patch", "group", "native"),
    ("conv", "group", "fused"),
    ("patch", "conv", "bilinear"),
    ("conv", "conv", "fpn"),
    ("conv", "group", "bilinear"),
    ("patch", "group", "fpn"),
]
WAY = ("stem", "downsample", "head")


def rows_of(features: Tensor, many: tuple[int, ...], few: tuple[int, ...]) -> Tensor:
    """Rows of a grid -> of the grid at its start."""
    return features.unflatten(1, many)[(slice(None), *(slice(n) for n in few))].flatten(1, len(few))


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize(WAY, WAYS)
def test_shapes_and_grids_for_odd_sizes(ndim: int, stem: str, downsample: str, head: str) -> None:
    size, spacing = SIZES[ndim], SPACINGS[ndim]
    output = make(ndim, stem=stem, downsample=downsample, head=head)(image_of(size), spacing)
    assert output.logits.shape == (2, 3, *size)
    assert output.logits.isfinite().all()
    shape = tuple(-(-n // 2) for n in size)
    for i, (features, grid) in enumerate(zip(output.features, output.grids, strict=True)):
        assert grid.shape == shape
        assert grid.spacing == pytest.approx([2 ** (i + 1) * d for d in spacing])
        assert grid.origin == pytest.approx([0.5 * d for d in spacing])
        assert features.shape == (2, math.prod(shape), (8, 12, 16)[i])
        shape = tuple(-(-n // 2) for n in shape)
    assert len(output.assignments) == (2 if downsample == "group" else 0)


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 9), (3, 2)])
@pytest.mark.parametrize(WAY, WAYS)
def test_the_smallest_images(size: tuple[int, int], stem: str, downsample: str, head: str) -> None:
    output = make(stem=stem, downsample=downsample, head=head, stem_stride=4)(image_of(size))
    assert output.logits.shape == (2, 3, *size)
    assert output.logits.isfinite().all()


def gradients(model: GroupingViT, logits: Tensor) -> dict[str, Tensor]:
    """Of a sum of the logits in which no two classes or columns count alike."""
    model.zero_grad()
    weights = torch.linspace(-1, 2, logits[0].numel(), dtype=logits.dtype).reshape(logits.shape[1:])
    (weights * logits).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("fill", [0.0, 37.0, math.nan])
@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize(WAY, WAYS)
def test_padding_to_any_larger_size_changes_nothing(
    ndim: int, stem: str, downsample: str, head: str, fill: float
) -> None:
    mlp = {"patch": "linear", "conv": "conv"}[stem]
    model = make(ndim, stem=stem, mlp=mlp, downsample=downsample, head=head, stem_stride=3, temperature="learned")
    size, image = SIZES[ndim], image_of(SIZES[ndim])
    alone = model(image, SPACINGS[ndim])
    want = gradients(model, alone.logits)
    wide, valid = padded(image, LARGER[ndim], fill)
    together = model(wide, SPACINGS[ndim], valid)
    assert_near(cut(together.logits, size), alone.logits, 1e-10)
    assert not together.logits.masked_select(~valid.unsqueeze(1)).any()
    for got, features, many, few in zip(together.features, alone.features, together.grids, alone.grids, strict=True):
        assert_near(rows_of(got, many.shape, few.shape), features, 1e-10)
        assert_near(got.abs().sum(), rows_of(got, many.shape, few.shape).abs().sum(), 1e-10)
    for name, gradient in gradients(model, cut(together.logits, size)).items():
        assert_near(gradient, want[name], 1e-8, name)


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize(WAY, WAYS[:4])
def test_a_batch_of_different_sizes_is_the_samples_one_by_one(ndim: int, stem: str, downsample: str, head: str) -> None:
    model = make(ndim, stem=stem, mlp={"patch": "linear", "conv": "conv"}[stem], downsample=downsample, head=head)
    sizes = [SIZES[ndim], LARGER[ndim], tuple(n // 2 for n in LARGER[ndim])]
    spacing = torch.rand(3, ndim, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 0.5
    images = [image_of(size, batch=1, seed=i) for i, size in enumerate(sizes)]
    wide, valid = (torch.cat(x) for x in zip(*(padded(x, LARGER[ndim], math.nan) for x in images), strict=True))
    together = model(wide, spacing, valid)
    for i, (image, size) in enumerate(zip(images, sizes, strict=True)):
        assert_near(cut(together.logits[i : i + 1], size), model(image, spacing[i]).logits, 1e-10)
        assert_near(cut(together.logits[i : i + 1], size), model(image, spacing[i].tolist()).logits, 1e-10)


def test_a_masked_region_is_seen_by_nobody() -> None:
    model, image = make(), image_of((12, 14))
    valid = torch.rand(2, 12, 14, generator=torch.Generator().manual_seed(0)) > 0.4
    valid[:, 3:9, 2:10] = False
    want = model(image, valid=valid).logits
    other = torch.where(valid.unsqueeze(1), image, torch.full_like(image, math.inf))
    assert torch.equal(model(other, valid=valid).logits, want)
    assert not want.masked_select(~valid.unsqueeze(1)).any()


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_spacing_and_grid_refined_together_change_nothing(ndim: int) -> None:
    """With a stem that sees the same area, tokens are the same; pixels differ by where they lie between tokens."""
    coarse = make(ndim)
    state = coarse.state_dict()
    weight = state["stem.proj.weight"]
    for axis in range(2, weight.ndim):
        weight = weight.repeat_interleave(2, axis) / 2
    # Positions are scaled on the spacing of the pixels, so that of the fine network is half.
    fine = make(ndim, stem_stride=4, spacing=0.5)
    fine.load_state_dict({**state, "stem.proj.weight": weight})
    image = image_of(tuple(2 * n for n in SIZES[ndim]))
    refined = image
    for axis in range(2, image.ndim):
        refined = refined.repeat_interleave(2, axis)
    one, other = coarse(image, SPACINGS[ndim]), fine(refined, [d / 2 for d in SPACINGS[ndim]])
    for features, same in zip(one.features, other.features, strict=True):
        assert_near(same, features, 1e-10)
    for mine, theirs in zip(one.assignments, other.assignments, strict=True):
        assert torch.equal(mine.labels(), theirs.labels())
    # Half a step between tokens apart at most, where logits change linearly.
    averaged = other.logits
    for axis in range(2, image.ndim):
        averaged = averaged.unflatten(axis, (-1, 2)).mean(axis + 1)
    steps = max(one.logits.diff(dim=axis).abs().max().item() for axis in range(2, image.ndim))
    assert (averaged - one.logits).abs().max().item() <= 0.5 * ndim * steps


def test_units_change_nothing_and_spacing_does() -> None:
    """Millimetres or micrometres, as long as pixels are said in the units of the network."""
    image = image_of((12, 10))
    millimetres, micrometres = make(spacing=(1.0, 2.0)), make(spacing=(1000.0, 2000.0))
    want = millimetres(image, (1.0, 2.0)).logits
    assert_near(micrometres(image, (1000.0, 2000.0)).logits, want, 1e-10)
    assert_near(millimetres(image).logits, want, 1e-12)
    assert (millimetres(image, (1.0, 1.5)).logits - want).abs().max() > 1e-3 * want.abs().max()
    reference = make(spacing=(7.0, 9.0), reference_spacing=(1.0, 2.0))
    assert_near(reference(image, (1.0, 2.0)).logits, want, 1e-12)


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("grouping", [None, "sparse", ("dense", "sparse")])
def test_pixels_are_convex_combinations_of_groups(ndim: int, grouping: str | tuple[str, ...] | None) -> None:
    model = make(ndim, grouping=grouping)
    output = model(image_of(SIZES[ndim]), SPACINGS[ndim])
    ones = torch.ones(1, 1, dtype=torch.float64)
    for assignment in output.assignments:
        total = assignment.matrix().sum(-1)
        assert_near(total, ones.expand_as(total), 1e-12)
    logits = model.head.mlp(output.features[-1])
    for bound, sign in ((logits.amax(1), 1), (logits.amin(1), -1)):
        assert (sign * (bound - output.logits.flatten(2).transpose(1, 2).movedim(1, 0)) > -1e-12).all()
    # Where pixels are tokens, they are the chain's very own.
    model = make(ndim, grouping=grouping, stem_stride=1)
    output = model(image_of(SIZES[ndim]), SPACINGS[ndim])
    carried = compose(output.assignments).upsample(model.head.mlp(output.features[-1]))
    assert_near(output.logits.flatten(2).transpose(1, 2), carried, 1e-12)


@pytest.mark.parametrize(("head", "stride"), [("bilinear", (2, 2)), ("fpn", (2, 2)), ("fpn", (3, 1))])
def test_uniform_logits_stay_uniform(head: str, stride: tuple[int, int]) -> None:
    """Interpolation makes nothing up: the same everywhere stays the same up to the last, partial patch.

    In a pyramid every patch says of its pixels what every other says of its own.
    """
    model = make(downsample="conv", head=head, stem_stride=stride)
    last = model.head.mlp.fc2 if head == "bilinear" else model.head.classify
    with torch.no_grad():
        last.weight.zero_()
    wide, valid = padded(image_of((13, 10)), (19, 17), math.nan)
    logits = cut(model(wide, valid=valid).logits, (13, 10))
    patch = last.bias.reshape(3, *((1, 1) if head == "bilinear" else stride))
    want = patch.tile(1, 13, 10)[:, :13, :10]
    assert_near(logits, want.expand_as(logits), 1e-12)


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize(WAY, WAYS)
def test_every_parameter_has_a_gradient(ndim: int, stem: str, downsample: str, head: str) -> None:
    model = make(ndim, stem=stem, downsample=downsample, head=head, temperature="learned").train()
    model(image_of(LARGER[ndim])).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize(
    ("preset", "millions"), [(grouping_vit_tiny, 29.1), (grouping_vit_base, 95.8), (grouping_vit_large, 215.4)]
)
def test_presets_have_the_published_number_of_parameters(preset, millions: float) -> None:
    model = preset(device="meta")
    count = sum(p.numel() for name, p in model.named_parameters() if "head" not in name)
    assert count / 1e6 == pytest.approx(millions, rel=0.02)
    assert all(("head" in name) == name.startswith("head.") for name, _ in model.named_parameters())


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_nano_is_small(ndim: int) -> None:
    count = sum(p.numel() for p in grouping_vit_nano(ndim, 1, 4, device="meta").parameters())
    assert 0.2e6 < count < 0.6e6


@pytest.mark.parametrize("preset", [grouping_vit_nano, grouping_vit_tiny, grouping_vit_base, grouping_vit_large])
def test_signatures_of_presets_are_what_they_do(preset) -> None:
    shown = inspect.signature(preset).parameters
    assert {p.kind for p in shown.values()} <= {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    assert list(shown) == list(inspect.signature(GroupingViT).parameters)
    model = preset(device="meta")
    assert (model.dims, model.depths, model.num_heads) == tuple(
        shown[name].default for name in ("dims", "depths", "num_heads")
    )
    with pytest.raises(TypeError, match="unexpected keyword argument 'windows'"):
        preset(windows=3)


def test_keywords_win_over_presets() -> None:
    model = grouping_vit_nano(2, 1, 4, depths=(1, 1, 1), downsample="conv", head="fpn", head_width=16)
    assert model.depths == (1, 1, 1)
    assert model(torch.randn(1, 1, 20, 17)).logits.shape == (1, 4, 20, 17)


def test_the_output_is_a_dataclass_a_mapping_and_a_pytree() -> None:
    output = make()(image_of((13, 10)), torch.ones(2, 2, dtype=torch.float64))
    fields = ["logits", "features", "assignments", "grids", "stem_stride", "valid", "candidates", "class_logits"]
    assert list(output) == fields
    assert output["logits"] is output.logits
    assert SegmentationOutput({**output}).grids is output.grids
    with pytest.raises(TypeError, match="must have the keys"):
        SegmentationOutput({"logits": output.logits})
    doubled = pytree.tree_map_only(Tensor, lambda x: 2 * x if x.is_floating_point() else x, output)
    assert torch.equal(doubled.logits, 2 * output.logits)
    assert torch.equal(doubled.grids[1].spacing, 2 * output.grids[1].spacing)
    assert all(isinstance(assignment, Assignment) for assignment in doubled.assignments)
    assert not output.detach().features[0].requires_grad
    saved = io.BytesIO()
    torch.save(output.detach(), saved)
    saved.seek(0)
    loaded = torch.load(saved)
    assert isinstance(loaded, SegmentationOutput)
    assert loaded.grids == output.grids


def test_a_state_dict_makes_the_same_network() -> None:
    model, other, image = make(seed=0), make(seed=1), image_of((9, 11))
    assert not torch.equal(model(image).logits, other(image).logits)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(image).logits, other(image).logits)
    narrow = make(dtype=torch.float32)
    assert {p.dtype for p in narrow.parameters()} == {torch.float32}


def test_a_grouping_network_starts_as_its_twin() -> None:
    """What a grouping adds to its strided convolution is left out in the beginning, and learns to come in."""
    network = GroupingViT(2, 2, 3, dims=(8, 16), depths=(1, 1), num_heads=(2, 2), dtype=torch.float64)
    twin = GroupingViT(2, 2, 3, dims=(8, 16), depths=(1, 1), num_heads=(2, 2), downsample="conv", dtype=torch.float64)
    state = network.state_dict()
    for name in ("proj", "norm"):
        was = f"downsamples.0.layer.{'proposal' if name == 'proj' else 'norm_proposal'}"
        state.update({f"downsamples.0.{name}.{p}": state[f"{was}.{p}"] for p in ("weight", "bias")})
    twin.load_state_dict({name: value for name, value in state.items() if ".layer." not in name})
    image = image_of((40, 33))
    assert_near(network(image).features[1], twin(image).features[1], 1e-12)
    network(image).logits.square().sum().backward()
    assert network.downsamples[0].layer.norm_attention.weight.grad.any()


def test_a_stage_without_blocks_passes_tokens_on() -> None:
    model, image = make(depths=(0, 1, 0), stem="conv", drop_path=0.2), image_of((13, 10))
    output = model(image)
    stem = model.stem(image, Grid((13, 10)), None)
    assert torch.equal(output.features[0], stem.x)
    assert output.logits.isfinite().all()


def test_stochastic_depth_rises_and_rests_in_evaluation() -> None:
    model = make(depths=(1, 2, 1), drop_path=0.3)
    rates = [block.drop_path.rate for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    image = image_of((9, 11))
    assert torch.equal(model(image).logits, model(image).logits)
    torch.manual_seed(0)
    runs = [model.train()(image).logits for _ in range(4)]
    assert any(not torch.equal(one, other) for one, other in itertools.pairwise(runs))


@pytest.mark.parametrize("mlp", ["linear", "conv"])
def test_checkpoints_keep_less_and_change_no_gradient(mlp: str) -> None:
    found = []
    for checkpoint in (False, True):
        model = make(mlp=mlp, drop_path=0.5, checkpoint=checkpoint).train()
        kept: list[int] = []
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.nbytes) or t, lambda t: t):
            output = model(image_of((13, 10)), valid=torch.rand(2, 13, 10) > 0.2)
        output.logits.square().sum().backward()
        found.append((sum(kept), output.logits, [p.grad for p in model.parameters()]))
    (much, *plain), (little, *recomputed) = found
    assert little < 0.7 * much
    for one, other in zip(*map(torch.utils._pytree.tree_leaves, (plain, recomputed)), strict=True):
        assert torch.equal(one, other)


def test_the_twin_differs_in_nothing_but_what_stands_between_stages() -> None:
    names = [
        {name for name, _ in make(downsample=way, head="bilinear").named_parameters() if "downsamples" not in name}
        for way in ("group", "conv")
    ]
    assert names[0] == names[1]


def test_reset_parameters_make_what_construction_makes() -> None:
    model = grouping_vit_nano(2, 1, 3, device="meta").to_empty(device="cpu")
    torch.manual_seed(0)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    fresh = grouping_vit_nano(2, 1, 3)
    for (name, got), want in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert got.isfinite().all(), name
        size, expected = (p.detach().square().mean().sqrt().item() for p in (got, want))
        assert size == pytest.approx(expected, rel=0.5, abs=0.05), name


def test_half_types_stay_close() -> None:
    torch.manual_seed(0)
    model, image = grouping_vit_nano(2, 1, 3), torch.randn(2, 1, 20, 17)
    valid = torch.ones(2, 20, 17, dtype=torch.bool)
    valid[:, 13:] = False
    want = model(image, valid=valid).logits
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(image, valid=valid).logits
    assert_near(logits.float(), want, 0.05)
    assert_near(model.bfloat16()(image.bfloat16(), valid=valid).logits.float(), want, 0.05)


@pytest.mark.parametrize(
    ("ndim", "dtype", "device", "slow"),
    [
        (3, torch.bfloat16, "cuda", True),
        (3, torch.float16, "cuda", True),
        (3, torch.float32, "cuda", False),
        (2, torch.bfloat16, "cuda", False),
        (3, torch.bfloat16, "cpu", False),
    ],
)
def test_channels_lie_last_but_where_a_gpu_would_take_them_one_by_one(
    ndim: int, dtype: torch.dtype, device: str, slow: bool
) -> None:
    with FakeTensorMode():
        image = torch.empty(2, 8, *(5,) * ndim, dtype=dtype, device=device)
        assert is_slow_with_channels_last(image) == slow


@pytest.mark.slow
def test_one_graph_for_compilers() -> None:
    model, image = make(dims=(8, 16), depths=(1, 1), num_heads=(2, 2)), image_of((9, 11))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(image)
    output = model(image)
    assert_near(compiled.logits, output.logits, 1e-12)
    assert compiled.grids == output.grids
