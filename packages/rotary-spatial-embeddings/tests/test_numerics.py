"""Accuracy against float64, whatever dtype, autocast state or cast the module is in."""

import pytest
import torch
from RoSE import Grid, RoSEMultiHeadCrossAttention, RotarySpatialEmbedding
from RoSE.functional import cos_sin, phases
from rose_cases import LAYOUTS, to_layout

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients_are_as_good_as_the_dtype(dtype: torch.dtype, interleaved: bool, layout: str) -> None:
    torch.manual_seed(0)
    exact = RotarySpatialEmbedding(64, 4, 2, interleaved=interleaved, rotary_ratio=0.75, dtype=torch.float64)
    with torch.no_grad():
        exact.freqs.copy_(exact.freqs.float())
    used = RotarySpatialEmbedding(64, 4, 2, interleaved=interleaved, rotary_ratio=0.75)
    used.load_state_dict(exact.state_dict())
    used.to(dtype)
    x = to_layout(torch.randn(2, 300, 64), 4, layout).to(dtype)
    weight = torch.randn(x.shape, dtype=torch.float64)
    where = Grid((20, 15), (0.7, 1.3), origin=50.0).coordinates()

    def run(module: torch.nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
        features = x.to(dtype, copy=True).requires_grad_()
        points = where.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        out = module(features, coordinates=points, layout=layout)
        assert out.dtype == dtype
        (out * weight.to(dtype)).sum().backward()
        return [out.detach(), features.grad, points.grad, module.freqs.grad]

    for got, oracle in zip(run(used, dtype), run(exact, torch.float64), strict=True):
        assert relative_error(got, oracle) < TOLERANCE[dtype]


def test_origins_far_away_cost_no_accuracy() -> None:
    """Voxels of 0.004 at 1e5 units from zero: angles good to 1e-6, where float32 positions step by 0.008."""
    embedding = RotarySpatialEmbedding(64, 4, 3, reference_spacing=0.004, learnable=False, dtype=torch.float64)
    where = Grid((3, 4, 5), 0.004, origin=(1e5, -1e5, 3e4)).coordinates()
    angles = phases(where, embedding.freqs)
    cos, sin = cos_sin(angles)
    torch.testing.assert_close(cos.double(), angles.cos(), rtol=0, atol=1e-6)
    torch.testing.assert_close(sin.double(), angles.sin(), rtol=0, atol=1e-6)
    x = torch.randn(1, 60, 64)
    near = embedding.float()(x, 0.004, (3, 4, 5))
    far = embedding(x, coordinates=Grid((3, 4, 5), 0.004, origin=(1e5, -1e5, 3e4)))
    same = [t.unflatten(-1, (4, 16)).transpose(1, 2) for t in (near, far)]
    torch.testing.assert_close(*(t @ t.transpose(-1, -2) for t in same), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_modules_keep_float32_wavelengths(dtype: torch.dtype) -> None:
    embedding = RotarySpatialEmbedding(64, 4, 2, spacing_transform="log")
    before = embedding.freqs.detach().clone()
    embedding.to(dtype)
    assert all(p.dtype == torch.float32 for p in embedding.parameters())
    assert torch.equal(embedding.freqs, before)
    wrapped = torch.nn.Sequential(torch.nn.Linear(64, 64), embedding).to(dtype)
    assert wrapped[0].weight.dtype == dtype
    assert wrapped[1].freqs.dtype == torch.float32
    assert wrapped[1](torch.randn(1, 6, 64, dtype=dtype), 1.0, (2, 3)).dtype == dtype
    assert embedding.double().freqs.dtype == torch.float64


def test_autocast_does_not_touch_angles() -> None:
    embedding = RotarySpatialEmbedding(64, 4, 2)
    x = torch.randn(1, 2500, 64)
    expected = embedding(x, 0.9, (50, 50))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(embedding(x, 0.9, (50, 50)), expected)


def test_inference_mode_results_do_not_leak_into_training() -> None:
    embedding = RotarySpatialEmbedding(64, 4, 2)
    x = torch.randn(1, 6, 64, requires_grad=True)
    with torch.inference_mode():
        embedding(x, 0.5, (2, 3))
    embedding(x, 0.5, (2, 3)).sum().backward()
    assert x.grad is not None


def test_scores_of_half_inputs_stay_close_to_float64() -> None:
    torch.manual_seed(0)
    attention = RoSEMultiHeadCrossAttention(64, 4, 2, scale=0.25)
    q, k, v = torch.randn(3, 1, 100, 64).unbind()
    exact = attention.attend(q.double(), k.double(), v.double(), 0.5, (10, 10))
    half = attention.attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), 0.5, (10, 10))
    assert relative_error(half, exact) < 1e-2
