"""What makes it a rotary spatial embedding, over all options and one to four dimensions, in float64."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from RoSE import Grid, RotarySpatialEmbedding
from RoSE.functional import cos_sin, phases, rotate
from rose_cases import DIRECTIONS, LAYOUTS, Case, cases, formula_scores, from_layout, scores, to_layout

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@given(cases())
def test_scores_are_those_of_the_formula(case: Case) -> None:
    embedding = case.embedding()
    q, k = case.features(), case.features().flip(1)
    where = Grid(case.shape, case.spacing).coordinates()
    got = scores(embedding, *embedding.rotate_pair(q, k, case.spacing, case.shape))
    torch.testing.assert_close(got, formula_scores(embedding, q, k, where, where), **CLOSE)


@given(cases(), st.floats(-1e3, 1e3))
def test_shifting_all_positions_leaves_the_scores(case: Case, shift: float) -> None:
    embedding = case.embedding()
    q, k = case.features(), case.features().flip(1)
    here = Grid(case.shape, case.spacing)
    there = Grid(case.shape, case.spacing, origin=shift)
    expected = scores(embedding, *embedding.rotate_pair(q, k, coordinates=here))
    got = scores(embedding, *embedding.rotate_pair(q, k, coordinates=there))
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


@given(cases())
def test_rotation_keeps_norms_and_turns_back(case: Case) -> None:
    embedding = case.embedding()
    x = case.features()
    where = Grid(case.shape, case.spacing).coordinates()
    turned = embedding(x, coordinates=where)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), **CLOSE)
    torch.testing.assert_close(embedding(turned, coordinates=-where), x, **CLOSE)


@given(cases())
def test_spacing_times_index_is_the_coordinate(case: Case) -> None:
    embedding = case.embedding()
    x = case.features()
    index = Grid(case.shape).coordinates()
    by_grid = embedding(x, case.spacing, case.shape)
    torch.testing.assert_close(
        embedding(x, coordinates=index * torch.tensor(case.spacing, dtype=torch.float64)), by_grid, **CLOSE
    )
    torch.testing.assert_close(embedding(x, coordinates=Grid(case.shape, case.spacing)), by_grid, **CLOSE)


@given(cases(), st.sampled_from(LAYOUTS))
def test_layouts_agree(case: Case, layout: str) -> None:
    embedding = case.embedding()
    x = case.features()
    got = embedding(to_layout(x, case.num_heads, layout), case.spacing, case.shape, layout=layout)
    assert got.shape == to_layout(x, case.num_heads, layout).shape
    torch.testing.assert_close(from_layout(got, layout), embedding(x, case.spacing, case.shape), **CLOSE)


@given(cases(), st.integers(0, 3), st.sampled_from(LAYOUTS))
def test_prefix_tokens_pass_unrotated(case: Case, prefix: int, layout: str) -> None:
    embedding = case.embedding()
    x = case.features(case.tokens + prefix)
    laid = to_layout(x, case.num_heads, layout)
    got = embedding(laid, case.spacing, case.shape, num_prefix_tokens=prefix, layout=layout)
    got = from_layout(got, layout)
    assert torch.equal(got[:, :prefix], x[:, :prefix])
    torch.testing.assert_close(got[:, prefix:], embedding(x[:, prefix:], case.spacing, case.shape), **CLOSE)


@given(cases(), st.sampled_from(LAYOUTS))
def test_per_sample_spacing_equals_the_samples_one_by_one(case: Case, layout: str) -> None:
    embedding = case.embedding()
    x = case.features(batch=3)
    spacing = torch.tensor(case.spacing, dtype=torch.float64) * torch.tensor([[0.5], [1.0], [1.3]])
    got = embedding(to_layout(x, case.num_heads, layout), spacing, case.shape, layout=layout)
    one_by_one = [embedding(x[i : i + 1], spacing[i], case.shape) for i in range(3)]
    torch.testing.assert_close(from_layout(got, layout), torch.cat(one_by_one), **CLOSE)


@given(cases())
def test_rotate_pair_is_two_calls(case: Case) -> None:
    embedding = case.embedding()
    q, k = case.features(), case.features().flip(2)
    pair = embedding.rotate_pair(q, k, case.spacing, case.shape)
    single = embedding(q, case.spacing, case.shape), embedding(k, case.spacing, case.shape)
    assert all(torch.equal(a, b) for a, b in zip(pair, single, strict=True))


@given(cases())
def test_keys_may_lie_on_another_grid_in_the_same_frame(case: Case) -> None:
    embedding = case.embedding()
    coarse = Grid(tuple(2 for _ in case.shape), tuple(2 * s for s in case.spacing), origin=0.25)
    q, k = case.features(), case.features(coarse.size)
    fine = Grid(case.shape, case.spacing)
    got = scores(embedding, *embedding.rotate_pair(q, k, coordinates=fine, k_coordinates=coarse))
    expected = formula_scores(embedding, q, k, fine.coordinates(), coarse.coordinates())
    torch.testing.assert_close(got, expected, **CLOSE)


@given(cases(interleaved=True))
def test_half_and_interleaved_are_one_permutation_apart(case: Case) -> None:
    neighbours, halves = case.embedding(), case.embedding(interleaved=False)
    planes = neighbours.freqs.shape[1]
    order = torch.arange(case.head_dim)
    order[: 2 * planes] = torch.arange(2 * planes).view(planes, 2).t().flatten()
    x = case.features()
    x_halves = to_layout(x, case.num_heads, "bnhd")[..., order].flatten(2)
    turned = to_layout(neighbours(x, case.spacing, case.shape), case.num_heads, "bnhd")[..., order].flatten(2)
    torch.testing.assert_close(halves(x_halves, case.spacing, case.shape), turned, **CLOSE)


@pytest.mark.parametrize("directions", DIRECTIONS)
@pytest.mark.parametrize("spatial_dims", [1, 2, 3, 4])
def test_different_displacements_score_differently(spatial_dims: int, directions: str) -> None:
    """No two displacements of a grid turn all planes of a head alike (with a plane per axis in every head)."""
    embedding = RotarySpatialEmbedding(64, 4, spatial_dims, directions=directions, learnable=False, dtype=torch.float64)
    reach = {1: 40, 2: 7, 3: 4, 4: 3}[spatial_dims]
    apart = Grid((reach,) * spatial_dims, 1.0, origin=-(reach // 2)).coordinates()
    angles = phases(apart, embedding.freqs)
    seen = torch.stack((angles.cos(), angles.sin()), dim=-1).flatten(-2).transpose(0, 1)
    distance = torch.cdist(seen, seen) + 10 * torch.eye(len(apart))
    assert distance.min() > 1e-2


@given(cases(rotary_ratio=1.0, rotary_partition="channels", learnable=False))
def test_every_head_spans_the_same_full_band(case: Case) -> None:
    embedding = case.embedding()
    lengths = embedding.freqs.norm(dim=-1) * 4.0  # radians per reference spacing
    torch.testing.assert_close(lengths.amax(1), torch.ones(case.num_heads).double(), **CLOSE)
    torch.testing.assert_close(lengths.amin(1), lengths.amin().expand(case.num_heads), **CLOSE)
    if dict(case.options)["frequency_scaling"] == "none" and case.spatial_dims == 1:
        last = dict(case.options)["base_theta"] ** (1 / embedding.freqs.shape[1] - 1)
        assert lengths.min().item() == pytest.approx(last)


@given(cases(rotary_ratio=0.0))
def test_ratio_zero_returns_its_argument(case: Case) -> None:
    x = case.features()
    assert case.embedding()(x, case.spacing, case.shape) is x


@given(cases(), st.sampled_from([0.05, 0.2, 0.5, 0.75, 0.9, 1.0]))
def test_partial_rotation_turns_what_it_says(case: Case, ratio: float) -> None:
    # Axial directions are refused where not even all heads together have a plane for every axis.
    assume(dict(case.options)["directions"] != "axial" or ratio * case.dim / 2 > 2 * case.spatial_dims)
    embedding = case.embedding(rotary_ratio=ratio)
    x = case.features()
    where = Grid(case.shape, case.spacing, origin=3.7)
    changed = to_layout(embedding(x, coordinates=where) != x, case.num_heads, "bnhd").any(0).any(0)
    if embedding.rotary_partition == "heads":
        heads = max(1, math.floor(ratio * case.num_heads + 0.5))
        assert changed[:heads].all()
        assert not changed[heads:].any()
    else:
        channels = 2 * max(1, math.floor(ratio * case.head_dim / 2 + 0.5))
        assert not changed[:, channels:].any()
        if channels > 2 * case.spatial_dims:  # every head then has a plane that turns
            assert changed[:, :channels].any(1).all()


@given(st.integers(1, 5), st.integers(1, 4), st.booleans(), st.integers(0, 3))
def test_rotate_accepts_any_rank_and_broadcast(rank: int, planes: int, interleaved: bool, rest: int) -> None:
    torch.manual_seed(rank)
    x = torch.randn(*(2,) * (rank - 1), 2 * planes + rest, dtype=torch.float64)
    for angle_rank in range(1, rank + 1):
        angles = torch.randn(*(2,) * (angle_rank - 1), planes, dtype=torch.float64)
        cos, sin = cos_sin(angles, torch.float64)
        got = rotate(x, cos, sin, interleaved=interleaved)
        first, second = (
            (x[..., 0 : 2 * planes : 2], x[..., 1 : 2 * planes : 2])
            if interleaved
            else (x[..., :planes], x[..., planes : 2 * planes])
        )
        turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
        pair = torch.view_as_real(turned).flatten(-2) if interleaved else torch.cat((turned.real, turned.imag), -1)
        torch.testing.assert_close(got, torch.cat((pair, x[..., 2 * planes :]), -1), **CLOSE)
