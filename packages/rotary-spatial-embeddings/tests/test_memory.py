"""Rotation allocates its result and little else, in inference and in training."""

import pytest
import torch
from RoSE import RoSEMultiHeadCrossAttention
from RoSE.functional import cos_sin, rotate
from rose_cases import peak_bytes

SLACK = 1 << 16  # small bookkeeping tensors


def inputs(batch: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(batch, 4096, 12, 64).to(dtype)
    return x, *cos_sin(torch.randn(4096, 12, 32))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("interleaved", [True, False])
def test_inference_allocates_one_output_and_nothing_else(batch: int, interleaved: bool) -> None:
    x, cos, sin = inputs(batch, torch.float32)
    with peak_bytes() as peak:
        rotate(x, cos, sin, interleaved=interleaved)
    assert peak[0] <= x.nbytes + SLACK


@pytest.mark.parametrize("interleaved", [True, False])
def test_half_types_need_no_more_than_their_size_in_temporaries(interleaved: bool) -> None:
    x, cos, sin = inputs(1, torch.bfloat16)
    with peak_bytes() as peak:
        rotate(x, cos, sin, interleaved=interleaved)
    assert peak[0] <= 2.5 * x.nbytes


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("interleaved", [True, False])
def test_training_stays_within_one_and_a_half_times_in_temporaries(batch: int, interleaved: bool) -> None:
    x, cos, sin = inputs(batch, torch.float32)
    weight = torch.randn_like(x)
    for angles_learn in (False, True):
        features = x.clone().requires_grad_()
        angles = [t.clone().requires_grad_(angles_learn) for t in (cos, sin)]
        with peak_bytes() as peak:
            out = rotate(features, *angles, interleaved=interleaved)
        assert peak[0] <= x.nbytes + SLACK
        with peak_bytes() as peak:
            out.backward(weight)
        results = x.nbytes + (cos.nbytes + sin.nbytes) * angles_learn
        assert peak[0] <= results + 1.5 * x.nbytes


def test_x_is_not_kept_when_only_x_learns() -> None:
    x, cos, sin = inputs(1, torch.float32)
    out = rotate(x.requires_grad_(), cos, sin)
    kept = [t for t in out.grad_fn.saved_tensors if t is not None]
    assert {t.data_ptr() for t in kept} == {cos.data_ptr(), sin.data_ptr()}


def test_attend_never_stores_the_scores() -> None:
    attention = RoSEMultiHeadCrossAttention(32, 4, 2)
    q = torch.randn(1, 4096, 32)
    with torch.no_grad(), peak_bytes() as peak:
        attention.attend(q, q, q, 0.5, (64, 64))
    scores = 4 * 4 * 4096**2
    assert peak[0] < scores / 20
