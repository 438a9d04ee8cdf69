"""The same results on a CUDA device as on the CPU."""

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from RoSE import (
    Grid,
    MultiResolutionBlock,
    RoSEMultiHeadAttention,
    RoSEMultiHeadCrossAttention,
    RotarySpatialEmbedding,
    dispatch,
)
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


# What a module may be told of places, by tensors that are on the GPU already, for 2 samples of 20 tokens.
PLACES: dict[str, Callable[[], dict[str, Any]]] = {
    "numbers": lambda: {"spacing": (0.5, 0.7), "grid_shape": (4, 5)},
    "spacing": lambda: {"spacing": torch.tensor([0.5, 0.7], device="cuda"), "grid_shape": (4, 5)},
    "spacing of every sample": lambda: {"spacing": torch.rand(2, 2, device="cuda") + 0.5, "grid_shape": (4, 5)},
    "grid": lambda: {"coordinates": Grid((4, 5), torch.rand(2, 2, device="cuda") + 0.5, torch.rand(2, device="cuda"))},
    "points": lambda: {"coordinates": torch.rand(2, 20, 2, device="cuda")},
    "two grids": lambda: {"coordinates": [Grid((3, 4), 1.0), Grid((2, 4), 0.5)]},
    "grids and points": lambda: {
        "coordinates": [Grid((3, 4), torch.ones(2, device="cuda")), torch.rand(8, 2, device="cuda")]
    },
    "masked": lambda: {
        "spacing": 0.5,
        "grid_shape": (4, 5),
        "valid": torch.arange(20, device="cuda").expand(2, -1) < 17,
    },
}
MODULES: dict[str, Callable[[], torch.nn.Module]] = {
    "embedding": lambda: RotarySpatialEmbedding(64, 4, 2),
    "half of it": lambda: RotarySpatialEmbedding(64, 4, 2, interleaved=False, rotary_ratio=0.5),
    "transformed": lambda: RotarySpatialEmbedding(64, 4, 2, spacing_transform="power"),
    "attention": lambda: RoSEMultiHeadAttention(64, 4, 2),
    "block": lambda: MultiResolutionBlock(64, 4, 2),
}
CALLS = [
    (module, place)
    for module, place in itertools.product(MODULES, PLACES)
    if (place != "masked" or module in ("attention", "block"))
    and (module != "transformed" or "points" not in place)  # which need a spacing beside them
    and (module != "transformed" or place != "two grids")  # of which it warns
    and (module != "block" or place not in ("two grids", "grids and points"))  # whose lists are of resolutions
]


def step_of(module: str, place: str) -> tuple[Callable[[], list[torch.Tensor]], torch.Tensor]:
    """A forward and a backward pass, and their input, which may be changed in place."""
    torch.manual_seed(0)
    made, told = MODULES[module]().cuda(), PLACES[place]()
    x = torch.randn(2, 20, 64, device="cuda", requires_grad=True)
    weight = torch.randn(2, 20, 64, device="cuda")

    def step() -> list[torch.Tensor]:
        out = made(x, **told)
        return [out.detach(), *torch.autograd.grad((out * weight).sum(), [x, *made.parameters()])]

    return step, x


@pytest.mark.parametrize(("module", "place"), CALLS)
def test_nothing_waits_for_the_gpu(module: str, place: str) -> None:
    """From the second call on: the first may look at what it is given, and keeps what it makes of numbers."""
    step, _ = step_of(module, place)
    step()
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("module", "place"), CALLS)
def test_captured_in_a_graph(module: str, place: str) -> None:
    step, x = step_of(module, place)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = step()
        with torch.no_grad():
            x.copy_(x.flip(-1))
        graph.replay()
        torch.cuda.synchronize()
        expected = step()
    torch.testing.assert_close(captured, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.inf, math.nan])
def test_a_spacing_that_nobody_looked_at_does_not_go_unnoticed(wrong: float) -> None:
    """All of its sample is NaN, and the other one is what it is by itself."""
    embedding = RotarySpatialEmbedding(64, 4, 2).cuda()
    x = torch.randn(2, 20, 64, device="cuda")
    spacing = torch.tensor([[0.5, wrong], [0.5, 0.7]], device="cuda")
    turned = embedding(x, spacing, (4, 5))
    assert turned[0].isnan().all()
    torch.testing.assert_close(turned[1:], embedding(x[1:], (0.5, 0.7), (4, 5)))
    with pytest.raises(ValueError, match="spacing must be finite and greater than 0"):
        embedding(x, spacing.cpu(), (4, 5))
