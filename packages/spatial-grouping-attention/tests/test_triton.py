"""The Triton kernels against the definition of grouping, forward and in every gradient."""

import pytest
import torch
from grouping_cases import make_case, neighbourhoods
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import mostly_slow
from spatial_grouping_attention import Neighbourhood
from triton_cases import LARGER, TOLERANCE, check, everywhere, on_gpu, one_plan_a_class  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_plan_a_class")

FEATURES = {
    "1-D": (Neighbourhood((21,), (11,), 2, 3, 1, 3), {"head_size": 16, "value_size": 16}),
    "1-D, odd sizes, bias, mask": (
        Neighbourhood((37,), (19,), 2, 3, 1, 5),
        {"head_size": 5, "value_size": 19, "bias": "table", "valid": "some", "batch": 2, "heads": 2, "scale": 0.7},
    ),
    "1-D, dilated, border blocks, bias": (
        Neighbourhood((29,), (8,), 3, 7, 0, 3, 2),
        {"bias": "table", "compact": True},
    ),
    "1-D, even kernel and stride, padded": (Neighbourhood((30,), (8,), 4, 6, 2, 3), {"compact": True}),
    "1-D, more phases than groups": (Neighbourhood((9,), (3,), 3, 3, 0, 5, 4), {"bias": "table"}),
    "1-D, stride 1, window of everything": (Neighbourhood((7,), (7,), 1, 1, 0, 15), {}),
    "1-D, stride larger than kernel": (Neighbourhood((41,), (5,), 9, 2, 0, 3), {"head_size": 24}),
    "1-D, groups beyond the input": (Neighbourhood((4,), (8,), 2, 2, 6, 3), {"valid": "some"}),
    "2-D": (
        Neighbourhood((10, 12), (5, 6), 2, 3, 1, 3),
        {"bias": "table", "valid": "some", "compact": True, "heads": 2},
    ),
    "2-D, dilated and anisotropic": (
        Neighbourhood((9, 13), (3, 3), (2, 3), (4, 7), (0, 1), (3, 5), (2, 1)),
        {"bias": "table", "compact": True},
    ),
    "3-D": (Neighbourhood((4, 5, 6), (2, 3, 3), 2, 3, 1, 3), {"bias": "table", "valid": "some"}),
    "3-D, several steps of groups": (Neighbourhood((1, 5, 9), (1, 5, 9), 1, 1, 0, 9), {}),
    "nobody is valid in one sample": (
        Neighbourhood((9,), (5,), 2, 3, 1, 3),
        {"valid": "none in one sample", "batch": 2},
    ),
    "1-D, some groups": (Neighbourhood((21,), (11,), 2, 3, 1, 3), {"valid_groups": "some", "bias": "table"}),
    "2-D, some tokens and groups": (
        Neighbourhood((9, 7), (5, 4), 2, 3, 1, 3, (2, 1)),
        {"valid": "some", "valid_groups": "some", "batch": 2, "heads": 2},
    ),
    "3-D, some groups": (
        Neighbourhood((4, 5, 6), (2, 3, 3), 2, 3, 1, 3),
        {"valid_groups": "some", "compact": True},
    ),
    "no group is valid in one sample": (
        Neighbourhood((9,), (5,), 2, 3, 1, 3),
        {"valid_groups": "none in one sample", "batch": 2},
    ),
}


# What is in these takes longest, and is in others too, in other company.
SLOW = ("1-D, odd sizes, bias, mask", "2-D", "2-D, dilated and anisotropic", "3-D", "3-D, several steps of groups")


@everywhere
@pytest.mark.parametrize(
    "feature", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in FEATURES]
)
def test_features(feature: str, device: str) -> None:
    neighbourhood, options = FEATURES[feature]
    check(make_case(neighbourhood, **{"batch": 1, "heads": 1, **options}), device)


@pytest.mark.parametrize(
    ("device", "examples"),
    [
        pytest.param("cpu", 3, marks=pytest.mark.triton),
        pytest.param("cpu", 12, marks=[pytest.mark.triton, pytest.mark.slow]),
        pytest.param("cuda", 20, marks=pytest.mark.gpu),
    ],
)
def test_any_geometry(device: str, examples: int) -> None:
    @settings(max_examples=examples, database=None)
    @given(neighbourhoods(), *(st.sampled_from((None, "some")),) * 2, st.booleans(), st.integers(0, 2**16))
    def law(
        neighbourhood: Neighbourhood, valid: str | None, valid_groups: str | None, compact: bool, seed: int
    ) -> None:
        masks = {"valid": valid, "valid_groups": valid_groups}
        case = make_case(neighbourhood, batch=1, heads=1, bias="table", **masks, compact=compact, seed=seed)
        check(case, device, operators=("assign", "group"))

    law()


@everywhere
def test_large_logits_starve_groups_but_averages_stay_exact(device: str) -> None:
    """Memberships of starved groups are as small as exp(-300), far below what float32 can hold."""
    case = make_case(Neighbourhood((17,), (9,), 2, 3, 1, 3), batch=1, heads=1, strength=30.0)
    check(case, device, slack=30.0)


@pytest.mark.parametrize("dtype", mostly_slow(torch.bfloat16, torch.float16))
@everywhere
def test_half_types(dtype: torch.dtype, device: str) -> None:
    case = make_case(Neighbourhood((11,), (6,), 2, 3, 1, 3), batch=1, heads=2, bias="table", compact=True, head_size=16)
    check(case, device, dtype)


@on_gpu
@pytest.mark.parametrize("head_size", [16, 24, 64, 128])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_head_sizes(dtype: torch.dtype, head_size: int, device: str) -> None:
    masks = {"valid": "some", "valid_groups": "some"}
    case = make_case(
        LARGER["2-D"], batch=1, head_size=head_size, value_size=head_size, bias="table", compact=True, **masks
    )
    check(case, device, dtype)


@on_gpu
@pytest.mark.parametrize("geometry", LARGER)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_larger_grids(dtype: torch.dtype, geometry: str, device: str) -> None:
    masks = {"valid": "some", "valid_groups": "some"}
    check(
        make_case(LARGER[geometry], batch=1, heads=3, bias="table", compact=True, **masks, head_size=32), device, dtype
    )
