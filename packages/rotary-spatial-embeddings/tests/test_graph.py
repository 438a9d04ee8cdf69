"""Compilers, exporters and function transforms see through the embedding."""

import io
import shutil

import pytest
import torch
from RoSE import Grid, MultiResolutionBlock, RoSEMultiHeadCrossAttention, RotarySpatialEmbedding
from torch._dynamo.testing import CompileCounter

VARIANTS = [{}, {"interleaved": False, "rotary_ratio": 0.5}, {"rotary_partition": "heads", "rotary_ratio": 0.5}]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("options", VARIANTS)
def test_one_graph_serves_all_spacings_sizes_and_batches(options: dict[str, object]) -> None:
    embedding = RotarySpatialEmbedding(32, 4, 2, **options)
    graphs = CompileCounter()
    compiled = torch.compile(embedding, fullgraph=True, dynamic=True, backend=graphs)
    x = torch.randn(2, 20, 32)
    for spacing in ((1.0, 0.5), (0.5, 0.25), (0.7, 0.3), (1.0, 1.0)):
        torch.testing.assert_close(compiled(x, spacing, (4, 5)), embedding(x, spacing, (4, 5)))
    for shape in ((5, 4), (3, 7), (6, 8)):
        x = torch.randn(3, shape[0] * shape[1], 32)
        torch.testing.assert_close(compiled(x, (0.5, 0.9), shape), embedding(x, (0.5, 0.9), shape))
    assert graphs.frame_count == 1


