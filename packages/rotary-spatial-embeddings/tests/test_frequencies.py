import math
import warnings
from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from RoSE import AliasingWarning, RotarySpatialEmbedding
from rose_cases import DIRECTIONS, SCALINGS


def make(spatial_dims: int = 2, **options: object) -> RotarySpatialEmbedding:
    return RotarySpatialEmbedding(
        **{"dim": 256, "num_heads": 8, "dtype": torch.float64, "learnable": False}
        | {"spatial_dims": spatial_dims}
        | options
    )


@pytest.mark.parametrize("spatial_dims", [1, 2, 3, 4])
def test_scaling_narrows_the_band_as_documented(spatial_dims: int) -> None:
    def ratio(scaling: str) -> float:
        lengths = make(spatial_dims, frequency_scaling=scaling, directions="uniform").freqs.norm(dim=-1)[0]
        return float((lengths[0] / lengths[-1]).item() ** (len(lengths) / (len(lengths) - 1)))

    assert ratio("none") == pytest.approx(1e4)
    assert ratio("linear") == pytest.approx(1e4 ** (1 / spatial_dims))
    assert ratio("sqrt") == pytest.approx(1e4 ** (1 / math.sqrt(spatial_dims)))
    assert ratio("adaptive") == pytest.approx(min(1e4, 4 ** (16 / spatial_dims)))


@pytest.mark.parametrize("directions", DIRECTIONS)
@pytest.mark.parametrize("ratio", [0.75, 1.0])
def test_adaptive_spans_a_useful_band(directions: str, ratio: float) -> None:
    lengths = make(3, frequency_scaling="adaptive", directions=directions, rotary_ratio=ratio).freqs.norm(dim=-1)
    assert (lengths.amax(1) / lengths.amin(1) >= 10).all()


@given(st.sampled_from(DIRECTIONS), st.integers(1, 4), st.floats(0.01, 1), st.floats(2, 1000))
def test_wavelengths_include_both_ends(directions: str, spatial_dims: int, shortest: float, ratio: float) -> None:
    freqs = make(spatial_dims, directions=directions, wavelengths=(shortest, shortest * ratio)).freqs
    lengths = 2 * math.pi / freqs.norm(dim=-1)
    torch.testing.assert_close(lengths.amin(1), torch.full((8,), shortest, dtype=torch.float64))
    torch.testing.assert_close(lengths.amax(1), torch.full((8,), shortest * ratio, dtype=torch.float64))


def test_both_ends_may_be_one_wavelength() -> None:
    lengths = 2 * math.pi / make(2, directions="uniform", wavelengths=(6.0, 6.0)).freqs.norm(dim=-1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 6.0))


def test_a_band_of_two_planes_is_its_ends() -> None:
    freqs = make(1, dim=32, wavelengths=(0.5, 40.0)).freqs
    assert freqs.shape == (8, 2, 1)
    torch.testing.assert_close(2 * math.pi / freqs[..., 0], torch.tensor([[0.5, 40.0]]).double().expand(8, 2))


def test_no_plane_at_all_has_the_form_of_others() -> None:
    for directions in DIRECTIONS:
        freqs = make(2, directions=directions, rotary_ratio=0).freqs
        assert (freqs.shape, freqs.dtype) == ((8, 0, 2), torch.float64)


def test_axial_planes_lie_on_one_axis_with_a_band_each() -> None:
    freqs = make(3, directions="axial", dim=192).freqs  # 12 planes a head
    assert ((freqs != 0).sum(-1) == 1).all()
    for axis in range(3):
        band = freqs[0, freqs[0, :, axis] != 0, axis]
        torch.testing.assert_close(band, (1e4 ** (1 / math.sqrt(3))) ** (-torch.arange(4).double() / 4))


def test_planes_that_do_not_divide_go_to_other_axes_in_other_heads() -> None:
    counts = (make(3, directions="axial").freqs != 0).sum(1)  # 16 planes over 3 axes
    assert counts.max() - counts.min() == 1
    assert counts.sum(0).max() - counts.sum(0).min() <= 1
    # A head's go on where those of the head before ended.
    counts = (make(3, directions="axial", dim=30, num_heads=3).freqs != 0).sum(1)  # 5 planes over 3 axes
    assert counts.tolist() == [[2, 2, 1], [2, 1, 2], [1, 2, 2]]


def test_mixed_heads_look_along_different_directions() -> None:
    freqs = make(2).freqs
    angles = torch.atan2(freqs[:, 0, 1], freqs[:, 0, 0]).remainder(math.pi / 2).sort().values
    assert angles.diff().min() > math.radians(3)
    for head in freqs:  # an axial frame, turned: two perpendicular directions
        unit = head / head.norm(dim=-1, keepdim=True)
        overlap = (unit @ unit.t()).abs()
        assert ((overlap < 1e-9) | (overlap > 1 - 1e-9)).all()


@pytest.mark.parametrize("spatial_dims", [2, 3, 4])
def test_frames_of_mixed_heads_are_turned_within_a_quarter_and_evenly(spatial_dims: int) -> None:
    """Proper rotations in any number of dimensions; in two their angles can be told, and are spread evenly."""
    planes, heads = 4 * spatial_dims, 16
    freqs = make(spatial_dims, num_heads=heads, dim=2 * planes * heads).freqs
    frames = freqs[:, ::4]  # the fastest plane of every axis
    frames = frames / frames.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(torch.linalg.det(frames), torch.ones(heads, dtype=torch.float64))
    if spatial_dims == 2:
        turns = torch.atan2(frames[:, 0, 1], frames[:, 0, 0]).sort().values
        assert turns.min() > 0
        assert turns.max() < math.pi / 2
        round_trip = torch.cat([turns, turns[:1] + math.pi / 2])
        assert round_trip.diff().max() < 2 * math.pi / 2 / heads
        assert round_trip.diff().min() > math.pi / 2 / heads / 3


