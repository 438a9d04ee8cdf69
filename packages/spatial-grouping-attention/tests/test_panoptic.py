"""Candidates of the panoptic head: which groups they are, their masks, and what padding does to them (nothing)."""

import copy
import dataclasses
import io
import math

import pytest
import torch
from grouping_cases import assert_near
from model_cases import LARGER, SIZES, SPACINGS, cut, image_of, make, padded
from spatial_grouping_attention import compose
from spatial_grouping_attention.models import SegmentationOutput
from torch import Tensor
from torch.utils import _pytree as pytree

ALL = 10_000


def masks(output: SegmentationOutput) -> Tensor:
    found = output.mask_logits
    assert found is not None
    return found


def classes(output: SegmentationOutput) -> Tensor:
    assert output.class_logits is not None
    return output.class_logits


def candidates(output: SegmentationOutput) -> Tensor:
    assert output.candidates is not None
    return output.candidates


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("grouping", ["sparse", "dense"])
def test_masks_of_all_groups_sum_to_one_at_every_valid_pixel(ndim: int, grouping: str) -> None:
    model = make(ndim, head="panoptic", num_candidates=ALL, grouping=grouping, stem_stride=3)
    size = SIZES[ndim]
    output = model(image_of(size), SPACINGS[ndim])
    groups = math.prod(output.grids[-1].shape)
    assert classes(output).shape == (2, groups, 4)
    assert masks(output).shape == (2, groups, *size)
    assert masks(output).dtype == torch.float64
    ones = torch.ones(2, *size, dtype=torch.float64)
    assert_near(masks(output).exp().sum(1), ones, 1e-9)
    wide, valid = padded(image_of(size), LARGER[ndim], math.nan)
    valid[1, ..., 0] = False
    together = model(wide, SPACINGS[ndim], valid)
    total = masks(together).exp().sum(1)
    assert_near(total[valid], torch.ones_like(total[valid]), 1e-9)
    assert total[~valid].max() < 1e-9
    assert masks(together).isfinite().all()


def test_masks_read_like_the_fields_and_are_none_of_them() -> None:
    output = make(head="panoptic")(image_of((13, 10)))
    assert "logits" in output
    assert "mask_logits" not in output
    assert torch.equal(output["mask_logits"], masks(output))
    assert set(dict(output)) == {field.name for field in dataclasses.fields(output)}
    with pytest.raises(KeyError, match="masks"):
        output["masks"]


def test_semantic_logits_are_those_of_the_native_head() -> None:
    panoptic, native = make(head="panoptic"), make(head="native", seed=1)
    native.load_state_dict({k: v for k, v in panoptic.state_dict().items() if "candidate" not in k})
    image = image_of((13, 10))
    output = native(image)
    assert torch.equal(panoptic(image).logits, output.logits)
    assert output.candidates is output.class_logits is output.mask_logits is None
    assert all("head" in name for name in set(panoptic.state_dict()) - set(native.state_dict()))


@pytest.mark.parametrize("head", ["native", "fused", "bilinear"])
def test_any_head_may_have_candidates_beside_it(head: str) -> None:
    model = make(head=head, num_candidates=3)
    output = model(image_of((13, 10)))
    assert classes(output).shape == (2, 3, 4)
    assert masks(output).shape == (2, 3, 13, 10)
    plain = make(head=head, seed=1)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "candidate" not in k})
    assert torch.equal(plain(image_of((13, 10))).logits, output.logits)


