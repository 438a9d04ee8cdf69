"""Networks on a GPU, and all that is made of what they return: beside the same in float64 on the CPU.

There the tests of the models hold every part to what it should be. Here no part may be left on another device, wait
for the GPU where it need not, or be rounded more than float32 is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from assignment_cases import ASSIGNMENTS, random
from gpu_cases import DEVICE, assert_capturable, assert_gradients_near, on_device
from grouping_cases import assert_near
from model_cases import LARGER, SIZES, SPACINGS, image_of, make, padded
from RoSE import Grid
from spatial_grouping_attention import Assignment
from spatial_grouping_attention.models import (
    SegmentationOutput,
    SetMatchingLoss,
    objects_of,
    panoptic_segments,
)
from spatial_grouping_attention.models.stage import MixMLP
from spatial_grouping_attention.models.tokens import Tokens
from torch import Tensor
from triton_cases import one_plan_a_class  # noqa: F401

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_plan_a_class", "exact_convolutions")]

# Every way from pixels to features and back.
WAYS: dict[str, dict[str, object]] = {
    "panoptic": {"head": "panoptic"},
    "fused": {"head": "fused", "stem": "conv", "mlp": "conv", "temperature": "learned"},
    "dense": {"grouping": "dense", "compactness": None},
    "bilinear": {"head": "bilinear", "num_candidates": 5},
    "pyramid": {"head": "fpn", "mlp": "conv"},
    "twin": {"downsample": "conv"},
    "twin, pyramid": {"downsample": "conv", "head": "fpn", "stem": "conv"},
}


def given(ndim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, spacings of their own, and validity, of which the second image has less."""
    image, valid = padded(image_of(SIZES[ndim]), LARGER[ndim], math.nan)
    valid[1, 2:5] = False
    return image, torch.tensor([SPACINGS[ndim], [2 * d for d in SPACINGS[ndim]]], dtype=torch.float64), valid


def weighed(x: Tensor) -> Tensor:
    """A sum in which no two entries count alike."""
    return (x * torch.linspace(-1.0, 2.0, x.numel(), dtype=torch.float64, device=x.device).view_as(x).to(x)).sum()


def with_gradients(model: torch.nn.Module, result: Tensor, loss: Tensor) -> list[Tensor]:
    """A result, and the gradients of a loss to all parameters."""
    return [result.detach(), *torch.autograd.grad(loss, [*model.parameters()], materialize_grads=True)]


def names_of(model: torch.nn.Module) -> list[str]:
    """Of what :func:`with_gradients` returns."""
    return ["result", *(name for name, _ in model.named_parameters())]


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_networks_are_those_of_the_cpu(way: str, ndim: int) -> None:
    model, (image, spacing, valid) = make(ndim, **WAYS[way]), given(ndim)
    mine = on_device(model)

    def both_ways(model: torch.nn.Module, *operands: Tensor) -> tuple[SegmentationOutput, list[Tensor]]:
        output = model(*operands)
        classes = 0.0 if output.class_logits is None else weighed(output.class_logits)
        return output, with_gradients(model, output.logits, weighed(output.logits) + classes)

    want, wanted = both_ways(model, image, spacing, valid)
    got, found = both_ways(mine, image.to(DEVICE, torch.float32), spacing.to(DEVICE), valid.to(DEVICE))
    assert_gradients_near(found, wanted, 1e-4, names_of(model))
    for features, expected in zip(got.features, want.features, strict=True):
        assert_near(features.cpu(), expected, 1e-4)
    if want.candidates is not None:
        assert torch.equal(got.candidates.cpu(), want.candidates)
        assert_near(got.mask_logits.exp().cpu(), want.mask_logits.exp(), 1e-4)


@pytest.mark.parametrize("name", ASSIGNMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_assignments_are_those_of_the_cpu(name: str, dtype: torch.dtype) -> None:
    """Moved there and back, and everything that can be asked of one."""
    make, *arguments = ASSIGNMENTS[name]
    assignment: Assignment = make(*arguments)
    there = assignment.to(DEVICE)
    assert there.device.type == torch.device(DEVICE).type
    tokens = random(assignment.batch_size, assignment.num_inputs, 5)
    groups = random(assignment.batch_size, assignment.num_groups, 5)
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-10}[dtype]

    def asked(of: Assignment, *values: Tensor) -> dict[str, Tensor]:
        tokens, groups = values
        found = {"matrix": of.matrix(), "labels": of.labels().float(), "boundaries": of.boundaries().float()}
        found |= of.usage()._asdict()
        for hard in (False, True):
            found[f"upsample, {hard}"] = of.upsample(groups, hard=hard)
            found[f"sum, {hard}"] = of.sum(tokens, hard=hard)
            found[f"pool, {hard}"] = of.pool(tokens, hard=hard)
        return found

    want = asked(assignment, tokens, groups)
    for name_of, mine in asked(there, tokens.to(DEVICE, dtype), groups.to(DEVICE, dtype)).items():
        assert_near(mine.cpu(), want[name_of], tolerance, name_of)
    assert_near(there.to("cpu").matrix(), want["matrix"], 1e-10)