@pytest.mark.parametrize("spatial_dims", [1, 2, 3, 4])
def test_uniform_directions_lie_in_half_of_a_sphere(spatial_dims: int) -> None:
    """A wave and its opposite say the same; none is on the border, which both halves would have."""
    freqs = make(spatial_dims, directions="uniform", dim=1024, num_heads=16).freqs.flatten(0, 1)
    assert (freqs[:, 0] > 0).all()


def test_uniform_directions_are_those_of_the_sequence_to_the_last_digit() -> None:
    """Multiples of the powers of 1/g, with g**3 = g + 1, as quantiles of the normal distribution."""
    g = ((9 + math.sqrt(69)) / 18) ** (1 / 3) + ((9 - math.sqrt(69)) / 18) ** (1 / 3)  # the plastic number
    freqs = make(2, directions="uniform").freqs.flatten(0, 1)
    points = [[(0.5 + n / g**power) % 1 for power in (1, 2)] for n in range(1, len(freqs) + 1)]
    places = torch.tensor([[NormalDist().inv_cdf(x) for x in point] for point in points], dtype=torch.float64)
    want = places / places.norm(dim=-1, keepdim=True) * places[:, :1].sign()
    torch.testing.assert_close(freqs / freqs.norm(dim=-1, keepdim=True), want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("spatial_dims", [2, 3, 4])
def test_uniform_directions_favour_none(spatial_dims: int) -> None:
    freqs = make(spatial_dims, directions="uniform", dim=1024, num_heads=16).freqs.flatten(0, 1)
    unit = freqs / freqs.norm(dim=-1, keepdim=True)
    second_moment = unit.t() @ unit / len(unit)
    torch.testing.assert_close(second_moment, torch.eye(spatial_dims).double() / spatial_dims, rtol=0, atol=0.04)


def test_reference_spacing_sets_the_unit_per_axis() -> None:
    unit, scaled = make(2).freqs, make(2, reference_spacing=(0.5, 4.0)).freqs
    torch.testing.assert_close(scaled, unit / torch.tensor([0.5, 4.0]).double())


def test_jitter_is_reproducible_keeps_directions_and_only_touches_learnable() -> None:
    def with_seed(seed: int, **options: object) -> torch.Tensor:
        torch.manual_seed(seed)
        return make(3, directions="axial", **options).freqs.detach()

    exact = with_seed(0)
    assert torch.equal(exact, with_seed(1, init_jitter_std=0.5))
    jittered = with_seed(2, learnable=True, init_jitter_std=0.1)
    assert torch.equal(jittered, with_seed(2, learnable=True, init_jitter_std=0.1))
    assert not torch.equal(jittered, with_seed(3, learnable=True, init_jitter_std=0.1))
    assert torch.equal(jittered != 0, exact != 0)
    spread = (jittered.norm(dim=-1) / exact.norm(dim=-1)).log().std()
    assert 0.06 < spread < 0.14
    assert torch.equal(exact, with_seed(4, learnable=True, init_jitter_std=0.0))


def test_jitter_is_the_exponential_of_the_generators_normal_numbers_in_the_type_of_the_waves() -> None:
    torch.manual_seed(3)
    jittered = make(3, learnable=True, init_jitter_std=0.3).freqs.detach()
    torch.manual_seed(3)
    factors = torch.exp(0.3 * torch.randn(8, 16, 1, dtype=torch.float64))
    torch.testing.assert_close(jittered, make(3).freqs * factors, rtol=1e-14, atol=0)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("directions", DIRECTIONS)
def test_heads_with_fewer_planes_than_axes_still_cover_them_together(scaling: str, directions: str) -> None:
    freqs = make(3, dim=16, frequency_scaling=scaling, directions=directions).freqs  # one plane a head
    assert torch.linalg.matrix_rank(freqs.flatten(0, 1)) == 3


def test_freqs_is_a_parameter_or_a_buffer_and_always_in_the_state_dict() -> None:
    for learnable in (True, False):
        embedding = make(2, learnable=learnable)
        assert ("freqs" in dict(embedding.named_parameters())) == learnable
        assert embedding.state_dict()["freqs"].shape == (8, 16, 2)
    assert not list(make(2, learnable=True, rotary_ratio=0.0).parameters())


def test_a_spacing_that_aliases_warns_once_and_names_the_remedy() -> None:
    embedding = make(2, reference_spacing=0.5)
    x = torch.randn(1, 6, 256)
    embedding(x, 1.5, (2, 3))  # 3 radians a step: still below half a wavelength
    with pytest.warns(AliasingWarning, match=r"spacing 4 along axis 1 .* reference_spacing \(now 0.5\) to 1.27"):
        embedding(x, (0.5, 4.0), (2, 3))
    embedding(x, (0.5, 5.0), (2, 3))  # said once; a second warning would fail the test
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(2, wavelengths=(8.0, 800.0))(x, 4.0, (2, 3))
        make(2)(torch.randn(1, 2, 256), (1.0, 9.0), (2, 1))  # one point has no neighbour to be confused with
    with pytest.warns(AliasingWarning):
        make(2)(x, torch.tensor([[1.0, 9.0]]), (2, 3))