def test_masks_carry_the_logits() -> None:
    """A sum over all groups of mask and logits is what the semantic head gives."""
    model = make(head="panoptic", num_candidates=ALL)
    output = model(image_of((13, 10)))
    logits = model.head.mlp(output.features[-1])
    rows = candidates(output).unsqueeze(-1).expand(-1, -1, logits.shape[-1])
    carried = torch.einsum("bghw,bgc->bchw", masks(output).exp(), logits.gather(1, rows))
    assert_near(carried, output.logits, 1e-9)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_memberships_of_pixels_carry_and_sum(ndim: int) -> None:
    """Both are the same matrix, and of a stem without patches that of the assignments."""
    model = make(ndim, stem_stride=3)
    wide, valid = padded(image_of(SIZES[ndim]), LARGER[ndim], math.nan)
    output = model(wide, valid=valid)
    members = output.memberships()
    values, pixels = torch.randn(2, output.features[-1].shape[1], 2).double(), torch.randn(2, 2, *LARGER[ndim]).double()
    assert_near((members.upsample(values) * pixels).sum(), (values * members.sum(pixels)).sum(), 1e-9)
    output = make(ndim, stem_stride=1)(image_of(SIZES[ndim]))
    values = torch.randn(2, output.features[-1].shape[1], 2).double()
    carried = compose(output.assignments).upsample(values)
    assert_near(output.memberships().upsample(values).flatten(2).mT, carried, 1e-12)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_candidates_are_the_groups_of_largest_mass(ndim: int) -> None:
    model = make(ndim, head="panoptic", num_candidates=3)
    size = tuple(2 * n for n in SIZES[ndim])
    wide, valid = padded(image_of(size), tuple(n + 9 for n in size), math.nan)
    output = model(wide, valid=valid)
    chain = compose(output.assignments)
    mass = chain.usage().mass.masked_fill(~chain.valid_groups, -1.0)
    assert_near(mass.gather(1, candidates(output)), mass.topk(3).values, 1e-6)
    # All that a candidate is comes from its group.
    logits = model.candidate_head.mlp(output.features[-1])
    assert_near(classes(output), torch.stack([x[i] for x, i in zip(logits, candidates(output), strict=True)]), 1e-12)
    assert_near(masks(output)[:, 1:2], output.masks_of(candidates(output)[:, 1:2]), 1e-12)


def test_groups_that_are_not_valid_are_no_candidates() -> None:
    model = make(head="panoptic", num_candidates=ALL)
    valid = torch.zeros(2, 32, 32, dtype=torch.bool)
    valid[0, :9, :9] = True  # two by two groups, of sixteen; and an image without a pixel
    output = model(image_of((32, 32)), valid=valid)
    groups = candidates(output)
    real = compose(output.assignments).valid_groups
    assert real.sum(1).tolist() == [4, 0]
    for found, allowed in zip(groups, real, strict=True):
        assert sorted(found[found >= 0].tolist()) == allowed.nonzero().squeeze(1).tolist()
        assert (found[int(allowed.sum()) :] == -1).all()
    nothing = classes(output).softmax(-1)[groups < 0]
    assert torch.equal(nothing, torch.eye(4, dtype=torch.float64)[-1].expand_as(nothing))
    assert masks(output)[groups < 0].exp().max() < 1e-11


@pytest.mark.parametrize("fill", [0.0, math.nan])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_padding_to_any_larger_size_changes_nothing(ndim: int, fill: float) -> None:
    model = make(ndim, head="panoptic", num_candidates=ALL)
    size, image = SIZES[ndim], image_of(SIZES[ndim])
    alone = model(image, SPACINGS[ndim])
    want = gradients(model, classes(alone), masks(alone))
    wide, valid = padded(image, LARGER[ndim], fill)
    together = model(wide, SPACINGS[ndim], valid)
    count = candidates(alone).shape[1]
    assert (candidates(together)[:, count:] == -1).all()
    assert_near(classes(together)[:, :count], classes(alone), 1e-10)
    assert_near(cut(masks(together)[:, :count], size), masks(alone), 1e-8)
    got = gradients(model, classes(together)[:, :count], cut(masks(together)[:, :count], size))
    for name, gradient in got.items():
        assert_near(gradient, want[name], 1e-7, name)


