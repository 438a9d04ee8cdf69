"""Shapes and types of what comes out, written as annotations that are checked at every call."""

import torch
from beartype import beartype
from jaxtyping import Float, Float32, Float64, jaxtyped
from RoSE import (
    Grid,
    MultiResolutionBlock,
    RoSEMultiHeadAttention,
    RoSEMultiHeadCrossAttention,
    RotarySpatialEmbedding,
    functional,
)
from torch import Tensor

# Axes that could be taken for one another differ in size.
BATCH, HEADS, CHANNELS, GRID = 2, 3, 24, (5, 7)
ROTARY = RotarySpatialEmbedding(CHANNELS, HEADS, 2)
X, CONTEXT = torch.randn(BATCH, 35, CHANNELS), torch.randn(BATCH, 4, CHANNELS)

checked = jaxtyped(typechecker=beartype)


@checked
def phases(
    coordinates: Float64[Tensor, "*batch tokens axes"], freqs: Float[Tensor, "heads planes axes"]
) -> Float64[Tensor, "*batch tokens heads planes"]:
    return functional.phases(coordinates, freqs)


@checked
def rotate(
    x: Float[Tensor, "batch tokens heads channels"], cos: Float32[Tensor, "tokens heads planes"], sin: Tensor
) -> Float[Tensor, "batch tokens heads channels"]:
    return functional.rotate(x, cos, sin)


@checked
def embed(x: Float[Tensor, "batch tokens channels"]) -> Float[Tensor, "batch tokens channels"]:
    return ROTARY(x, 0.5, GRID)


@checked
def embed_pair(
    q: Float[Tensor, "batch heads queries channels"], k: Float[Tensor, "batch heads keys channels"]
) -> tuple[Float[Tensor, "batch heads queries channels"], Float[Tensor, "batch heads keys channels"]]:
    return ROTARY.rotate_pair(q, k, 0.5, GRID, 2.0, (2, 2), layout="bhnd")


@checked
def scores(
    q: Float[Tensor, "batch queries channels"], k: Float[Tensor, "batch keys channels"]
) -> Float[Tensor, "batch heads=3 queries keys"]:
    return RoSEMultiHeadCrossAttention(CHANNELS, HEADS, 2)(q, k, 0.5, GRID, 2.0, (2, 2))


@checked
def attend(
    q: Float[Tensor, "batch queries channels"],
    k: Float[Tensor, "batch keys channels"],
    v: Float[Tensor, "batch keys values"],
) -> Float[Tensor, "batch queries values"]:
    return RoSEMultiHeadCrossAttention(CHANNELS, HEADS, 2).attend(q, k, v, 0.5, GRID, 2.0, (2, 2))


@checked
def project(
    x: Float[Tensor, "batch queries channels"], context: Float[Tensor, "batch keys other"]
) -> Float[Tensor, "batch queries channels"]:
    attention = RoSEMultiHeadAttention(x.shape[-1], HEADS, 2, context_dim=context.shape[-1])
    return attention(x, 0.5, GRID, 2.0, (2, 2), context=context)


@checked
def block(x: Float[Tensor, "batch tokens channels"]) -> Float[Tensor, "batch tokens channels"]:
    return MultiResolutionBlock(CHANNELS, HEADS, 2)(x, 0.5, GRID)


def test_functions() -> None:
    angles = phases(Grid(GRID, 0.5).coordinates(), ROTARY.freqs)
    cos, sin = functional.cos_sin(angles)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        x = torch.randn(BATCH, 35, HEADS, CHANNELS // HEADS, dtype=dtype)
        assert rotate(x, cos, sin).dtype == dtype
    phases(torch.randn(2, 3, 35, 2).double(), ROTARY.freqs)


def test_modules() -> None:
    embed(X)
    embed_pair(*(torch.randn(BATCH, HEADS, n, CHANNELS // HEADS) for n in (35, 4)))
    scores(X, CONTEXT)
    attend(X, CONTEXT, torch.randn(BATCH, 4, 6))
    project(X, torch.randn(BATCH, 4, 10))
    block(X)
