"""Modules and functions reach the kernels where these serve, and get the same from the plain form where not.

In triton's interpreter (mark ``triton``), where tensors on a CPU stand for those on a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from RoSE import (
    Grid,
    MultiResolutionBlock,
    RoSEMultiHeadAttention,
    RoSEMultiHeadCrossAttention,
    RotarySpatialEmbedding,
    dispatch,
    functional,
)
from RoSE.kernels import agreement, calls, operators
from RoSE.kernels.selfcheck import SelfCheck
from torch import Tensor
from torch._dynamo.testing import CompileCounter

pytestmark = pytest.mark.triton


class Counts:
    """How often each kernel was launched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from RoSE.kernels import launch

        self.forward = self.backward = 0

        def counted(name: str, function: Callable[..., None]) -> Callable[..., None]:
            def call(*arguments: object) -> None:
                setattr(self, name, getattr(self, name) + 1)
                function(*arguments)

            return call

        monkeypatch.setattr(launch, "rotate", counted("forward", launch.rotate))
        monkeypatch.setattr(launch, "rotate_backward", counted("backward", launch.rotate_backward))


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counts]:
    """Tensors on a CPU are served by the kernels, which are trusted already."""
    monkeypatch.setattr(dispatch, "DEVICE_TYPES", ("cpu",))
    monkeypatch.setattr(dispatch, "ROTATION_CHECK", SelfCheck("kernels", lambda device: None, "the plain form"))
    dispatch.ROTATION_CHECK.passed(torch.device("cpu"))
    torch._dynamo.reset()
    yield Counts(monkeypatch)
    torch._dynamo.reset()


def plainly(monkeypatch: pytest.MonkeyPatch, function: Callable[[], object]) -> object:
    with monkeypatch.context() as context:
        context.setattr(dispatch, "DEVICE_TYPES", ())
        return function()


def gradients(module: torch.nn.Module, call: Callable[[], Tensor], *leaves: Tensor) -> list[Tensor]:
    out = call()
    leaves = (*leaves, *module.parameters())
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, weight, allow_unused=True)]


