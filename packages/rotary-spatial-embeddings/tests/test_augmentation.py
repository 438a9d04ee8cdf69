"""Augmented coordinates: DINOv3's law, drawn for every sample anew."""

from __future__ import annotations

import math

import pytest
import torch
from RoSE import Grid, RotarySpatialEmbedding, augment_coordinates
from torch import Tensor

POINTS = Grid((5, 7), (0.5, 2.0), origin=(-1.0, -6.0)).coordinates()
ALL = {"shift": 0.3, "jitter": 1.5, "rescale": 2.0}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dinov3(coords: Tensor, shift: float | None, jitter: float | None, rescale: float | None) -> Tensor:
    """``RopePositionEmbedding`` of DINOv3's ``layers/rope_position_encoding``, from the coordinates on."""
    dd = {"device": coords.device, "dtype": coords.dtype}
    if shift is not None:
        shift_hw = torch.empty(2, **dd).uniform_(-shift, shift)
        coords = coords + shift_hw[None, :]
    if jitter is not None:
        jitter_max = math.log(jitter)
        jitter_hw = torch.empty(2, **dd).uniform_(-jitter_max, jitter_max).exp()
        coords = coords * jitter_hw[None, :]
    if rescale is not None:
        rescale_max = math.log(rescale)
        rescale_hw = torch.empty(1, **dd).uniform_(-rescale_max, rescale_max).exp()
        coords = coords * rescale_hw
    return coords


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "amounts", [{**dict.fromkeys(ALL), name: value} for name, value in ALL.items()] + [ALL], ids=[*ALL, "all"]
)
def test_the_same_numbers_drawn_give_what_dinov3_gives(amounts: dict[str, float | None], dtype: torch.dtype) -> None:
    points = POINTS.to(dtype)
    torch.manual_seed(3)
    expected = dinov3(points, **amounts)
    torch.manual_seed(3)
    got = augment_coordinates(points, **amounts)
    assert got.dtype == dtype
    assert not torch.allclose(got, points, atol=1e-2)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_every_sample_is_changed_as_a_whole_by_amounts_of_its_own() -> None:
    batch = POINTS.expand(3, 4, *POINTS.shape)
    got = augment_coordinates(batch, **ALL, generator=generator())
    assert got.shape == batch.shape
    # One factor and one shift per axis and sample explain all tokens.
    steps = Grid((5, 7), (0.5, 2.0)).coordinates()
    factor = (got[..., -1, :] - got[..., 0, :]) / (POINTS[-1] - POINTS[0])
    torch.testing.assert_close(got, got[..., :1, :] + steps * factor.unsqueeze(-2))
    assert len(factor.flatten().unique()) == 3 * 4 * 2


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_amounts_stay_in_their_range_and_fill_it(ndim: int) -> None:
    origin, unit = torch.zeros(2000, 1, ndim), torch.ones(2000, 1, ndim)
    largest = [0.1 * (axis + 1) for axis in range(ndim)]
    shifted = augment_coordinates(origin, shift=largest, generator=generator()) / torch.tensor(largest)
    stretched = augment_coordinates(unit, jitter=3.0, generator=generator()).log() / math.log(3.0)
    rescaled = augment_coordinates(unit, rescale=3.0, generator=generator()).log() / math.log(3.0)
    for share in (shifted, stretched, rescaled):
        assert 0.99 < share.abs().max() <= 1 + 1e-6
        assert share.mean().abs() < 0.05
    assert torch.equal(rescaled, rescaled[..., :1].expand_as(rescaled))
    assert ndim == 1 or not torch.equal(stretched, stretched[..., :1].expand_as(stretched))


def test_random_numbers_come_from_the_generator() -> None:
    first, same, other = (augment_coordinates(POINTS, **ALL, generator=generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_nothing_asked_for_changes_nothing() -> None:
    state = torch.get_rng_state()
    assert augment_coordinates(POINTS) is POINTS
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(augment_coordinates(POINTS, jitter=1.0, rescale=1.0), POINTS)


def test_scores_do_not_see_a_shift_and_see_a_scale() -> None:
    rotary = RotarySpatialEmbedding(32, 2, 2)
    x = torch.randn(1, 35, 32, generator=generator())

    def scores(points: Tensor) -> Tensor:
        turned = rotary(x, coordinates=points)
        return turned @ turned.mT

    torch.testing.assert_close(scores(augment_coordinates(POINTS, shift=5.0)), scores(POINTS), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(scores(augment_coordinates(POINTS, rescale=2.0)), scores(POINTS), atol=0.1)


def test_gradients_reach_the_coordinates_and_a_compiler_sees_through() -> None:
    points = POINTS.clone().requires_grad_()
    augment_coordinates(points, jitter=2.0, generator=generator()).sum().backward()
    assert (points.grad > 0).all()
    compiled = torch.compile(lambda x: augment_coordinates(x, **ALL), backend="eager", fullgraph=True)
    assert compiled(POINTS).shape == POINTS.shape


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "coordinates must be float64 or float32", {"coordinates": POINTS.bfloat16()}),
        (TypeError, r"coordinates must be a torch\.Tensor", {"coordinates": [[0.0, 1.0]]}),
        (ValueError, r"coordinates must have shape \(\.\.\., tokens, ndim\)", {"coordinates": POINTS[0]}),
        (ValueError, "shift must be greater than 0", {"shift": 0.0}),
        (ValueError, "shift must have one value for each of the 2 axes", {"shift": (1.0, 2.0, 3.0)}),
        (ValueError, "jitter must be at least 1", {"jitter": 0.5}),
        (ValueError, "rescale must be at least 1", {"rescale": -2.0}),
        (ValueError, "rescale must be finite", {"rescale": math.inf}),
        (TypeError, "jitter must be a real number", {"jitter": "2"}),
    ],
)
def test_bad_arguments(error: type[Exception], message: str, arguments: dict[str, object]) -> None:
    with pytest.raises(error, match=message):
        augment_coordinates(**{"coordinates": POINTS} | arguments)
