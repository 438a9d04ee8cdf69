"""Whole networks in ONNX: another runtime gives the same, for any batch, and no tensor grows faster than the image."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from grouping_cases import assert_near
from spatial_grouping_attention.models import GroupingViT, SegmentationOutput, grouping_vit_nano
from torch import Tensor, nn

SIZE = (22, 17)
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)  # the exporter's


def nano(spatial_dims: int = 2, **options: Any) -> GroupingViT:
    """The preset with fewer of its repeated parts, in which nothing is at a special starting value."""
    torch.manual_seed(0)
    sizes = {"dims": (8, 16), "depths": (0, 1), "num_heads": (1, 2), "head_width": 8}
    model = grouping_vit_nano(spatial_dims, 1, 3, **{**sizes, **options}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "freqs" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


class Logits(nn.Module):
    """What of a network's output is a tensor."""

    def __init__(self, model: GroupingViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, spacing: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
        output: SegmentationOutput = self.model(image, spacing, valid)
        return output.logits


def image_of(batch: int, size: tuple[int, ...] = SIZE) -> Tensor:
    return torch.randn(batch, 1, *size, generator=torch.Generator().manual_seed(batch))


def export(model: nn.Module, *inputs: Tensor, **options: Any) -> Any:
    program = torch.onnx.export(model, inputs, dynamo=True, verbose=False, **options)
    assert program is not None
    return program


def assert_agrees(program: Any, model: nn.Module, path: Path, *cases: tuple[Tensor, ...]) -> None:
    program.save(str(path / "network.onnx"))
    session = onnxruntime.InferenceSession(path / "network.onnx", providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    for inputs in cases:
        results = session.run(None, {name: given.numpy() for name, given in zip(names, inputs, strict=True)})
        with torch.no_grad():
            assert_near(torch.from_numpy(results[0]), model(*inputs), 1e-4)


@pytest.mark.slow  # test_onnx.py exports a layer in every run
@pytest.mark.parametrize("head", ["native", "fused"])
def test_another_runtime_agrees_for_any_batch(head: str, tmp_path: Path) -> None:
    model = Logits(nano(head=head))
    spacing, valid = torch.tensor([[1.0, 0.7], [0.5, 0.5]]), torch.ones(2, *SIZE, dtype=torch.bool)
    valid[1, 15:] = False
    batch = torch.export.Dim("batch", min=1, max=64)
    program = export(model, image_of(2), spacing, valid, dynamic_shapes=({0: batch},) * 3)
    cases = [(image_of(n), spacing[index], valid[index]) for n, index in ((2, [0, 1]), (1, [1]), (5, [1, 0, 0, 1, 0]))]
    assert_agrees(program, model, tmp_path, *cases)


@pytest.mark.slow
def test_another_runtime_agrees_on_volumes_and_with_windows(tmp_path: Path) -> None:
    model, inputs = Logits(nano(3, depths=(1, 0), window=3)), (image_of(2, (11, 10, 9)),)
    assert_agrees(export(model, *inputs), model, tmp_path, inputs)


def largest(program: Any) -> int:
    """Elements of the largest tensor in a graph, constants among them."""
    values = [value for node in program.model.graph for value in node.outputs]
    values += program.model.graph.initializers.values()
    sizes = [value.shape for value in values if value.shape is not None]
    assert len(sizes) > 0.9 * len(values)
    return max(math.prod(shape) for shape in sizes)


@pytest.mark.slow
def test_no_tensor_grows_faster_than_the_image() -> None:
    """The attention of the last stage, which sees all of a far smaller grid, is left out."""
    model = Logits(nano(depths=(1, 0)))
    small, large = (largest(export(model, image_of(1, size))) for size in ((32, 32), (64, 64)))
    assert large <= 4 * small
    assert large <= 64 * 64 * 64
