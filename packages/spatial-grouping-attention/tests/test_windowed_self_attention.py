"""Self-attention in a window: against masked attention written out, and the positions in physical units."""

import math

import pytest
import torch
from grouping_cases import assert_near
from layer_cases import SHAPES, grid_positions, rotate, tokens
from spatial_grouping_attention import WindowedSelfAttention


def make(ndim: int = 2, *, seed: int = 0, **options: object) -> WindowedSelfAttention:
    torch.manual_seed(seed)
    layer = WindowedSelfAttention(8, ndim, 2, **options)
    if layer.bias_table is not None:
        torch.nn.init.normal_(layer.bias_table)
    return layer


@torch.no_grad()
def by_hand(layer: WindowedSelfAttention, x: torch.Tensor, shape: tuple[int, ...], spacing: tuple[float, ...]):
    q, k, v = layer.to_qkv(x).chunk(3, -1)
    positions = grid_positions(shape, spacing, (0.0,) * len(shape))
    q, k = (rotate(t, positions, layer.rotary.freqs, 2) for t in (q, k))
    v = v.unflatten(-1, (2, -1)).transpose(1, 2)
    scores = q @ k.mT / math.sqrt(4)
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
    out = scores.softmax(-1) @ v
    return layer.project(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [{"window": None}, {"window": 3}, {"window": 5, "dilation": 2, "relative_bias": True}, {"window": 1}],
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


def test_every_parameter_gets_a_gradient_and_dropout_ends_with_training() -> None:
    layer, x = make(relative_bias=True, window=3, dropout=0.5), tokens((6, 9))
    layer(x, 1.0, (6, 9)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    layer.eval()
    assert torch.equal(layer(x, 1.0, (6, 9)), layer(x, 1.0, (6, 9)))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"window": 4}, ValueError, r"window must be odd on every axis, got \(4, 4\)"),
        ({"window": None, "relative_bias": True}, ValueError, "relative_bias needs a window.* got window=None"),
        ({"dilation": 0}, ValueError, "dilation must be at least 1"),
        ({"dropout": 1.5}, ValueError, r"dropout must lie in \[0, 1\), got 1\.5"),
        ({"num_heads": 3}, ValueError, "num_heads must divide dims, got dims=8 and num_heads=3"),
        ({"backend": "best"}, ValueError, "backend must be one of .* got 'best'"),
        ({"spacing": -1}, ValueError, "spacing must be greater than 0; got -1"),
        ({"bases": 3}, TypeError, "bases"),
    ],
)
def test_bad_construction(change: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        WindowedSelfAttention(**{"dims": 8, "spatial_dims": 2, "num_heads": 2, **change})
