"""Whatever is wrong with an argument is said before anything is computed: the rule, and the value that broke it."""

import numpy as np
import pytest
import torch
from layer_cases import VARIANTS
from RoSE import Grid
from spatial_grouping_attention import WindowedSelfAttention
from torch import nn

NAN, INF = float("nan"), float("inf")

CONSTRUCTION = [
    ({"feature_dims": 0}, ValueError, "feature_dims must be at least 1; got 0"),
    ({"feature_dims": 8.0}, TypeError, r"feature_dims must be an int; got 8\.0"),
    ({"feature_dims": 9}, ValueError, "feature_dims must be divisible by num_heads; got feature_dims=9, num_heads=2"),
    ({"feature_dims": 6}, ValueError, "must be even.* got dim=6, num_heads=2"),
    ({"num_heads": 3}, ValueError, "feature_dims must be divisible by num_heads; got feature_dims=8, num_heads=3"),
    ({"num_heads": 0}, ValueError, "num_heads must be at least 1; got 0"),
    ({"out_dims": 7}, ValueError, "out_dims must be divisible by num_heads; got out_dims=7, num_heads=2"),
    ({"out_dims": 0}, ValueError, "out_dims must be at least 1; got 0"),
    ({"spatial_dims": 4}, ValueError, r"spatial_dims must be one of 1, 2, 3; got 4"),
    ({"spatial_dims": 0}, ValueError, "spatial_dims must be one of .* got 0"),
    ({"spatial_dims": "2"}, (TypeError, ValueError), "spatial_dims must be .* got '2'"),
    ({"kernel_size": 0}, ValueError, r"kernel_size must be at least 1; got 0"),
    (
        {"kernel_size": (3, 3, 3)},
        ValueError,
        r"kernel_size must be an int or 2 ints, one per axis; got \(3, 3, 3\)",
    ),
    ({"kernel_size": 2.5}, TypeError, r"kernel_size must be an int or 2 ints, one per axis; got 2\.5"),
    ({"stride": 0}, ValueError, r"stride must be at least 1; got 0"),
    ({"stride": (1,)}, ValueError, r"stride must be an int or 2 ints, one per axis; got \(1,\)"),
    ({"padding": (0, -1)}, ValueError, r"padding\[1\] must be at least 0; got -1"),
    ({"iters": -1}, ValueError, "iters must be at least 0; got -1"),
    ({"iters": 1.5}, TypeError, r"iters must be an int; got 1\.5"),
    ({"iters": True}, TypeError, "iters must be an int; got True"),
    ({"mlp_ratio": 0}, ValueError, "mlp_ratio must be greater than 0; got 0"),
    ({"mlp_ratio": NAN}, ValueError, "mlp_ratio must be finite; got nan"),
    ({"mlp_ratio": "4"}, TypeError, "mlp_ratio must be a real number; got '4'"),
    ({"mlp_dropout": 1.0}, ValueError, r"mlp_dropout must be in \[0, 1\); got 1\.0"),
    ({"mlp_dropout": -0.1}, ValueError, r"mlp_dropout must be in \[0, 1\); got -0\.1"),
    ({"drop_path": 1.0}, ValueError, r"drop_path must be in \[0, 1\); got 1\.0"),
    ({"qkv_bias": "no"}, TypeError, "qkv_bias must be True or False; got 'no'"),
    ({"mlp_bias": 0.5}, TypeError, r"mlp_bias must be True or False; got 0\.5"),
    ({"spatial_dims": True}, ValueError, "spatial_dims must be one of 1, 2, 3; got True"),
    ({"mlp_activation": "gelu"}, TypeError, "mlp_activation must .*'gelu'"),
    ({"spacing": 0}, ValueError, "spacing must be greater than 0; got 0"),
    ({"spacing": (1, -1)}, ValueError, r"spacing.* must be greater than 0; got -1"),
    ({"spacing": INF}, ValueError, "spacing must be finite; got inf"),
    ({"spacing": NAN}, ValueError, "spacing must be finite; got nan"),
    ({"spacing": (1, 2, 3)}, ValueError, r"spacing must have one value for each of the 2 axes; got \(1, 2, 3\)"),
    ({"backend": "cuda"}, ValueError, r"backend must be one of 'auto', 'reference', .*; got 'cuda'"),
    ({"backend": None}, ValueError, "backend must be one of .* got None"),
    ({"base_theta": -1}, ValueError, "base_theta must be greater than 1; got -1"),
    ({"rotary_ratio": 2.0}, ValueError, r"rotary_ratio must be in \[0, 1\]; got 2\.0"),
    ({"directions": "up"}, ValueError, "directions must be one of .* got 'up'"),
    ({"frequency_scaling": "cubic"}, ValueError, "frequency_scaling must be one of .* got 'cubic'"),
    ({"neighbourhood_size": 3}, TypeError, r"Attention\(\) got an unexpected keyword argument 'neighbourhood_size'"),
    ({"spacing": torch.ones(2)}, TypeError, "spacing must be a number or one number per axis; got a tensor"),
    ({"reference_spacing": torch.ones(2)}, TypeError, "reference_spacing must be a number.*; got a tensor"),
    ({"temperature": "hot"}, ValueError, "temperature must be one of 'fixed', 'learned'; got 'hot'"),
    ({"temperature": 1.0}, ValueError, r"temperature must be one of 'fixed', 'learned'; got 1\.0"),
    ({"norm_tokens": 1}, TypeError, "norm_tokens must be True or False; got 1"),
    ({"relative_bias": "yes"}, TypeError, "relative_bias must be True or False; got 'yes'"),
    ({"checkpoint": "no"}, TypeError, "checkpoint must be True or False; got 'no'"),
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("change", "error", "match"), CONSTRUCTION, ids=lambda v: str(v) if isinstance(v, dict) else ""
)
def test_construction(variant: str, change: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        VARIANTS[variant](**{"feature_dims": 8, "spatial_dims": 2, "num_heads": 2, "kernel_size": 3, **change})


@pytest.mark.parametrize(
    ("variant", "change", "error", "match"),
    [
        ("dense", {"relative_bias": True}, ValueError, "relative_bias must be False for dense grouping.*; got True"),
        ("dense", {"neighborhood_kernel": 3}, TypeError, "neighborhood_kernel"),
        (
            "sparse",
            {"neighborhood_kernel": 4},
            ValueError,
            r"neighborhood_kernel must be odd on every axis; got \(4, 4\)",
        ),
        ("sparse", {"neighborhood_kernel": 0}, ValueError, "neighborhood_kernel must be at least 1"),
        ("sparse", {"neighborhood_kernel": 3.0}, TypeError, r"neighborhood_kernel must be an int .* got 3\.0"),
        ("sparse", {"neighborhood_dilation": 0}, ValueError, "neighborhood_dilation must be at least 1"),
        ("deformable", {"num_points": 0}, ValueError, "num_points must be at least 1; got 0"),
        ("deformable", {"num_points": 2.0}, TypeError, r"num_points must be an int; got 2\.0"),
        ("deformable", {"backend": "tiled"}, ValueError, r"backend must be one of .* got 'tiled'"),
    ],
)
def test_construction_of_a_variant(variant: str, change: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        VARIANTS[variant](8, 2, 3, 2, **change)


X = torch.randn(2, 54, 8)
GRID = (6, 9)
BOOL = torch.bool
FORWARD = {
    "integers": (lambda f: f(X.long(), 1.0, GRID), TypeError, r"x must be float64, .* got torch\.int64"),
    "complex": (
        lambda f: f(X.to(torch.complex64), 1.0, GRID),
        TypeError,
        r"x must be float64, .* got torch\.complex64",
    ),
    "a list": (lambda f: f([1.0], 1.0, GRID), TypeError, r"x must be a torch\.Tensor; got list"),
    "rank 2": (lambda f: f(X[0], 1.0, GRID), ValueError, r"x must have shape \(B, N, C=8\); got \(54, 8\)"),
    "rank 4": (lambda f: f(X[None], 1.0, GRID), ValueError, r"x must have shape \(B, N, C=8\); got \(1, 2, 54, 8\)"),
    "channels": (lambda f: f(X[..., :4], 1.0, GRID), ValueError, r"x must have shape .*C=8.* got \(2, 54, 4\)"),
    "grid size": (
        lambda f: f(X, 1.0, (6, 8)),
        ValueError,
        r"grid_shape must have one point for each of the 54 tokens; got \(6, 8\) with 48 points",
    ),
    "grid axes": (lambda f: f(X, 1.0, (54,)), ValueError, r"grid_shape must have 2 ints, one per axis; got \(54,\)"),
    "no grid": (lambda f: f(X, 1.0), ValueError, "grid_shape must be given for 2-D tokens; got None"),
    "grid of floats": (lambda f: f(X, 1.0, (6.0, 9.0)), TypeError, r"grid_shape\[0\] must be an int; got 6\.0"),
    "grid of zero": (lambda f: f(X, 1.0, (0, 9)), ValueError, r"grid_shape\[0\] must be at least 1; got 0"),
    "spacing 0": (lambda f: f(X, 0.0, GRID), ValueError, r"spacing must be greater than 0; got 0\.0"),
    "spacing nan": (lambda f: f(X, NAN, GRID), ValueError, "spacing must be finite; got nan"),
    "spacing inf": (lambda f: f(X, (1.0, INF), GRID), ValueError, "spacing.* must be finite; got inf"),
    "spacing < 0": (lambda f: f(X, (1.0, -2.0), GRID), ValueError, r"spacing.* must be greater than 0; got -2\.0"),
    "spacing axes": (
        lambda f: f(X, (1.0,) * 3, GRID),
        ValueError,
        "spacing must have one value for each of the 2 axes",
    ),
    "spacing tensor": (
        lambda f: f(X, torch.tensor([1.0, -1.0]), GRID),
        ValueError,
        r"spacing must be finite and greater",
    ),
    "one bad sample": (
        lambda f: f(X, torch.tensor([[1.0, 1.0], [1.0, NAN]]), GRID),
        ValueError,
        "spacing must be finite and greater than 0; got .*nan",
    ),
    "spacing batch": (
        lambda f: f(X, torch.ones(3, 2), GRID),
        ValueError,
        "spacing must have the batch size 2 .*; got 3",
    ),
    "spacing ints": (
        lambda f: f(X, torch.ones(2).long(), GRID),
        TypeError,
        r"spacing must be float64 or float32; got torch\.int64",
    ),
    "grid of one int": (lambda f: f(X, 1.0, 54), ValueError, "grid_shape must have 2 ints, one per axis; got 54"),
    "validity of floats": (
        lambda f: f(X, 1.0, GRID, valid=torch.ones(2, 54)),
        TypeError,
        r"valid must be boolean; got torch\.float32",
    ),
    "validity of one sample": (
        lambda f: f(X, 1.0, GRID, valid=torch.ones(1, 6, 9, dtype=BOOL)),
        ValueError,
        r"valid must have shape \(2, 6, 9\) or \(2, 54\); got \(1, 6, 9\)",
    ),
    "validity of another grid": (
        lambda f: f(X, 1.0, GRID, valid=torch.ones(2, 9, 6, dtype=BOOL)),
        ValueError,
        r"valid must have shape \(2, 6, 9\) or \(2, 54\); got \(2, 9, 6\)",
    ),
    "validity list": (lambda f: f(X, 1.0, GRID, valid=[True]), TypeError, r"valid must be a torch\.Tensor; got list"),
    "spacing word": (lambda f: f(X, "1", GRID), TypeError, "spacing must be a number.* got '1'"),
    "spacings in a list": (
        lambda f: f(X, [(1.0, 0.5), (2.0, 0.5)], GRID),
        TypeError,
        r"spacing must be .*one tensor, \(batch, 2\) where every sample has its own; got 2 of type tuple",
    ),
    "spacings as collated": (
        lambda f: f(X, torch.utils.data.default_collate([(1.0, 0.5), (2.0, 0.5)]), GRID),
        TypeError,
        r"spacing must be .*got 2 of type Tensor: .*torch\.stack\(\.\.\., -1\).* tuples are collated",
    ),
    "spacings of numpy": (
        lambda f: f(X, np.ones((2, 2)), GRID),
        TypeError,
        r"spacing must be .*got 2 of type ndarray: torch\.as_tensor makes one of",
    ),
    "spacing in half": (
        lambda f: f(X, torch.ones(2).half(), GRID),
        TypeError,
        r"spacing must be float64 or float32; got torch\.float16",
    ),
    "spacing rank": (
        lambda f: f(X, torch.ones(1, 2, 2), GRID),
        ValueError,
        r"spacing must have shape \(2,\) or \(batch, 2\); got \(1, 2, 2\)",
    ),
}


@pytest.mark.parametrize("variant", [*VARIANTS, "windowed self-attention"])
@pytest.mark.parametrize("case", FORWARD)
def test_forward(variant: str, case: str) -> None:
    layer = VARIANTS[variant](8, 2, 3, 2) if variant in VARIANTS else WindowedSelfAttention(8, 2, 2, window=3)
    call, error, match = FORWARD[case]
    with pytest.raises(error, match=match):
        call(layer)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("mask", "error", "match"),
    [
        (torch.ones(2, 6, 9), TypeError, r"mask must be .*bool.* got torch\.float32"),
        (torch.ones(2, 54, dtype=BOOL), ValueError, r"mask must have shape \(2, 6, 9\).* got \(2, 54\)"),
        (torch.ones(1, 6, 9, dtype=BOOL), ValueError, r"mask must have shape \(2, 6, 9\).* got \(1, 6, 9\)"),
        ([[True]], TypeError, "mask must be .* got list"),
    ],
)
def test_masks(variant: str, mask: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        VARIANTS[variant](8, 2, 3, 2)(X, 1.0, GRID, mask)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_mask_does_not_say_how_many_tokens_there_are(variant: str) -> None:
    """Tokens along a line are counted in x, so it is the mask that is wrong."""
    with pytest.raises(ValueError, match=r"^mask must have shape \(2, 54\) .*; got \(2, 53\)$"):
        VARIANTS[variant](8, 1, 3, 2)(X, 1.0, mask=torch.ones(2, 53, dtype=BOOL))


@pytest.mark.parametrize("variant", VARIANTS)
def test_origins_and_grids_below_the_kernel(variant: str) -> None:
    layer = VARIANTS[variant](8, 2, 7, 2, padding=0)
    with pytest.raises(
        ValueError, match=r"kernel_size must not exceed the padded grid .* n=6, padding=0, kernel_size=7"
    ):
        layer(X, 1.0, GRID)
    layer = VARIANTS[variant](8, 2, 3, 2)
    for origin in ([(1.0, 0.5), (2.0, 0.5)], np.ones((2, 2))):
        with pytest.raises(TypeError, match=r"input_origin must be .*one tensor, \(batch, 2\).*; got 2 of type"):
            layer(X, 1.0, GRID, input_origin=origin)
    for origin, match in (
        (NAN, "input_origin must be finite; got nan"),
        (torch.zeros(3, 2), "input_origin must have the batch size 2 .*; got 3"),
    ):
        with pytest.raises(ValueError, match=match):
            layer(X, 1.0, GRID, input_origin=origin)


@pytest.mark.parametrize("variant", [*VARIANTS, "windowed self-attention"])
def test_a_grid_is_said_once(variant: str) -> None:
    prefix = "input_" if variant in VARIANTS else ""
    layer = VARIANTS[variant](8, 2, 3, 2) if variant in VARIANTS else WindowedSelfAttention(8, 2, 2, window=3)
    cases: list[tuple[dict[str, object], type[Exception], str]] = [
        ({"grid": Grid(GRID), "spacing": 1.0}, ValueError, f"{prefix}grid must be the only place that says the grid"),
        ({"grid": Grid(GRID), "grid_shape": GRID}, ValueError, f"{prefix}grid must be the only place"),
        ({"grid": Grid((54,))}, ValueError, rf"{prefix}grid must have 2 axes; got shape \(54,\)"),
        ({"grid": GRID}, TypeError, rf"{prefix}grid must be a RoSE\.Grid; got tuple"),
        ({"grid": Grid(GRID, torch.ones(3, 2))}, ValueError, f"^{prefix}spacing must have the batch size 2 .*; got 3$"),
        (
            {"grid": Grid(GRID, 1.0, torch.ones(3, 2))},
            ValueError,
            f"^{prefix}origin must have the batch size 2 .*; got 3$",
        ),
    ]
    if prefix:
        cases.append(
            ({"grid": Grid(GRID), "origin": 1.0}, ValueError, "input_grid must be .*; got input_origin as well")
        )
    for given, error, match in cases:
        with pytest.raises(error, match=match):
            layer(X, **{f"{prefix}{name}": value for name, value in given.items()})


def test_nothing_is_computed_before_the_refusal() -> None:
    layer = VARIANTS["dense"](8, 2, 3, 2)

    def refuse(*_: object) -> None:
        raise AssertionError("computed")

    for module in layer.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_pre_hook(refuse)
    for call, error, match in FORWARD.values():
        with pytest.raises(error, match=match):
            call(layer)
