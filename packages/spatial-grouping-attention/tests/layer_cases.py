"""Small layers of every variant, and the algorithm of a layer written out step by step."""

from __future__ import annotations

import math

import pytest
import torch
from grouping_cases import squared_distances, window_entries
from spatial_grouping_attention import (
    DeformableSpatialGroupingAttention,
    DenseSpatialGroupingAttention,
    SparseSpatialGroupingAttention,
    SpatialGroupingAttention,
    WindowedSelfAttention,
)
from torch import Tensor

VARIANTS = {
    "dense": DenseSpatialGroupingAttention,
    "sparse": SparseSpatialGroupingAttention,
    "deformable": DeformableSpatialGroupingAttention,
}
SHAPES = {1: (13,), 2: (6, 9), 3: (4, 5, 3)}


# Of torch 2.11, about what its own loader of saved programs does.
loads_programs = pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")


def slow(*values: object) -> list[object]:
    """Parameters that only the run of slow tests takes."""
    rows = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*row, marks=pytest.mark.slow) for row in rows]


def mostly_slow(first: object, *others: object) -> list[object]:
    """Parameters of a test that exports or compiles: the first is in every run, the others in that of slow tests."""
    return [first, *slow(*others)]


def make_layer(variant: str, ndim: int = 2, *, seed: int = 0, **options: object) -> SpatialGroupingAttention:
    """A small layer in which nothing is at a special starting value, so that everything can be told apart."""
    torch.manual_seed(seed)
    settings = {"kernel_size": 3, "stride": 2, "num_heads": 2, "iters": 2, "mlp_ratio": 2, **options}
    layer = VARIANTS[variant](settings.pop("feature_dims", 8), ndim, **settings)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "freqs" not in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return layer


def full(variant: str, **options: object) -> torch.nn.Module:
    """A layer, or windowed self-attention, with every parameter that it can have."""
    options = {"temperature": "learned", "relative_bias": variant != "dense", "compactness": 2.0, **options}
    if variant in VARIANTS:
        return VARIANTS[variant](16, 2, 3, 2, norm_tokens=True, spacing_transform="power", **options)
    return WindowedSelfAttention(16, 2, 2, window=3, spacing_transform="power", **options)


def tokens(shape: tuple[int, ...], *, batch: int = 2, channels: int = 8, seed: int = 1) -> Tensor:
    """Random tokens of a grid."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, math.prod(shape), channels, generator=generator)


def grid_positions(shape: tuple[int, ...], spacing: tuple[float, ...], origin: tuple[float, ...]) -> Tensor:
    """Physical positions of the points of a grid, last axis fastest, (N, ndim) in float64."""
    axes = [o + d * torch.arange(n, dtype=torch.float64) for n, d, o in zip(shape, spacing, origin, strict=True)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)


def rotate(x: Tensor, positions: Tensor, freqs: Tensor, heads: int) -> Tensor:
    """(B, N, H * D) -> (B, H, N, D), neighbouring channels turned as a complex number by <position, wave vector>."""
    x = x.double().unflatten(-1, (heads, -1, 2)).transpose(1, 2).contiguous()
    angles = torch.einsum("nd,hpd->hnp", positions, freqs.double())
    return torch.view_as_real(torch.view_as_complex(x) * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def normed(x: Tensor, layer: SpatialGroupingAttention, name: str) -> Tensor:
    """What attention reads of x: x itself, or x with mean 0 and variance 1, scaled and shifted."""
    state = layer.state_dict()
    if f"{name}.weight" not in state:
        return x
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / (variance + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


@torch.no_grad()
def grouping_by_hand(layer: SpatialGroupingAttention, x: Tensor, shape: tuple[int, ...], spacing: tuple[float, ...]):
    """What a dense or sparse layer in float64 must return: (x_out, A), from the algorithm's description."""
    heads, ndim = layer.num_heads, len(shape)
    image = x.transpose(1, 2).unflatten(2, shape)
    conv = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)[ndim - 1]
    proposed = conv(image, layer.proposal.weight, layer.proposal.bias, layer.stride, layer.padding)
    x_out = layer.norm_proposal(proposed.flatten(2).transpose(1, 2))
    # Group j is the mean position of the tokens under the kernel at j, had the input no border.
    origin = tuple(
        d * sum(range(-p, k - p)) / k for k, p, d in zip(layer.kernel_size, layer.padding, spacing, strict=True)
    )
    coarse_spacing = tuple(d * s for d, s in zip(spacing, layer.stride, strict=True))
    fine = grid_positions(shape, spacing, (0.0,) * ndim)
    coarse = grid_positions(tuple(proposed.shape[2:]), coarse_spacing, origin)
    read = normed(x, layer, "norm_input")
    k = rotate(layer.k_proj(read), fine, layer.rotary.freqs, heads)
    v = layer.v_proj(read).unflatten(-1, (heads, -1)).transpose(1, 2)
    factor = 1.0 if layer.log_temperature is None else layer.log_temperature.double().exp()[:, None, None]
    hidden = window_entries(layer.neighbourhood(shape)) < 0
    members = None
    for step in range(max(1, layer.iters)):
        q = rotate(layer.q_proj(normed(x_out, layer, "norm_query")), coarse, layer.rotary.freqs, heads)
        scores = factor * (k @ q.mT) / math.sqrt(q.shape[-1])
        if layer.bias_table is not None:
            entries = window_entries(layer.neighbourhood(shape)).clamp(min=0)
            scores = scores + layer.bias_table.double().flatten(1)[:, entries]
        if layer.raw_compactness is not None:
            beta = layer.raw_compactness.double().exp().log1p()
            scores = scores - beta[:, None, None] * squared_distances(layer.neighbourhood(shape))
        members = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        if step < layer.iters:
            mass = members.sum(-2, keepdim=True)
            out = (members / mass.masked_fill(mass == 0, 1.0)).mT @ v
            x_out = x_out + layer.norm_attention(out.transpose(1, 2).flatten(2))
            x_out = x_out + layer.norm_mlp(layer.mlp(x_out))
    return x_out, members.mean(1)
