"""The same results on a CUDA device as on the CPU."""

import warnings

import pytest
import torch
from RoSE import MultiResolutionBlock, RoSEMultiHeadCrossAttention, RotarySpatialEmbedding, dispatch
from rose_cases import LAYOUTS, to_layout

pytestmark = pytest.mark.gpu  # asked for without a CUDA device, these fail rather than skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(dtype: torch.dtype, interleaved: bool, layout: str) -> None:
    torch.manual_seed(0)
    embedding = RotarySpatialEmbedding(64, 4, 2, interleaved=interleaved, rotary_ratio=0.75)
    x = to_layout(torch.randn(2, 300, 64, dtype=dtype), 4, layout)
    # Not the length of the result: no rotation changes it, and its gradients are nothing but rounding.
    weight = torch.randn(x.shape)
    results = []
    for device in ("cpu", "cuda"):
        embedding.to(device).zero_grad()
        leaf = x.detach().to(device).requires_grad_()
        out = embedding(leaf, (0.7, 1.3), (20, 15), layout=layout)
        (out.float() * weight.to(device)).sum().backward()
        # A copy: a module that moves takes the very tensors of its gradients along.
        results.append((out.detach().cpu(), leaf.grad.cpu(), embedding.freqs.grad.cpu().clone()))
    tolerance = {"rtol": 1e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-3}
    torch.testing.assert_close(results[1], results[0], **tolerance)


def test_modules() -> None:
    attention = RoSEMultiHeadCrossAttention(64, 4, 2, scale=0.25)
    block = MultiResolutionBlock(64, 4, 2)
    q = torch.randn(2, 20, 64)
    expected = attention(q, q, 0.5, (4, 5)), attention.attend(q, q, q, 0.5, (4, 5)), block(q, 0.5, (4, 5))
    attention.cuda(), block.cuda()
    q = q.cuda()
    got = attention(q, q, 0.5, (4, 5)), attention.attend(q, q, q, 0.5, (4, 5)), block(q, 0.5, (4, 5))
    torch.testing.assert_close([t.cpu() for t in got], list(expected), rtol=1e-3, atol=1e-3)


def test_far_origins_and_autocast() -> None:
    embedding = RotarySpatialEmbedding(64, 4, 2).cuda()
    x = torch.randn(1, 50, 64, device="cuda")
    where = torch.rand(50, 2, dtype=torch.float64) + 1e5
    expected = embedding(x, coordinates=where.cuda())
    torch.testing.assert_close(expected.cpu(), embedding.cpu()(x.cpu(), coordinates=where), rtol=1e-4, atol=1e-4)
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(embedding.cuda()(x, coordinates=where.cuda()), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler calls what torch has deprecated
@pytest.mark.filterwarnings("ignore:.*TensorFloat32:UserWarning")  # the compiler advises to give up precision
def test_the_kernels_pass_their_check_and_are_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.ROTATION_CHECK.passed(torch.device("cuda"))
    from RoSE.kernels import launch

    launched = []
    rotate = launch.rotate
    monkeypatch.setattr(launch, "rotate", lambda *given: (launched.append(1), rotate(*given))[1])
    block = MultiResolutionBlock(64, 4, 2).cuda()
    x = torch.randn(2, 20, 64, device="cuda")
    block(x, 0.5, (4, 5))
    assert len(launched) == 1  # q and k together
    torch.compile(block, fullgraph=True)(x, 0.5, (4, 5))
    assert len(launched) == 2


def test_second_derivatives() -> None:
    embedding = RotarySpatialEmbedding(16, 2, 2)
    results = []
    for device in ("cpu", "cuda"):
        embedding.to(device)
        x = torch.linspace(-1, 1, 6 * 16).view(1, 6, 16).to(device).requires_grad_()
        out = embedding(x, 0.5, (2, 3)).pow(3).sum()
        first = torch.autograd.grad(out, (x, embedding.freqs), create_graph=True)
        second = torch.autograd.grad(sum(t.square().sum() for t in first), (x, embedding.freqs))
        results.append([t.detach().cpu() for t in (*first, *second)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)


def test_captured_in_a_graph() -> None:
    embedding = RotarySpatialEmbedding(64, 4, 2).cuda()
    x = torch.randn(2, 20, 64, device="cuda")
    where = torch.rand(20, 2, device="cuda")
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        expected = embedding(x, coordinates=where)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = embedding(x, coordinates=where)
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)
