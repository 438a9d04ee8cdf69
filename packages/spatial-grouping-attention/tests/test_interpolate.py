"""Interpolation from the points of a coarse grid to those of a fine one: weights told axis by axis, in float64."""

import pytest
import torch
from grouping_cases import assert_near
from hypothesis import given, settings
from hypothesis import strategies as st
from spatial_grouping_attention.models.interpolate import FEW, interpolate
from torch import Tensor


@st.composite
def axes(draw: st.DrawFn) -> tuple[int, int, int, float]:
    """Points of the coarse grid and of the fine one, steps between the coarse ones, where the first of them lies."""
    coarse, stride = draw(st.integers(1, 4)), draw(st.integers(1, FEW + 4))
    # Quarters, which are exact: a share that is all rounding would be somebody's and nobody's.
    return coarse, draw(st.integers(1, coarse * stride)), stride, draw(st.integers(0, 4 * stride - 1)) / 4


def weights(coarse: int, fine: int, stride: int, offset: float) -> Tensor:
    """(fine, coarse): how much every coarse point counts, 1 minus its distance; outside only the outermost one."""
    place = ((torch.arange(fine, dtype=torch.float64) - offset) / stride).clamp(0, coarse - 1)
    return (1 - (place.unsqueeze(1) - torch.arange(coarse)).abs()).clamp(min=0)


def interpolated(values: Tensor, valid: Tensor, each: list[Tensor]) -> Tensor:
    """Averages of the valid points with the products of the weights of all axes; values are 0 elsewhere."""
    total, share = values.double(), valid.double().unsqueeze(-1)
    for dim, matrix in enumerate(each, 1):
        total, share = (torch.tensordot(x, matrix, ([dim], [1])).movedim(-1, dim) for x in (total, share))
    return total / share.masked_fill(share == 0, 1.0)


@pytest.mark.parametrize("masked", [False, True])
@settings(max_examples=100)
@given(every=st.lists(axes(), min_size=1, max_size=3), seed=st.integers(0, 2**16))
def test_every_point_is_the_weighted_average_of_its_neighbours(
    masked: bool, every: list[tuple[int, int, int, float]], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    coarse, fine, stride, offset = zip(*every, strict=True)
    valid = torch.rand(2, *coarse, generator=generator) < 0.6 if masked else torch.ones(2, *coarse, dtype=torch.bool)
    values = torch.randn(2, *coarse, 3, generator=generator, dtype=torch.float64).requires_grad_()
    kept = values * valid.unsqueeze(-1)
    got = interpolate(kept, valid if masked else None, fine, stride, offset)
    want = interpolated(kept, valid, [weights(*axis) for axis in every])
    assert_near(got, want, 1e-9)
    direction = torch.randn(want.shape, generator=generator, dtype=torch.float64)
    of_got, of_want = (torch.autograd.grad(results, values, direction, retain_graph=True)[0] for results in (got, want))
    assert_near(of_got, of_want, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stride", [1, 2, FEW, FEW + 1])
def test_types(dtype: torch.dtype, stride: int) -> None:
    """Each to a few of its roundings."""
    torch.manual_seed(0)
    values, valid = torch.randn(1, 4, 5, 2).to(dtype), torch.rand(1, 4, 5) < 0.7
    fine, offset = (4 * stride, 5 * stride), ((stride - 1) / 2,) * 2
    values = values * valid.unsqueeze(-1)
    got = interpolate(values, valid, fine, (stride, stride), offset)
    want = interpolated(values, valid, [weights(n, n * stride, stride, offset[0]) for n in (4, 5)])
    assert got.dtype == dtype
    assert_near(got.double(), want, 4 * torch.finfo(dtype).eps)
