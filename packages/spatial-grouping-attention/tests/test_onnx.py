"""Layers of a fixed grid leave torch through ONNX and give the same masks in another runtime."""

from pathlib import Path

import onnxruntime
import pytest
import torch
from grouping_cases import assert_near
from layer_cases import make_layer, mostly_slow, tokens
from spatial_grouping_attention import GroupingOutput, compose
from spatial_grouping_attention.functional import select

SHAPE = (6, 9)
PADDED_OR_NOT = mostly_slow(
    ("sparse", False), ("sparse", True), *((variant, p) for variant in ("dense", "deformable") for p in (False, True))
)


class Masks(torch.nn.Module):
    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.second = make_layer("dense", iters=0, seed=3, compactness=1.0)

    def last(self, output: GroupingOutput) -> GroupingOutput:
        return self.second(output.x_out, input_grid=output.grid, valid=output.valid)

    def forward(self, x: torch.Tensor, valid: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        output = self.layer(x, 0.5, SHAPE, valid=valid)
        members, chain = output.assignment, compose([output.assignment, self.last(output).assignment])
        labels = (members.labels(), members.labels(per_head=True), chain.labels(), chain.labels(nested=True))
        return output.x_out, members.upsample(output.x_out), *labels


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)  # the exporter's
@pytest.mark.parametrize(("variant", "padded"), PADDED_OR_NOT)
def test_exported_layers_agree(variant: str, padded: bool, tmp_path: Path) -> None:
    model = Masks(make_layer(variant, iters=2, compactness=2.0)).eval()
    inputs = (tokens(SHAPE), torch.ones(2, *SHAPE, dtype=torch.bool))[: 1 + padded]
    program = torch.onnx.export(model, inputs, dynamo=True, verbose=False)
    assert program is not None
    program.save(str(tmp_path / "layer.onnx"))
    session = onnxruntime.InferenceSession(tmp_path / "layer.onnx", providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    for first_invalid in (9, 6) if padded else (9,):
        for valid in inputs[1:]:
            valid[0, :, first_invalid:] = False
        results = session.run(None, {name: given.numpy() for name, given in zip(names, inputs, strict=True)})
        with torch.no_grad():
            for got, want in zip(results, model(*inputs), strict=True):
                assert got.dtype == want.numpy().dtype
                assert_near(torch.from_numpy(got).double(), want.double(), 1e-5)


def test_only_the_reference_is_made_of_standard_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    assert select(torch.randn(1, 1, 4, 8)).backend == "reference"
    with pytest.raises(ValueError, match="ONNX has standard operators only"):
        select(torch.randn(1, 1, 4, 8), backend="fused")
