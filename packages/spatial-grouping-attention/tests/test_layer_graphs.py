"""Whole layers in torch's compiler and exporter: no graph break, few recompilations."""

import io

import pytest
import torch
from grouping_cases import assert_near
from layer_cases import VARIANTS, loads_programs, make_layer, mostly_slow, tokens
from spatial_grouping_attention import WindowedSelfAttention, compose
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import _pytree as pytree

SHAPE = (6, 9)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler calls what it has deprecated


@pytest.mark.parametrize(
    ("variant", "compactness"), mostly_slow(("sparse", 2.0), ("sparse", None), ("dense", 2.0), ("deformable", 2.0))
)
def test_a_compiled_layer_is_the_same_layer(variant: str, compactness: float | None) -> None:
    torch._dynamo.reset()
    layer = make_layer(variant, relative_bias=variant != "dense", iters=1, compactness=compactness)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for function in (layer, compiled):
        layer.zero_grad()
        output = function(tokens(SHAPE), 1.0, SHAPE)
        (output.x_out.square().sum() + output.assignment.upsample(output.x_out).square().sum()).backward()
        results.append((output.x_out, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)))
    for eager, traced in zip(*results, strict=True):
        assert_near(traced, eager, 1e-5)


@pytest.mark.parametrize("variant", mostly_slow("sparse", "dense", "deformable", "windowed self-attention"))
def test_validity_and_spacings_are_in_the_graph(variant: str) -> None:
    """One graph, whichever tokens are valid and whatever a sample's spacing is."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    windowed = variant not in VARIANTS
    layer = WindowedSelfAttention(8, 2, 2, window=3) if windowed else make_layer(variant, iters=1)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for seed, step in enumerate((1.0, 0.5, 0.75)):
        x, spacing = tokens(SHAPE), torch.tensor([[step, 1.0], [1.0, step]])
        valid = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(seed)) < 0.7
        x = x.masked_fill(~valid.flatten(1).unsqueeze(-1), torch.nan)
        got, want = compiled(x, spacing, SHAPE, valid=valid), layer(x, spacing, SHAPE, valid=valid)
        if windowed:
            assert_near(got, want, 1e-5)
            continue
        assert_near(got.x_out, want.x_out, 1e-5)
        assert torch.equal(got.valid, want.valid)
        assert_near(got.assignment.upsample(got.x_out), want.assignment.upsample(want.x_out), 1e-5)
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["sparse", "dense"])
def test_batches_and_sizes_recompile_once_each(variant: str) -> None:
    """Once, because a size is taken for a constant until it changes."""
    torch._dynamo.reset()
    # A stride of 4 leaves border cells larger than the others, which is a case of its own for some backends.
    layer = make_layer(variant, iters=1, stride=4)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    # Large enough that no window reaches across the grid: there another backend serves, in another graph.
    for batch in (2, 3, 5, 6):
        x = tokens((13, 14), batch=batch)
        assert_near(compiled(x, 1.0, (13, 14)).x_out, layer(x, 1.0, (13, 14)).x_out, 1e-5)
    assert counter.frame_count == 2
    for shape in ((20, 15), (18, 21), (16, 13)):
        x = tokens(shape)
        assert_near(compiled(x, 1.0, shape).x_out, layer(x, 1.0, shape).x_out, 1e-5)
    assert counter.frame_count == 3


@loads_programs
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("variant", mostly_slow("sparse", "dense", "deformable"))
def test_exported_layers_take_any_batch_and_can_be_saved(variant: str, padded: bool) -> None:
    layer = make_layer(variant, iters=1, compactness=2.0).eval()

    def given(number: int) -> dict[str, object]:
        told = {"x": tokens(SHAPE, batch=number), "input_spacing": (1.0, 0.5), "input_grid_shape": SHAPE}
        return {**told, "valid": some_valid(number)} if padded else told

    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    sizes = {name: batch if isinstance(told, torch.Tensor) else (None, None) for name, told in given(2).items()}
    torch.export.save(torch.export.export(layer, (), given(2), dynamic_shapes=sizes), file := io.BytesIO())
    file.seek(0)
    loaded = torch.export.load(file).module()
    for number in (1, 5):
        got, want = loaded(**given(number)), layer(**given(number))
        assert_near(got.x_out, want.x_out, 1e-5)
        assert_near(got.assignment.upsample(got.x_out), want.assignment.upsample(want.x_out), 1e-5)
        assert torch.equal(got.assignment.labels(), want.assignment.labels())
        assert pytree.tree_structure(got) == pytree.tree_structure(want)


class Segments(torch.nn.Module):
    """Two stages, and all that can be read from labels."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.first = make_layer(variant, iters=1)
        self.second = make_layer(variant, iters=1, seed=3, compactness=1.0)

    def forward(self, x: torch.Tensor, valid: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        fine = self.first(x, 1.0, SHAPE, valid=valid)
        coarse = self.second(fine.x_out, input_grid=fine.grid, valid=fine.valid)
        members, chain = fine.assignment, compose([fine.assignment, coarse.assignment])
        return {
            "labels": members.labels(),
            "heads": members.labels(per_head=True),
            "chain": chain.labels(),
            "nested": chain.labels(nested=True),
            "unused": members.usage().unused,
            "borders": members.boundaries(),
            "matrix": members.matrix(),
            "up": chain.upsample(coarse.x_out, hard=True),
            "down": members.pool(x, hard=True, per_head=True),
        }


def assert_segments(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    for name, value in want.items():
        assert got[name].dtype == value.dtype, name
        assert_near(got[name].double(), value.double(), 1e-5, name)


# Below all variants are traced with padding and without it.
@pytest.mark.parametrize(("variant", "padded"), mostly_slow(("sparse", False), ("dense", True), ("deformable", True)))
def test_labels_are_in_the_graph(variant: str, padded: bool) -> None:
    torch._dynamo.reset()
    model = Segments(variant)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = (tokens(SHAPE), some_valid(2))[: 1 + padded]
    assert_segments(compiled(*inputs), model(*inputs))


@pytest.mark.slow  # one of them leaves through ONNX in every run
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_exported_labels_take_any_batch(variant: str, padded: bool) -> None:
    model = Segments(variant)
    batch = {0: torch.export.Dim("batch", min=1)}
    inputs = (tokens(SHAPE), some_valid(2))[: 1 + padded]
    program = torch.export.export(model, inputs, dynamic_shapes=(batch,) * len(inputs))
    for size in (1, 5):
        inputs = (tokens(SHAPE, batch=size), some_valid(size))[: 1 + padded]
        assert_segments(program.module()(*inputs), model(*inputs))


def some_valid(batch: int) -> torch.Tensor:
    return torch.rand(batch, *SHAPE, generator=torch.Generator().manual_seed(batch)) < 0.7


CHECKS = ("test_aot_dispatch_dynamic", "test_schema", "test_autograd_registration", "test_faketensor")


def test_labels_are_registered_operators() -> None:
    """With shapes for tracing that are those of the results."""
    for variant in ("sparse", "deformable"):  # dense labels are the same operator
        layer = make_layer(variant, relative_bias=True, compactness=2.0)
        members = layer(tokens(SHAPE), 1.0, SHAPE).assignment.detach()
        if variant == "deformable":
            operator, given = (
                torch.ops.spatial_grouping_attention.labels_of_points,
                (members.log_shares, members.points),
            )
            given = (*given, None, list(members.output_shape))
        else:
            operator, geometry = torch.ops.spatial_grouping_attention.labels, members.neighbourhood.integers()
            given = (members.q, members.k, members.bias, members.compactness, None, None, geometry, members.scale)
        for per_head in (False, True):
            # Compiling it is what takes time, and both forms are compiled in layers above.
            torch.library.opcheck(operator, (*given, per_head), test_utils=CHECKS[per_head:])
            assert torch.equal(operator(*given, per_head), members.labels(per_head=per_head))


EVERY_VARIANT = (*VARIANTS, "windowed self-attention")


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "variant", [*EVERY_VARIANT, *(pytest.param(variant, marks=pytest.mark.native) for variant in EVERY_VARIANT)]
)
def test_layers_can_be_traced_and_kept(variant: str) -> None:
    """TorchScript's tracer knows no functions of Python: it is shown operators, whatever computes elsewhere."""
    torch.manual_seed(0)
    windowed = variant not in VARIANTS
    layer = WindowedSelfAttention(8, 2, 2, window=3) if windowed else make_layer(variant, checkpoint=True)

    class Tokens(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer.eval()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.layer(x, 1.0, SHAPE)
            return out if windowed else out.x_out

    x = torch.randn(1, 54, 8) if windowed else tokens(SHAPE)
    torch.jit.save(torch.jit.trace(Tokens(), (x,), check_trace=False), kept := io.BytesIO())
    kept.seek(0)
    assert_near(torch.jit.load(kept)(x), Tokens()(x), 1e-5)
