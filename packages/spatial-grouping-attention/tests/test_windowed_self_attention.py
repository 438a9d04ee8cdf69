"""Self-attention in a window: against masked attention written out, and the positions in physical units."""

import math

import pytest
import torch
from grouping_cases import assert_near
from layer_cases import SHAPES, grid_positions, rotate, tokens
from RoSE import Grid
from spatial_grouping_attention import WindowedSelfAttention


def make(ndim: int = 2, *, seed: int = 0, **options: object) -> WindowedSelfAttention:
    torch.manual_seed(seed)
    layer = WindowedSelfAttention(8, 2, ndim, **options)
    for parameter in (layer.bias_table, layer.log_temperature, layer.raw_compactness):
        if parameter is not None:
            torch.nn.init.normal_(parameter)
    return layer


@torch.no_grad()
def by_hand(layer: WindowedSelfAttention, x: torch.Tensor, shape: tuple[int, ...], spacing: tuple[float, ...]):
    q, k, v = layer.qkv(x).chunk(3, -1)
    positions = grid_positions(shape, spacing, (0.0,) * len(shape))
    q, k = (rotate(t, positions, layer.rotary.freqs, 2) for t in (q, k))
    v = v.unflatten(-1, (2, -1)).transpose(1, 2)
    scores = q @ k.mT / math.sqrt(4)
    if layer.log_temperature is not None:
        scores = scores * layer.log_temperature.double().exp()[:, None, None]
    indices = torch.cartesian_prod(*(torch.arange(n) for n in shape)).reshape(-1, len(shape))
    steps = indices[None, :] - indices[:, None]
    if layer.window is not None:
        window, dilation = torch.tensor(layer.window), torch.tensor(layer.dilation)
        seen = ((steps % dilation == 0) & (steps.abs() <= dilation * (window // 2))).all(-1)
        scores = scores.masked_fill(~seen, -torch.inf)
        if layer.bias_table is not None:
            entries = (steps.div(dilation, rounding_mode="floor") + window // 2).clamp(min=0)
            entries = torch.minimum(entries, window - 1)
            scores = scores + layer.bias_table.double()[(slice(None), *entries.unbind(-1))]
    if layer.raw_compactness is not None:
        beta = layer.raw_compactness.double().exp().log1p()
        scores = scores - beta[:, None, None] * steps.square().sum(-1)
    out = scores.softmax(-1) @ v
    return layer.proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"window": None},
        {"window": 3},
        {"window": 5, "dilation": 2, "relative_bias": True},
        {"window": 1},
        {"temperature": "learned"},
        {"window": None, "dilation": 2, "compactness": 1.0},
        {"window": 5, "dilation": 2, "compactness": 1.0},
    ],
    ids=str,
)
def test_it_is_masked_attention(ndim: int, options: dict[str, object]) -> None:
    layer = make(ndim, **options).double()
    x, spacing = tokens(SHAPES[ndim]).double(), (0.5, 1.0, 2.0)[:ndim]
    assert_near(layer(x, spacing, SHAPES[ndim]), by_hand(layer, x, SHAPES[ndim], spacing), 1e-6)


def test_spacing_per_sample_and_by_default() -> None:
    layer, x, shape = make(spacing=(0.5, 2.0)), tokens((6, 9)), (6, 9)
    assert torch.equal(layer(x, grid_shape=shape), layer(x, (0.5, 2.0), shape))
    spacings = torch.tensor([[0.5, 1.0], [1.5, 0.25]])
    together = layer(x, spacings, shape)
    for i, spacing in enumerate(spacings.tolist()):
        assert_near(together[i : i + 1], layer(x[i : i + 1], spacing, shape), 1e-5)
    assert (layer(x, 1.0, shape) - layer(x, 0.25, shape)).abs().max() > 1e-3


def test_a_grid_is_spacing_and_shape_in_one() -> None:
    layer, x = make(), tokens((6, 9))
    want = layer(x, (0.5, 2.0), (6, 9))
    for origin in (0.0, (1e5, -2.0), torch.zeros(2, 2)):
        assert torch.equal(layer(x, grid=Grid((6, 9), (0.5, 2.0), origin)), want)


def test_positions_enter_through_the_module_so_that_hooks_see_them() -> None:
    layer, seen = make(), []
    layer.rotary.register_forward_hook(lambda *_: seen.append(1))
    layer(tokens((6, 9)), 1.0, (6, 9))
    assert len(seen) == 1


def test_every_parameter_gets_a_gradient_and_dropout_ends_with_training() -> None:
    layer, x = make(relative_bias=True, window=3, proj_dropout=0.5, temperature="learned"), tokens((6, 9))
    layer(x, 1.0, (6, 9)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    layer.eval()
    assert torch.equal(layer(x, 1.0, (6, 9)), layer(x, 1.0, (6, 9)))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"window": 4}, ValueError, r"window must be odd on every axis; got \(4, 4\)"),
        (
            {"window": None, "relative_bias": True},
            ValueError,
            "window must be a fixed size .*relative_bias.*; got None",
        ),
        ({"dilation": 0}, ValueError, "dilation must be at least 1"),
        ({"proj_dropout": 1.0}, ValueError, r"proj_dropout must be in \[0, 1\); got 1\.0"),
        ({"num_heads": 3}, ValueError, "dim must be divisible by num_heads; got dim=8, num_heads=3"),
        ({"dim": 6}, ValueError, "dim / num_heads must be even"),
        ({"backend": "best"}, ValueError, "backend must be one of .*; got 'best'"),
        ({"temperature": "high"}, ValueError, "temperature must be one of 'fixed', 'learned'; got 'high'"),
        ({"relative_bias": 1}, TypeError, "relative_bias must be True or False; got 1"),
        ({"spacing": torch.ones(2)}, TypeError, "spacing must be a number or one number per axis; got a tensor"),
        ({"spacing": -1}, ValueError, "spacing must be greater than 0; got -1"),
        ({"bases": 3}, TypeError, r"WindowedSelfAttention\(\) got an unexpected keyword argument 'bases'"),
    ],
)
def test_bad_construction(change: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        WindowedSelfAttention(**{"dim": 8, "num_heads": 2, "spatial_dims": 2, **change})
