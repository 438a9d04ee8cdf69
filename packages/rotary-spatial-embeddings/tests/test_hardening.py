"""Faults that fuzzing found (``nox -s fuzz``), each told in words before anything is computed."""

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from RoSE import Grid, RoSEMultiHeadAttention, RoSEMultiHeadCrossAttention, RotarySpatialEmbedding
from RoSE.functional import cos_sin, phases, rotate

X = torch.randn(1, 4, 8)
R = RotarySpatialEmbedding(8, 2, 1)
SPARSE = X.to_sparse()
ANGLES = torch.ones(4, 2)


@pytest.mark.parametrize("number", [10**400, -(10**400), Fraction(10**400, 3)])
def test_numbers_beyond_all_floats_are_infinite(number: object) -> None:
    with pytest.raises(ValueError, match=r"origin must be finite; got -?\d+"):
        Grid(3, 1.0, number)
    Grid(3, 1.0, Fraction(1, 3)).coordinates()


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("x", lambda: R(SPARSE)),
        ("q", lambda: RoSEMultiHeadCrossAttention(8, 2, 1)(SPARSE, X)),
        ("v", lambda: RoSEMultiHeadCrossAttention(8, 2, 1).attend(X, X, SPARSE)),
        ("x", lambda: RoSEMultiHeadAttention(8, 2, 1)(SPARSE)),
        ("valid", lambda: RoSEMultiHeadAttention(8, 2, 1)(X, valid=(X[..., 0] < 9).to_sparse())),
        ("spacing", lambda: R(X, torch.ones(1).to_sparse())),
        ("coordinates", lambda: R(X, coordinates=torch.ones(4, 1).to_sparse())),
        ("freqs", lambda: phases(torch.ones(4, 1), torch.ones(2, 2, 1).to_sparse())),
        ("angles", lambda: cos_sin(ANGLES.to_sparse())),
        ("cos", lambda: rotate(torch.ones(4, 4), ANGLES.to_sparse(), ANGLES)),
    ],
)
def test_sparse_tensors(name: str, call: Callable[[], object]) -> None:
    with pytest.raises(TypeError, match=rf"{name} must be a dense tensor .*; got one of layout torch\.sparse_coo"):
        call()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: R.rotate([1.0], ANGLES, ANGLES), TypeError, "x must be a torch.Tensor; got list"),
        (lambda: R.rotate(X[0], ANGLES, ANGLES), ValueError, r"x must have shape \(batch, tokens, 8\) in layout 'bnd'"),
        (lambda: R.rotate(X, ANGLES, ANGLES, layout="nbd"), ValueError, "layout must be one of 'bnd', .* got 'nbd'"),
        (lambda: R.rotate(X, [1.0], ANGLES), TypeError, "cos must be a torch.Tensor; got list"),
        (lambda: R.rotate(X, ANGLES[None], ANGLES), ValueError, r"sin must have shape \(\[batch,\] tokens, heads, pl"),
        (lambda: R.angles([1.0]), TypeError, "positions must be a torch.Tensor; got list"),
        (lambda: R.angles(torch.ones(4)), ValueError, r"positions must be \(tokens, 1\) or .*; got \(4,\)"),
        (lambda: R.angles(torch.ones(4, 2)), ValueError, r"positions must be \(tokens, 1\) or .*; got \(4, 2\)"),
        (lambda: R.angles(torch.ones(4, 1), num_prefix_tokens=-1), ValueError, "num_prefix_tokens must be at least 0"),
    ],
)
def test_angles_that_are_made_apart(call: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("wrong", ["yes", 1, None])
def test_what_is_no_flag(wrong: object) -> None:
    with pytest.raises(TypeError, match="interleaved must be True or False; got"):
        rotate(torch.ones(4, 4), ANGLES, ANGLES, interleaved=wrong)
    with pytest.raises(TypeError, match="is_causal must be True or False; got"):
        RoSEMultiHeadAttention(8, 2, 1)(X, is_causal=wrong)


def test_a_pair_has_two_sides() -> None:
    for name, pair in (("k", (X, None)), ("q", (None, X))):
        with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor; got NoneType"):
            R.rotate_pair(*pair)


def test_a_grid_that_does_not_fit_is_called_what_the_caller_calls_it() -> None:
    with pytest.raises(ValueError, match=r"coordinates must have one point for each of the 4 tokens; got \(3,\)"):
        R(X, coordinates=Grid(3))
    with pytest.raises(ValueError, match=r"grid_shape must have one point for each of the 4 tokens; got \(3,\)"):
        R(X, grid_shape=3)


@pytest.mark.parametrize("far", [1e101, -1.7e308, torch.tensor([1e101]), torch.tensor([-1e300], dtype=torch.float64)])
def test_positions_whose_products_would_be_infinite(far: object) -> None:
    far = far.double() if isinstance(far, torch.Tensor) else far
    with pytest.raises(ValueError, match=r"origin must be (at most 1e\+100 in size|finite); got"):
        Grid(4, 1.0, far)
    points = torch.ones(4, 1, dtype=torch.float64) * far
    with pytest.raises(ValueError, match=r"coordinates must be finite, at most 1e\+100 in size; got"):
        R(X, coordinates=points)


@pytest.mark.parametrize("infinite", [math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infinite_positions_of_either_type(dtype: torch.dtype, infinite: float) -> None:
    """Beside which the farthest allowed is infinite as well, in float32."""
    far = torch.tensor([infinite], dtype=dtype)
    with pytest.raises(ValueError, match="spacing must be finite and greater than 0; got"):
        Grid(4, far)
    with pytest.raises(ValueError, match="origin must be finite; got"):
        Grid(4, 1.0, far)
    with pytest.raises(ValueError, match="coordinates must be finite"):
        R(X, coordinates=torch.ones(4, 1, dtype=dtype) * far)


@pytest.mark.filterwarnings("ignore::RoSE.AliasingWarning")
def test_the_farthest_positions_have_angles() -> None:
    assert R(X, 1e100).isfinite().all()
    assert R(X, coordinates=Grid(4, torch.tensor([1e100], dtype=torch.float64), -1e100)).isfinite().all()


@pytest.mark.parametrize(
    "wrong", [{"reference_spacing": 1e-300}, {"wavelengths": (1e-300, 1.0)}, {"init_jitter_std": 1e300}]
)
def test_wave_vectors_that_no_parameter_holds(wrong: dict[str, object]) -> None:
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"reference_spacing or wavelengths must be large .* below 3.40282e\+38; got"):
        RotarySpatialEmbedding(8, 2, 1, **wrong)
    RotarySpatialEmbedding(8, 2, 1, reference_spacing=1e-300, dtype=torch.float64)


def test_a_scale_that_scores_cannot_hold() -> None:
    with pytest.raises(ValueError, match=r"scale must be in \[0, 3.40282e\+38\]; got 1e\+300"):
        RoSEMultiHeadCrossAttention(8, 2, 1, scale=1e300)