def with_objects() -> tuple[Tensor, Tensor]:
    """Images, and a map of objects in them."""
    image = image_of((13, 10))
    instances = torch.zeros(2, 13, 10, dtype=torch.int32)
    instances[0, :5, :4], instances[0, 7:12, 1:6], instances[1, 2:9, 3:] = 1, 2, 3
    return image, instances


def test_objects_are_those_of_the_cpu() -> None:
    """Matched and learned from, and told apart."""
    model, loss = make(head="panoptic", num_candidates=12, stem_stride=1), SetMatchingLoss(3)
    mine, (image, instances) = on_device(model), with_objects()
    image = image.float().double()
    want, got = model(image), mine(image.to(DEVICE, torch.float32))
    wanted, found = loss(want, objects_of(instances, 1)), loss(got, objects_of(instances.to(DEVICE), 1))
    for term, expected in zip(found, wanted, strict=True):
        assert_near(term.cpu(), expected, 1e-4)
    mine_of = with_gradients(mine, got.logits, found.total)
    assert_gradients_near(mine_of, with_gradients(model, want.logits, wanted.total), 1e-3, names_of(model))
    options = {"min_score": 0.2, "min_overlap": 0.0}
    for segments, expected in zip(panoptic_segments(got, **options), panoptic_segments(want, **options), strict=True):
        assert torch.equal(segments.classes.cpu(), expected.classes)
        assert_near(segments.scores.cpu(), expected.scores, 1e-4)
        # Of pixels between two instances rounding decides.
        assert (segments.instances.cpu() == expected.instances).float().mean() > 0.98
        assert (segments.semantic.cpu() == expected.semantic).float().mean() > 0.98


def step_of(model: torch.nn.Module, masked: bool) -> tuple[Callable[[], list[Tensor]], Tensor]:
    """What a step of training computes from an image that may be changed in place: logits and all gradients."""
    image, spacing, valid = (x.to(DEVICE) for x in given(2))
    image = image.nan_to_num().float()

    def step() -> list[Tensor]:
        output = model(image, spacing if masked else None, valid if masked else None)
        return with_gradients(model, output.logits, weighed(output.logits))

    return step, image


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("way", ["panoptic", "fused", "dense", "pyramid", "twin"])
def test_nothing_waits_for_the_gpu(way: str, masked: bool, unsynchronised: Callable[[], None]) -> None:
    """From the second call of a shape on, where it is as large as the first."""
    step, _ = step_of(on_device(make(**WAYS[way])), masked)
    step()
    torch.cuda.synchronize()
    unsynchronised()
    step()


@pytest.mark.parametrize("way", ["panoptic", "fused", "dense"])
def test_training_steps_can_be_captured(way: str) -> None:
    model = on_device(make(**WAYS[way]))
    step, image = step_of(model, masked=True)
    assert_capturable(step, image, 0.7 * image.flip(-1), names_of(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_training_learns_in_every_precision(dtype: torch.dtype) -> None:
    """A few steps on one batch, with autocast and, in float16, a scaler of gradients."""
    model = on_device(make(head="panoptic", num_candidates=12)).train()
    image, instances = with_objects()
    image, instances = image.to(DEVICE, torch.float32), instances.to(DEVICE)
    criterion, targets = SetMatchingLoss(3), objects_of(instances, 1)
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    scaler = torch.amp.GradScaler(DEVICE, enabled=dtype == torch.float16)
    losses = []
    for _ in range(30):
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            output = model(image)
        semantic = torch.nn.functional.cross_entropy(output.logits.float(), (instances > 0).long())
        total = semantic + 0.1 * criterion(output, targets).total
        losses.append(total.item())
        optimiser.zero_grad()
        scaler.scale(total).backward()
        scaler.step(optimiser)
        scaler.update()
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_no_kernel_is_launched_for_every_channel(
    batch: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As cuDNN was seen to do for the gradients of this depthwise convolution, with two images in bfloat16."""
    mlp = MixMLP(128, 3, 2.0, {"device": DEVICE})
    rows = torch.randn(batch, 12 * 12 * 8, 128, device=DEVICE, requires_grad=True)

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # as it is left to itself

    def step() -> None:
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            out = mlp(Tokens(rows, Grid((12, 12, 8)), None))
        torch.autograd.grad(out.float().sum(), [rows, *mlp.parameters()])

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    launched = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert 0 < len(launched) < 100, Counter(launched).most_common(3)


@pytest.mark.parametrize("way", ["panoptic", "dense"])
def test_checkpoints_change_no_gradient(way: str) -> None:
    models = [on_device(make(checkpoint=checkpoint, **WAYS[way])).train() for checkpoint in (True, False)]
    (again, _), (kept, _) = (step_of(model, masked=True) for model in models)
    assert_gradients_near(again(), kept(), 1e-5, names_of(models[0]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler calls what torch has deprecated
@pytest.mark.filterwarnings("ignore:.*TensorFloat32:UserWarning")  # the compiler advises to give up precision
def test_compiled_whole() -> None:
    model = on_device(make(dims=(8, 16), depths=(1, 1), num_heads=(2, 2), iters=1))
    torch._dynamo.reset()
    (compiled, _), (eager, _) = (step_of(each, masked=True) for each in (torch.compile(model, fullgraph=True), model))
    assert_gradients_near(compiled(), eager(), 1e-4, names_of(model))