def gradients(model: torch.nn.Module, class_logits: Tensor, mask_logits: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    for x in (class_logits, mask_logits):
        weights = torch.linspace(-1, 2, x[0].numel(), dtype=x.dtype).reshape(x.shape[1:])
        (weights * x).sum().backward(retain_graph=True)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_a_batch_of_different_sizes_is_the_samples_one_by_one(ndim: int) -> None:
    model = make(ndim, head="panoptic", num_candidates=2)
    sizes = [SIZES[ndim], LARGER[ndim], tuple(n // 2 + 1 for n in LARGER[ndim])]
    images = [image_of(size, batch=1, seed=i) for i, size in enumerate(sizes)]
    wide, valid = (torch.cat(x) for x in zip(*(padded(x, LARGER[ndim], math.nan) for x in images), strict=True))
    together = model(wide, valid=valid)
    for i, (image, size) in enumerate(zip(images, sizes, strict=True)):
        alone = model(image)
        count = classes(alone).shape[1]
        assert_near(classes(together)[i : i + 1, :count], classes(alone), 1e-10)
        assert_near(cut(masks(together)[i : i + 1, :count], size), masks(alone), 1e-8)


def test_half_types_stay_finite_and_close() -> None:
    wide = make(head="panoptic", num_candidates=ALL, dtype=torch.float32)
    image = image_of((13, 10)).float()
    valid = torch.ones(2, 13, 10, dtype=torch.bool)
    valid[:, 8:] = False
    want = wide(image, valid=valid)
    order = candidates(want)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = wide(image, valid=valid)
        assert masks(mixed).dtype == torch.float32
    for output in (mixed, copy.deepcopy(wide).bfloat16()(image.bfloat16(), valid=valid)):
        found = output.masks_of(order)
        assert found.dtype == torch.float32
        assert found.isfinite().all()
        assert classes(output).isfinite().all()
        assert_near(found.exp(), masks(want).exp(), 0.05)
    half = want.to("cpu")
    half.logits, half.class_logits = want.logits.half(), classes(want).half()
    assert masks(half).isfinite().all()


def test_masks_survive_whatever_is_done_to_outputs() -> None:
    output = make(head="panoptic", num_candidates=3)(image_of((13, 10)), torch.ones(2, 2, dtype=torch.float64))
    want = masks(output)
    saved = io.BytesIO()
    torch.save(output.detach(), saved)
    saved.seek(0)
    leaves, tree = pytree.tree_flatten(output)
    others = [
        pytree.tree_unflatten(leaves, tree),
        output.detach(),
        output.to("cpu"),
        SegmentationOutput({**output}),
        torch.load(saved),
        copy.deepcopy(output.detach()),
    ]
    for other in others:
        assert torch.equal(masks(other), want)
        assert torch.equal(classes(other), classes(output))
    assert masks(output).requires_grad
    assert not masks(output.detach()).requires_grad
    assert "mask_logits" not in output


def test_every_parameter_has_a_gradient() -> None:
    model = make(head="panoptic").train()
    output = model(image_of((13, 10)))
    (output.logits.square().sum() + classes(output).square().sum() + masks(output).square().sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_a_deep_copy_is_the_same_network() -> None:
    model, image = make(head="panoptic"), image_of((13, 10))
    assert torch.equal(masks(copy.deepcopy(model)(image)), masks(model(image)))


def test_masks_of_refuses() -> None:
    output = make()(image_of((13, 10)))
    with pytest.raises(ValueError, match=r"groups must have shape .B=2, G.; got"):
        output.masks_of(torch.zeros(3, 1, dtype=torch.long))
    with pytest.raises(TypeError, match=r"groups must hold integers; got torch.float32"):
        output.masks_of(torch.zeros(2, 1))
    with pytest.raises(ValueError, match="memberships need groupings; got an output without"):
        make(downsample="conv")(image_of((13, 10))).masks_of(torch.zeros(2, 1, dtype=torch.long))
