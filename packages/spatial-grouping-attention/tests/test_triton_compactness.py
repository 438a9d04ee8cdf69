"""Compactness in the Triton kernels: exact far from the origin, and nothing where there is none."""

from dataclasses import replace

import pytest
import torch
from compactness_cases import LONG, alone, compare
from grouping_cases import make_case
from spatial_grouping_attention import Neighbourhood, functional
from spatial_grouping_attention.backends import Problem
from spatial_grouping_attention.backends import triton as engine
from torch import Tensor
from triton_cases import TOLERANCE, check, everywhere


@everywhere
@pytest.mark.slow  # fused and tiled are held to it in every run
@pytest.mark.parametrize(("name", "dtype"), [("stride 2", torch.bfloat16), *((name, torch.float32) for name in LONG)])
def test_a_long_axis_is_the_closed_form(
    name: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spatial_grouping_attention.backends.triton import plan

    monkeypatch.setitem(plan.INTERPRETED_TILES, 1, (1, 1, 256))
    monkeypatch.setattr(plan, "INTERPRETED_ROWS", 512)
    case = alone(name)

    def assign(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        q, k, u, compactness = (x.to(device) for x in tensors)
        out, lse = functional.assign(q, k, u, case.neighbourhood, compactness=compactness, backend="triton")
        return out.cpu(), lse.cpu()

    def group(*tensors: Tensor) -> Tensor:
        q, k, v, compactness = (x.to(device) for x in tensors)
        options = {"compactness": compactness, "backend": "triton"}
        return functional.grouping_attention(q, k, v, case.neighbourhood, **options)[0].cpu()

    errors = compare(case, dtype, assign, group)
    assert max(errors.values()) < TOLERANCE[dtype], errors


@pytest.mark.slow
@everywhere
@pytest.mark.parametrize("window", [3, 15])
def test_it_is_added_to_what_slices_of_channels_give(window: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient is summed over slices of the values, and enters with every pair, however wide the window is."""
    from spatial_grouping_attention.backends.triton import passes

    monkeypatch.setattr(passes, "MOST_CHANNELS", 8)
    case = make_case(
        Neighbourhood((9, 4), (5, 2), 2, 3, 1, (3, window)), batch=1, heads=2, value_size=11, bias="table", compact=True
    )
    check(case, device)


@pytest.mark.triton
def test_axes_whose_places_float32_does_not_tell_apart_are_refused() -> None:
    relation = Neighbourhood((2**24,), (2**23,), 2, 2, 0, 3)
    problem = Problem(torch.device("cpu"), torch.float32, 32, relation, None)
    assert engine.refusals(problem) == []
    (reason,) = engine.refusals(replace(problem, compactness=True))
    assert "compactness on axes of up to 8388608 tokens" in reason