def modules() -> dict[str, tuple[torch.nn.Module, Callable[..., Tensor]]]:
    torch.manual_seed(0)
    x = torch.randn(2, 7, 16, requires_grad=True)
    more = torch.randn(2, 4, 16)
    spacing = torch.tensor([[0.5, 0.7], [0.3, 0.2]])
    where = Grid((2, 3), spacing, origin=2.0)
    options = {"rotary_ratio": 0.5, "rotary_partition": "heads"}
    return {
        "embedding": (RotarySpatialEmbedding(16, 2, 2), lambda m: m(x, coordinates=where, num_prefix_tokens=1)),
        "half layout": (
            RotarySpatialEmbedding(16, 2, 2, interleaved=False, rotary_ratio=0.5),
            lambda m: m(x, coordinates=where, num_prefix_tokens=1),
        ),
        "heads first": (
            RotarySpatialEmbedding(16, 2, 2, **options),
            lambda m: m(x.unflatten(-1, (2, 8)).transpose(1, 2), coordinates=where, num_prefix_tokens=1, layout="bhnd"),
        ),
        "heads last": (
            RotarySpatialEmbedding(16, 2, 2, spacing_transform="log"),
            lambda m: m(x.unflatten(-1, (2, 8)), coordinates=where, num_prefix_tokens=1, layout="bnhd"),
        ),
        "attention": (RoSEMultiHeadAttention(16, 2, 2), lambda m: m(x, coordinates=where, num_prefix_tokens=1)),
        "attention to a context": (
            RoSEMultiHeadAttention(16, 2, 2),
            lambda m: m(x, coordinates=where, num_prefix_tokens=1, context=more, k_coordinates=Grid((2, 2)),
                        k_num_prefix_tokens=0),
        ),
        "scores": (RoSEMultiHeadCrossAttention(16, 2, 2), lambda m: m(x, more, 0.5, (1, 7), 0.5, (2, 2))),
        "attend": (
            RoSEMultiHeadCrossAttention(16, 2, 2),
            lambda m: m.attend(x, x.cos(), x.sin(), coordinates=where, num_prefix_tokens=1),
        ),
        "block": (
            MultiResolutionBlock(16, 2, 2),
            lambda m: torch.cat(
                m([x[:, :1], x[:, 1:], more], coordinates=[where, Grid((2, 2))], leading_tokens=True), 1
            ),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", modules())
def test_modules_reach_the_kernels_and_compute_the_same(
    name: str, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, call = modules()[name]
    got = gradients(module, lambda: call(module))
    assert counts.forward > 0
    assert counts.backward > 0
    # q and k that lie on the same positions are turned by one launch.
    assert counts.forward == (2 if name in ("attention to a context", "scores") else 1)
    launched = counts.forward
    expected = plainly(monkeypatch, lambda: gradients(module, lambda: call(module)))
    assert counts.forward == launched
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_the_function_reaches_them_up_to_four_dimensions(counts: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    for shape in ((5, 8), (3, 5, 8), (2, 3, 5, 8), (2, 1, 3, 5, 8)):
        before = counts.forward
        x, angles = torch.randn(shape, requires_grad=True), torch.randn(5, 3, requires_grad=True)

        def run(x: Tensor = x, angles: Tensor = angles) -> list[Tensor]:
            out = functional.rotate(x, *functional.cos_sin(angles))
            return [out, *torch.autograd.grad(out.square().sum() + out.sum(), (x, angles))]

        got = run()
        assert counts.forward - before == (len(shape) <= 4)
        torch.testing.assert_close(got, plainly(monkeypatch, run), rtol=1e-4, atol=1e-5)
    assert functional.rotate(torch.randn(2, 0, 8), torch.ones(0, 4), torch.zeros(0, 4)).shape == (2, 0, 8)


def test_given_angles_of_a_module_are_turned_in_the_kernels(counts: Counts) -> None:
    embedding = RotarySpatialEmbedding(16, 2, 2)
    cos, sin = embedding.angles(embedding.positions(6, 0.5, (2, 3)))
    embedding.rotate(torch.randn(2, 6, 16), cos, sin)
    assert counts.forward == 1


def embedding_and_input() -> tuple[RotarySpatialEmbedding, Tensor, Tensor]:
    torch.manual_seed(0)
    return RotarySpatialEmbedding(8, 2, 2), torch.randn(2, 3, 8), torch.randn(3, 2)


def test_function_transforms_and_forward_mode_get_the_plain_form(
    counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedding, x, where = embedding_and_input()

    def energy(x: Tensor, where: Tensor) -> Tensor:
        return embedding(x, coordinates=where).pow(3).sum()

    def run() -> list[Tensor]:
        mapped = torch.func.vmap(lambda t: embedding(t[None], coordinates=where)[0])(x)
        hessian = torch.func.jacrev(torch.func.grad(energy, argnums=1), argnums=1)(x, where)
        _, tangent = torch.func.jvp(lambda w: embedding(x, coordinates=w), (where,), (torch.ones_like(where),))
        with torch.autograd.forward_ad.dual_level():
            dual = embedding(torch.autograd.forward_ad.make_dual(x, x.cos()), coordinates=where)
            return [mapped, hessian, tangent, torch.autograd.forward_ad.unpack_dual(dual).tangent]

    got = run()
    assert counts.forward == 0
    torch.testing.assert_close(got, plainly(monkeypatch, run))


class Marked(Tensor):
    """A tensor subclass."""


def test_subclasses_and_other_dtypes_get_the_plain_form(counts: Counts) -> None:
    embedding, x, where = embedding_and_input()
    embedding(x.as_subclass(Marked), coordinates=where)
    embedding(x.double(), coordinates=where)
    embedding(x, coordinates=where.as_subclass(Marked))
    assert counts.forward == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_exported_programs_hold_ordinary_operations(counts: Counts, tmp_path) -> None:
    embedding, x, _ = embedding_and_input()
    for strict in (False, True):
        program = torch.export.export(embedding.eval(), (x, 0.5, (1, 3)), strict=strict)
        assert not any("rotary_spatial" in str(node.target) for node in program.graph.nodes)
    torch.onnx.export(embedding, (x, 0.5, (1, 3)), tmp_path / "embedding.onnx", dynamo=True, verbose=False)
    assert counts.forward == 0


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_programs_hold_ordinary_operations(counts: Counts) -> None:
    embedding, x, _ = embedding_and_input()
    embedding.requires_grad_(False)  # TorchScript makes a constant of what is not handed over
    given = functional.rotate, (x.unflatten(-1, (2, 4)), *torch.randn(2, 2, 2))
    for function, inputs in ((lambda x: embedding(x, 0.5, (1, 3)), x), given):
        assert "rotary_spatial" not in str(torch.jit.trace(function, inputs, check_trace=False).graph)
    assert counts.forward == 0


@pytest.mark.parametrize("angles_learn", [True, False])
def test_second_derivatives_are_those_of_the_plain_form(
    angles_learn: bool, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an operand depends on another: partial derivatives stay partial."""
    embedding, x, where = embedding_and_input()
    embedding.freqs.requires_grad_(angles_learn)
    where.requires_grad_(angles_learn)
    x.requires_grad_()
    leaves = [t for t in (x, where, embedding.freqs) if t.requires_grad]

    def run() -> list[Tensor]:
        q = x * (1 + embedding.freqs.sum()) if angles_learn else x * 1.5
        turned = embedding.rotate_pair(q, q.sin(), coordinates=where, num_prefix_tokens=0)
        given = functional.rotate(x, *(t.flatten(1) for t in embedding.angles(where)), interleaved=False)
        out = sum(t.pow(3).sum() for t in (*turned, given))
        first = torch.autograd.grad(out, leaves, create_graph=True)
        return [*first, *torch.autograd.grad(sum(t.square().sum() for t in first), leaves)]

    got = run()
    assert counts.forward == 2
    torch.testing.assert_close(got, plainly(monkeypatch, run), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["embedding", "function"])
def test_compiled_whole_the_check_is_a_constant(kind: str, counts: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    """fullgraph=True: neither the question nor the check breaks the graph, and the kernel is in it."""
    checked = []
    monkeypatch.setattr(dispatch, "ROTATION_CHECK", SelfCheck("kernels", checked.append, "the plain form"))
    embedding, x, where = embedding_and_input()
    angles = torch.randn(3, 4)
    calls_ = {
        "embedding": lambda x: embedding(x, coordinates=where),
        "function": lambda x: functional.rotate(x, *functional.cos_sin(angles)),
    }
    expected = plainly(monkeypatch, lambda: calls_[kind](x))
    compiled = torch.compile(calls_[kind], fullgraph=True, backend="aot_eager")
    leaf = x.clone().requires_grad_()
    out = compiled(leaf)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert checked == [torch.device("cpu")]
    assert counts.forward == 1
    out.square().sum().backward()
    assert counts.backward == 1  # the kernel, not the form for second derivatives
    torch.testing.assert_close(leaf.grad, 2 * x, rtol=1e-4, atol=1e-5)
    compiled(torch.randn(5, 3, 8))
    assert len(checked) == 1


def test_one_graph_with_kernels_serves_all_sizes(counts: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    embedding = RotarySpatialEmbedding(16, 2, 2)
    graphs = CompileCounter()
    compiled = torch.compile(embedding, fullgraph=True, dynamic=True, backend=graphs)
    for batch, shape, spacing in ((2, (4, 5), 0.5), (3, (5, 4), 0.7), (2, (3, 7), 1.0)):
        x = torch.randn(batch, shape[0] * shape[1], 16)
        expected = plainly(monkeypatch, lambda x=x, shape=shape, spacing=spacing: embedding(x, spacing, shape))
        torch.testing.assert_close(compiled(x, spacing, shape), expected, rtol=1e-4, atol=1e-4)
    assert graphs.frame_count == 1
    assert counts.forward == 3


def test_compiled_function_transforms_get_the_plain_form(counts: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    embedding, x, where = embedding_and_input()
    mapped = torch.func.vmap(lambda t: embedding(t[None], coordinates=where)[0])
    got = torch.compile(mapped, fullgraph=True, backend="aot_eager")(x)
    assert counts.forward == 0
    torch.testing.assert_close(got, plainly(monkeypatch, lambda: mapped(x)))


def test_the_check_of_the_rotation_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    agreement.check_rotation(torch.device("cpu"))


def wrong(*arguments: torch.Tensor) -> None:
    arguments[2].fill_(1.0)


def broken(*arguments: object) -> None:
    raise RuntimeError("PTX assembly aborted")


@pytest.mark.parametrize(("plant", "words"), [(wrong, "turned q is off by"), (broken, "PTX assembly aborted")])
def test_a_failing_kernel_is_reported_once_and_the_plain_form_serves(
    plant: Callable[..., None], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from RoSE.kernels import launch

    monkeypatch.setattr(dispatch, "DEVICE_TYPES", ("cpu",))
    check = SelfCheck("the rotation kernels of RoSE", agreement.check_rotation, "plain PyTorch")
    monkeypatch.setattr(dispatch, "ROTATION_CHECK", check)
    embedding, x, where = embedding_and_input()
    expected = plainly(monkeypatch, lambda: embedding(x, coordinates=where))
    monkeypatch.setattr(launch, "rotate", plant)
    with pytest.warns(RuntimeWarning, match=f"plain PyTorch serves instead.*{words}") as caught:
        got = embedding(x, coordinates=where)
    assert len(caught) == 1
    assert torch.equal(got, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(embedding(x, coordinates=where), expected)
    # Asked for by name, a kernel runs, or says why not.
    if plant is broken:
        with pytest.raises(RuntimeError, match="PTX"):
            calls.rotate(x, torch.ones(3, 4), torch.zeros(3, 4))
    else:
        assert (calls.rotate(x, torch.ones(3, 4), torch.zeros(3, 4)) == 1).all()


def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        operators, "_run_rotate_positions_backward", lambda q, k, c, f, *rest: (q * 0, k * 0, c * 0, f * 0)
    )
    with pytest.raises(ArithmeticError, match="the gradient to q is off"):
        agreement.check_rotation(torch.device("cpu"))
