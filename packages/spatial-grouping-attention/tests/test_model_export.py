"""Whole networks in torch's compiler and exporter: one graph, any batch, the same results."""

import io

import pytest
import torch
from grouping_cases import assert_near
from layer_cases import loads_programs, mostly_slow
from spatial_grouping_attention.models import GroupingViT, SegmentationOutput, grouping_vit_nano
from spatial_grouping_attention.models.interpolate import interpolate
from torch import Tensor

HEADS = ("fused", "native", "panoptic")
SIZE = (22, 17)


def nano(head: str) -> GroupingViT:
    """The preset with fewer of its repeated parts, of which every one is traced."""
    torch.manual_seed(0)
    options = {"dims": (16, 32), "depths": (0, 1), "num_heads": (1, 2), "head_width": 16}
    candidates = None if head == "native" else 6
    return grouping_vit_nano(2, 1, 3, head=head, num_candidates=candidates, **options).eval()


def image_of(batch: int, size: tuple[int, ...] = SIZE) -> Tensor:
    return torch.randn(batch, 1, *size, generator=torch.Generator().manual_seed(batch))


def assert_same(got: SegmentationOutput, want: SegmentationOutput) -> None:
    assert isinstance(got, SegmentationOutput)
    assert_near(got.logits, want.logits, 1e-4)
    assert [grid.shape for grid in got.grids] == [grid.shape for grid in want.grids]
    if want.class_logits is None:
        assert got.class_logits is got.candidates is got.mask_logits is None
    else:
        assert torch.equal(got.candidates, want.candidates)
        assert_near(got.class_logits, want.class_logits, 1e-4)
        assert_near(got.mask_logits.exp(), want.mask_logits.exp(), 1e-4)


@loads_programs
@pytest.mark.parametrize("head", mostly_slow(*HEADS))
def test_exported_networks_can_be_saved(head: str) -> None:
    model, file = nano(head), io.BytesIO()
    with torch.no_grad():
        want = model(image_of(2))
        program = torch.export.export(model, (image_of(2),))
        torch.export.save(program, file)
        file.seek(0)
        assert_same(torch.export.load(file).module()(image_of(2)), want)


@pytest.mark.parametrize("head", mostly_slow(*HEADS))
def test_exported_networks_take_any_batch(head: str) -> None:
    model, batch = nano(head), torch.export.Dim("batch", min=1, max=64)
    spacing, valid = torch.tensor([[1.0, 0.7]] * 2), torch.ones(2, *SIZE, dtype=torch.bool)
    valid[:, 15:] = False
    inputs = image_of(2), spacing, valid
    with torch.no_grad():
        model(*inputs)
        program = torch.export.export(model, inputs, dynamic_shapes=({0: batch},) * 3)
        for n in (1, 2, 5):
            given = image_of(n), spacing[:1].expand(n, -1), valid[:1].expand(n, -1, -1)
            assert_same(program.module()(*given), model(*given))


class Masks(torch.nn.Module):
    """All tensors that a network is for; memberships are told their sizes, which no graph hands on where they vary."""

    def __init__(self, model: GroupingViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> list[Tensor]:
        output = self.model(image)
        return [x for x in (output.logits, output.class_logits, output.mask_logits) if x is not None]


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_exported_networks_take_any_size_of_whole_groups(head: str) -> None:
    """For others, tokens are added, and how many is a branch that one graph cannot have."""
    model = Masks(nano(head))
    height, width = (4 * torch.export.Dim(name, min=4, max=64) for name in ("rows", "columns"))
    with torch.no_grad():
        model(image_of(2))
        program = torch.export.export(model, (image_of(2, (32, 32)),), dynamic_shapes=({2: height, 3: width},))
        for size in ((32, 32), (48, 40), (16, 100)):
            for got, want in zip(program.module()(image_of(2, size)), model(image_of(2, size)), strict=True):
                assert_near(got, want, 1e-4)


class Interpolated(torch.nn.Module):
    """From every second or from every ninth row, or whatever there is of one, to all of them."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, image: Tensor) -> Tensor:
        values = image[:, :: self.stride, :: self.stride]
        return interpolate(values, None, image.shape[1:3], (self.stride,) * 2, (0.5,) * 2) * 2


@pytest.mark.parametrize("stride", [2, 9])
@pytest.mark.parametrize("example", [(18, 36), (19, 23)])
def test_interpolation_is_one_graph_for_whole_cells_and_for_parts(example: tuple[int, int], stride: int) -> None:
    model, sizes = Interpolated(stride), {1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (torch.randn(2, *example, 3),), dynamic_shapes=(sizes,)).module()
    for size in ((18, 36), (36, 18), (20, 37), (11, 24)):
        image = torch.randn(2, *size, 3)
        assert_near(program(image), model(image), 1e-6)


@pytest.mark.parametrize("head", mostly_slow(*HEADS))
def test_compiled_networks_are_one_graph(head: str) -> None:
    model = nano(head)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    want, got = model(image_of(2)), compiled(image_of(2))
    assert_same(got, want)
    grads: dict[str, Tensor] = {}
    for output in (want, got):
        model.zero_grad()
        loss = output.logits.square().sum()
        if output.class_logits is not None:
            loss = loss + output.class_logits.square().sum() + output.mask_logits.exp().square().sum()
        loss.backward()
        for name, parameter in model.named_parameters():
            if output is want:
                grads[name] = parameter.grad.clone()
            else:
                assert_near(parameter.grad, grads[name], 1e-3)
