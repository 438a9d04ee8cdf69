"""The rotations of established libraries, reproduced with the options that describe them."""

import contextlib
import math

import peers
import pytest
import torch
from RoSE import Grid, RotarySpatialEmbedding

HEADS, HEAD_DIM, HEIGHT, WIDTH = 3, 32, 5, 7
FIXED = {"learnable": False, "directions": "axial", "frequency_scaling": "none"}


def features(tokens: int = HEIGHT * WIDTH) -> torch.Tensor:
    return torch.randn(2, HEADS, tokens, HEAD_DIM, generator=torch.Generator().manual_seed(0))


def embedding(spatial_dims: int, **options: object) -> RotarySpatialEmbedding:
    return RotarySpatialEmbedding(HEADS * HEAD_DIM, HEADS, spatial_dims, **FIXED | options)


def test_one_axial_dimension_is_textbook_rope() -> None:
    """RoFormer (arXiv:2104.09864), equation 34: theta_i = 10000 ** (-2 i / d), neighbouring channels paired."""
    x = features(20)
    angles = torch.arange(20.0)[:, None] * 10000 ** (-2 * torch.arange(HEAD_DIM // 2) / HEAD_DIM)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)
    expected = torch.view_as_real(pairs).flatten(-2)
    torch.testing.assert_close(embedding(1)(x, layout="bhnd"), expected, rtol=1e-5, atol=1e-5)


def test_half_layout_is_the_convention_of_transformers_and_flash_attention() -> None:
    """``x * cos + rotate_half(x) * sin`` with the table repeated over both halves, as in Llama and GPT-NeoX."""
    x = features(20)
    inverse = 1.0 / 10000 ** (torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM)
    table = torch.outer(torch.arange(20.0), inverse)
    cos, sin = torch.cat((table, table), -1).cos(), torch.cat((table, table), -1).sin()
    half = torch.cat((-x[..., HEAD_DIM // 2 :], x[..., : HEAD_DIM // 2]), -1)
    got = embedding(1, interleaved=False)(x, layout="bhnd")
    torch.testing.assert_close(got, x * cos + half * sin, rtol=1e-5, atol=1e-5)


def test_two_axial_dimensions_are_timms() -> None:
    layers = peers.timm_layers()
    rope = layers.RotaryEmbeddingCat(HEAD_DIM, temperature=100.0, in_pixels=False)
    expected = layers.apply_rot_embed_cat(features(), rope.get_embed([HEIGHT, WIDTH]))
    got = embedding(2, base_theta=100.0)(features(), 1.0, (HEIGHT, WIDTH), layout="bhnd")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("periods", [{"temperature": 100.0}, {"min_period": 0.1, "max_period": 8.0}])
def test_centred_coordinates_are_dinov3s(periods: dict[str, float]) -> None:
    """DINOv3 (arXiv:2508.10104) measures positions in units of half the image, from -1 to 1, in the half layout."""
    layers = peers.timm_layers()
    rope = layers.RotaryEmbeddingDinoV3(HEAD_DIM, **periods)
    expected = layers.apply_rot_embed_cat(features(), rope.get_embed([HEIGHT, WIDTH]), half=True)
    band = (
        {"base_theta": 100.0, "reference_spacing": 1 / (2 * math.pi)}
        if "temperature" in periods
        else {"wavelengths": (periods["min_period"], periods["max_period"])}
    )
    grid = Grid((HEIGHT, WIDTH), (2 / HEIGHT, 2 / WIDTH), origin=(1 / HEIGHT - 1, 1 / WIDTH - 1))
    with pytest.warns(match="alias") if "min_period" in periods else contextlib.nullcontext():
        got = embedding(2, interleaved=False, **band)(features(), coordinates=grid, layout="bhnd")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_mixed_can_load_rope_vits_frequencies() -> None:
    """RoPE-Mixed (arXiv:2403.13298) through timm, whose frequencies are (x and y, depth, heads, planes)."""
    layers = peers.timm_layers()
    rope = layers.RotaryEmbeddingMixed(HEADS * HEAD_DIM, depth=2, num_heads=HEADS)
    for depth in range(2):
        expected = layers.apply_rot_embed_cat(features(), rope.get_embed([HEIGHT, WIDTH])[depth])
        mixed = RotarySpatialEmbedding(HEADS * HEAD_DIM, HEADS, 2)
        x_and_y = rope.freqs.detach()[:, depth]
        mixed.load_state_dict({"freqs": torch.stack((x_and_y[1], x_and_y[0]), dim=-1)})
        got = mixed(features(), 1.0, (HEIGHT, WIDTH), layout="bhnd")
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_mixed_starts_as_rope_vits_does() -> None:
    """Two perpendicular directions a head, each with the same log-spaced band, another angle in every head."""
    layers = peers.timm_layers()
    theirs = layers.RotaryEmbeddingMixed(HEADS * HEAD_DIM, depth=1, num_heads=HEADS, temperature=10.0).freqs
    ours = embedding(2, directions="mixed", base_theta=10.0).freqs
    torch.testing.assert_close(ours.norm(dim=-1), theirs.detach()[:, 0].norm(dim=0), rtol=1e-5, atol=1e-6)


def test_rotary_embedding_torch_in_one_and_two_dimensions() -> None:
    library = peers.rotary_embedding_torch()
    line = library.RotaryEmbedding(dim=HEAD_DIM, cache_if_possible=False)
    expected = line.rotate_queries_or_keys(features(20))
    torch.testing.assert_close(embedding(1)(features(20), layout="bhnd"), expected.detach(), rtol=1e-5, atol=1e-5)

    plane = library.RotaryEmbedding(dim=HEAD_DIM // 2, cache_if_possible=False)
    table = plane.get_axial_freqs(HEIGHT, WIDTH)
    image = features().unflatten(2, (HEIGHT, WIDTH))
    expected = library.apply_rotary_emb(table, image).flatten(2, 3)
    got = embedding(2)(features(), 1.0, (HEIGHT, WIDTH), layout="bhnd")
    torch.testing.assert_close(got, expected.detach(), rtol=1e-5, atol=1e-5)