def test_one_graph_serves_all_tensor_spacings_and_coordinates() -> None:
    embedding = RotarySpatialEmbedding(32, 4, 2)
    for name in ("spacing", "coordinates"):
        graphs = CompileCounter()
        compiled = torch.compile(embedding, fullgraph=True, dynamic=True, backend=graphs)
        for tokens in (20, 24):
            given = torch.rand(2, 2) + 0.1 if name == "spacing" else torch.rand(tokens, 2)
            arguments = {"spacing": given, "grid_shape": (4, tokens // 4)} if name == "spacing" else {name: given}
            x = torch.randn(2, tokens, 32)
            torch.testing.assert_close(compiled(x, **arguments), embedding(x, **arguments))
        assert graphs.frame_count == 1


def test_compiled_cross_attention_trains_like_eager() -> None:
    torch.manual_seed(0)
    attention = RoSEMultiHeadCrossAttention(32, 4, 2, rotary_ratio=0.5)
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    gradients = []
    for call in (attention, compiled):
        attention.zero_grad()
        q = torch.linspace(-1, 1, 2 * 20 * 32).view(2, 20, 32).requires_grad_()
        call(q, q, (0.5, 0.7), (4, 5)).square().sum().backward()
        gradients.append((q.grad, attention.rotary.freqs.grad.clone()))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's default compiler needs g++ on a CPU")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # its own loader's
def test_default_compiler_agrees() -> None:
    embedding = RotarySpatialEmbedding(32, 4, 2)
    x = torch.randn(2, 20, 32)
    with torch.no_grad():
        got = torch.compile(embedding, fullgraph=True, dynamic=True)(x, (0.5, 0.7), (4, 5))
        torch.testing.assert_close(got, embedding(x, (0.5, 0.7), (4, 5)))


@pytest.mark.filterwarnings("ignore:a spacing_transform:RoSE.frames.FrameWarning")  # which is another test's
def test_block_and_attend_trace_as_one_graph() -> None:
    block = MultiResolutionBlock(32, 4, 2, spacing_transform="log")
    graphs = CompileCounter()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=graphs)
    for spacings in ([0.5, 1.0], [0.25, 0.7]):
        tokens = [torch.randn(2, n, 32) for n in (1, 20, 6)]
        arguments = (tokens, spacings, [(4, 5), (2, 3)])
        torch.testing.assert_close(compiled(*arguments, leading_tokens=True), block(*arguments, leading_tokens=True))
    assert graphs.frame_count == 1
    attention = RoSEMultiHeadCrossAttention(32, 4, 2)
    q = torch.randn(2, 20, 32)
    compiled_attend = torch.compile(attention.attend, fullgraph=True, dynamic=True, backend="eager")
    torch.testing.assert_close(compiled_attend(q, q, q, 0.5, (4, 5)), attention.attend(q, q, q, 0.5, (4, 5)))


class AtCoordinates(torch.nn.Module):
    """An embedding behind the two tensors that a deployed model is fed."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.rose = RotarySpatialEmbedding(32, 4, 2, **options)

    def forward(self, x: torch.Tensor, coordinates: torch.Tensor) -> torch.Tensor:
        return self.rose(x, coordinates=coordinates, num_prefix_tokens=1)


DYNAMIC = torch.export.Dim.DYNAMIC
SHAPES = ({0: DYNAMIC, 1: DYNAMIC}, {0: DYNAMIC})


@pytest.mark.parametrize("options", VARIANTS)
def test_export_keeps_batch_and_tokens_dynamic(options: dict[str, object]) -> None:
    model = AtCoordinates(**options).eval()
    program = torch.export.export(model, (torch.randn(2, 21, 32), torch.rand(20, 2)), dynamic_shapes=SHAPES)
    other = torch.randn(5, 33, 32), torch.rand(32, 2) * 1e3
    torch.testing.assert_close(program.module()(*other), model(*other))


def test_scores_are_exported_for_any_batch() -> None:
    """Their limit is for sizes that are known."""
    attention = RoSEMultiHeadCrossAttention(32, 4, 2).eval()

    class Scores(torch.nn.Module):
        def forward(self, q: torch.Tensor) -> torch.Tensor:
            return attention(q, q, 0.5, (2, 3))

    shapes = {"q": {0: torch.export.Dim("batch")}}
    program = torch.export.export(Scores(), (torch.randn(2, 6, 32),), dynamic_shapes=shapes)
    x = torch.randn(5, 6, 32)
    torch.testing.assert_close(program.module()(x), attention(x, x, 0.5, (2, 3)))


def test_export_with_a_tensor_spacing() -> None:
    embedding = RotarySpatialEmbedding(32, 4, 2).eval()
    shapes = {"x": {0: DYNAMIC}, "spacing": None, "grid_shape": (None, None)}
    example = (torch.randn(2, 20, 32), torch.tensor([0.5, 0.25]), (4, 5))
    program = torch.export.export(embedding, example, dynamic_shapes=shapes)
    x = torch.randn(7, 20, 32)
    torch.testing.assert_close(program.module()(x, torch.tensor([1.0, 2.0]), (4, 5)), embedding(x, (1.0, 2.0), (4, 5)))


# The exporter reads its own deprecated tree specs.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "options", [VARIANTS[2], *(pytest.param(each, marks=pytest.mark.slow) for each in VARIANTS[:2])]
)
def test_onnx_runtime_agrees(options: dict[str, object], tmp_path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX export is checked where onnxruntime is installed")
    pytest.importorskip("onnxscript", reason="ONNX export is checked where onnxscript is installed")
    model = AtCoordinates(**options).eval()
    program = torch.onnx.export(
        model, (torch.randn(2, 21, 32), torch.rand(20, 2)), dynamo=True, dynamic_shapes=SHAPES, verbose=False
    )
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    other = torch.randn(5, 33, 32), torch.rand(32, 2) * 1e3
    names = [i.name for i in session.get_inputs()]
    (got,) = session.run(None, {n: t.numpy() for n, t in zip(names, other, strict=True)})
    torch.testing.assert_close(torch.from_numpy(got), model(*other).detach(), rtol=1e-5, atol=1e-5)


def test_vmap_over_features_spacings_and_frequencies() -> None:
    embedding = RotarySpatialEmbedding(32, 4, 2)
    x = torch.randn(3, 2, 20, 32)
    expected = torch.stack([embedding(t, 0.5, (4, 5)) for t in x])
    torch.testing.assert_close(torch.func.vmap(lambda t: embedding(t, 0.5, (4, 5)))(x), expected)
    torch.testing.assert_close(
        torch.func.vmap(lambda t: embedding(t, 0.5, (4, 5)), in_dims=1, out_dims=1)(x.transpose(0, 1)),
        expected.transpose(0, 1),
    )
    spacing = torch.rand(3, 2) + 0.1
    got = torch.func.vmap(lambda s, t: embedding(t, s, (4, 5)))(spacing, x)
    torch.testing.assert_close(got, torch.stack([embedding(t, s, (4, 5)) for s, t in zip(spacing, x, strict=True)]))
    freqs = torch.randn(3, *embedding.freqs.shape)

    def with_freqs(freqs: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(embedding, {"freqs": freqs}, (t, 0.5, (4, 5)))

    got = torch.func.vmap(with_freqs)(freqs, x)
    torch.testing.assert_close(got, torch.stack([with_freqs(f, t) for f, t in zip(freqs, x, strict=True)]))


def test_function_transforms_agree_with_autograd() -> None:
    embedding = RotarySpatialEmbedding(8, 2, 2, dtype=torch.float64)
    x = torch.randn(1, 3, 8, dtype=torch.float64)
    where = torch.randn(3, 2, dtype=torch.float64)

    def energy(where: torch.Tensor) -> torch.Tensor:
        return embedding(x, coordinates=where).pow(3).sum()

    by_autograd = torch.autograd.functional.hessian(energy, where)
    torch.testing.assert_close(torch.func.jacrev(torch.func.grad(energy))(where), by_autograd)


def test_grid_is_a_constant_to_the_compiler() -> None:
    embedding = RotarySpatialEmbedding(32, 4, 2)
    compiled = torch.compile(
        lambda x: embedding(x, coordinates=Grid((4, 5), 0.5, origin=3.0)), fullgraph=True, backend="eager"
    )
    x = torch.randn(2, 20, 32)
    torch.testing.assert_close(compiled(x), embedding(x, coordinates=Grid((4, 5), 0.5, origin=3.0)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's word of TorchScript
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("options", VARIANTS)
def test_traced_and_kept(options: dict[str, object]) -> None:
    """TorchScript's tracer knows no functions of Python, and is shown ordinary operations."""
    embedding = RotarySpatialEmbedding(32, 4, 2, **options)
    x, where = torch.randn(2, 20, 32), torch.rand(20, 2)

    class Placed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = embedding

        def forward(self, x: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
            return self.embedding(x, coordinates=where)

    torch.jit.save(torch.jit.trace(Placed(), (x, where), check_trace=False), kept := io.BytesIO())
    kept.seek(0)
    torch.testing.assert_close(torch.jit.load(kept)(x, 2 * where), embedding(x, coordinates=2 * where))
