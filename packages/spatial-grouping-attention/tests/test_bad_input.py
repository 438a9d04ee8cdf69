"""Whatever is wrong with an argument is said before anything is computed: the rule, and the value that broke it."""

import re

import pytest
import torch
from grouping_cases import BACKENDS
from layer_cases import VARIANTS
from spatial_grouping_attention import Neighbourhood, WindowedSelfAttention, functional
from torch import nn

NAN, INF = float("nan"), float("inf")

CONSTRUCTION = [
    ({"feature_dims": 0}, ValueError, "feature_dims must be at least 1, got 0"),
    ({"feature_dims": 8.0}, TypeError, r"feature_dims must be an int, got 8\.0"),
    ({"feature_dims": 9}, ValueError, "num_heads must divide feature_dims, got feature_dims=9 and num_heads=2"),
    ({"feature_dims": 6}, ValueError, "must be even.* got dim=6, num_heads=2"),
    ({"num_heads": 3}, ValueError, "num_heads must divide feature_dims, got feature_dims=8 and num_heads=3"),
    ({"num_heads": 0}, ValueError, "num_heads must be at least 1, got 0"),
    ({"out_dims": 7}, ValueError, "num_heads must divide out_dims, got out_dims=7 and num_heads=2"),
    ({"out_dims": 0}, ValueError, "out_dims must be at least 1, got 0"),
    ({"spatial_dims": 4}, ValueError, r"spatial_dims must be one of \(1, 2, 3\), got 4"),
    ({"spatial_dims": 0}, ValueError, "spatial_dims must be one of .* got 0"),
    ({"spatial_dims": "2"}, (TypeError, ValueError), "spatial_dims must be .* got '2'"),
    ({"kernel_size": 0}, ValueError, r"kernel_size must be at least 1 on every axis, got \(0, 0\)"),
    (
        {"kernel_size": (3, 3, 3)},
        ValueError,
        r"kernel_size must have one entry for each of the 2 axes, got \(3, 3, 3\)",
    ),
    ({"kernel_size": 2.5}, TypeError, r"kernel_size must be an int or a sequence of 2 ints, got 2\.5"),
    ({"stride": 0}, ValueError, r"stride must be at least 1 on every axis, got \(0, 0\)"),
    ({"stride": (1,)}, ValueError, r"stride must have one entry for each of the 2 axes, got \(1,\)"),
    ({"padding": (0, -1)}, ValueError, r"padding must be at least 0 on every axis, got \(0, -1\)"),
    ({"iters": -1}, ValueError, "iters must be at least 0, got -1"),
    ({"iters": 1.5}, TypeError, r"iters must be an int, got 1\.5"),
    ({"iters": True}, TypeError, "iters must be an int, got True"),
    ({"mlp_ratio": 0}, ValueError, "mlp_ratio must be positive, got 0"),
    ({"mlp_ratio": NAN}, ValueError, "mlp_ratio must be finite, got nan"),
    ({"mlp_ratio": "4"}, TypeError, "mlp_ratio must be a number, got '4'"),
    ({"mlp_dropout": 1.0}, ValueError, r"mlp_dropout must lie in \[0, 1\), got 1\.0"),
    ({"mlp_dropout": -0.1}, ValueError, r"mlp_dropout must lie in \[0, 1\), got -0\.1"),
    ({"drop_path": 1.0}, ValueError, r"drop_path must lie in \[0, 1\), got 1\.0"),
    ({"mlp_activation": "gelu"}, TypeError, "mlp_activation must .*'gelu'"),
    ({"spacing": 0}, ValueError, "spacing must be greater than 0; got 0"),
    ({"spacing": (1, -1)}, ValueError, r"spacing.* must be greater than 0; got -1"),
    ({"spacing": INF}, ValueError, "spacing must be finite; got inf"),
    ({"spacing": NAN}, ValueError, "spacing must be finite; got nan"),
    ({"spacing": (1, 2, 3)}, ValueError, r"spacing must have one value for each of the 2 axes; got 3: \(1, 2, 3\)"),
    ({"backend": "cuda"}, ValueError, r"backend must be one of \('auto', 'reference', .* got 'cuda'"),
    ({"backend": None}, ValueError, "backend must be one of .* got None"),
    ({"base_theta": -1}, ValueError, "base_theta must be greater than 1; got -1"),
    ({"rotary_ratio": 2.0}, ValueError, r"rotary_ratio must lie in \[0, 1\]; got 2\.0"),
    ({"directions": "up"}, ValueError, "directions must be one of .* got 'up'"),
    ({"frequency_scaling": "cubic"}, ValueError, "frequency_scaling must be one of .* got 'cubic'"),
    ({"neighbourhood_size": 3}, TypeError, "neighbourhood_size"),
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
        ("dense", {"relative_bias": True}, ValueError, "relative_bias must be False for dense grouping, got True"),
        ("dense", {"neighborhood_kernel": 3}, TypeError, "neighborhood_kernel"),
        (
            "sparse",
            {"neighborhood_kernel": 4},
            ValueError,
            r"neighborhood_kernel must be odd on every axis, got \(4, 4\)",
        ),
        ("sparse", {"neighborhood_kernel": 0}, ValueError, "neighborhood_kernel must be at least 1"),
        ("sparse", {"neighborhood_kernel": 3.0}, TypeError, r"neighborhood_kernel must be an int .* got 3\.0"),
        ("sparse", {"neighborhood_dilation": 0}, ValueError, "neighborhood_dilation must be at least 1"),
        ("deformable", {"num_points": 0}, ValueError, "num_points must be at least 1, got 0"),
        ("deformable", {"num_points": 2.0}, TypeError, r"num_points must be an int, got 2\.0"),
        ("deformable", {"backend": "tiled"}, ValueError, r"backend .* must be one of .* got 'tiled'"),
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
    "a list": (lambda f: f([1.0], 1.0, GRID), TypeError, r"x must be a torch\.Tensor, got list"),
    "rank 2": (lambda f: f(X[0], 1.0, GRID), ValueError, r"x must have shape \(B, N, C=8\), got \(54, 8\)"),
    "rank 4": (lambda f: f(X[None], 1.0, GRID), ValueError, r"x must have shape \(B, N, C=8\), got \(1, 2, 54, 8\)"),
    "channels": (lambda f: f(X[..., :4], 1.0, GRID), ValueError, r"x must have shape .*C=8.* got \(2, 54, 4\)"),
    "grid size": (lambda f: f(X, 1.0, (6, 8)), ValueError, r"grid_shape \(6, 8\) has 48 points, but x has 54 tokens"),
    "grid axes": (lambda f: f(X, 1.0, (54,)), ValueError, r"grid_shape must have one entry for each of the 2 axes"),
    "no grid": (lambda f: f(X, 1.0), ValueError, "grid_shape is needed for 2-D tokens, got None"),
    "grid of floats": (lambda f: f(X, 1.0, (6.0, 9.0)), TypeError, r"grid_shape must be .* ints, got \(6\.0, 9\.0\)"),
    "grid of zero": (lambda f: f(X, 1.0, (0, 9)), ValueError, r"grid_shape must be at least 1 .* got \(0, 9\)"),
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
    "spacing batch": (lambda f: f(X, torch.ones(3, 2), GRID), ValueError, "spacing per sample .* batch size 2, got 3"),
    "spacing ints": (lambda f: f(X, torch.ones(2).long(), GRID), TypeError, r"spacing must .* got dtype torch\.int64"),
    "spacing word": (lambda f: f(X, "1", GRID), TypeError, "spacing must be a number.* got '1'"),
    "spacing rank": (
        lambda f: f(X, torch.ones(1, 2, 2), GRID),
        ValueError,
        r"spacing .* must have shape .* got \(1, 2, 2\)",
    ),
}


@pytest.mark.parametrize("variant", [*VARIANTS, "windowed self-attention"])
@pytest.mark.parametrize("case", FORWARD)
def test_forward(variant: str, case: str) -> None:
    layer = VARIANTS[variant](8, 2, 3, 2) if variant in VARIANTS else WindowedSelfAttention(8, 2, 2, 3)
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
def test_origins_and_grids_below_the_kernel(variant: str) -> None:
    layer = VARIANTS[variant](8, 2, 7, 2, padding=0)
    with pytest.raises(
        ValueError, match=r"kernel_size must not exceed the padded grid .* n=6, padding=0, kernel_size=7"
    ):
        layer(X, 1.0, GRID)
    layer = VARIANTS[variant](8, 2, 3, 2)
    for origin, match in ((NAN, "origin must be finite; got nan"), (torch.zeros(3, 2), "batch size 2, got 3")):
        with pytest.raises(ValueError, match=match):
            layer(X, 1.0, GRID, input_origin=origin)


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


Q, K, V = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 6)
WINDOW = Neighbourhood((5,), (3,), 2, 3, 1, 3)
BIAS = torch.zeros(2, 3)
OPERATORS = {
    "integer q": (lambda f: f(Q.long(), K, V), TypeError, r"q must be float64, .* got torch\.int64"),
    "no tensor": (lambda f: f(Q, [1.0], V), TypeError, r"k must be a torch\.Tensor, got list"),
    "dtypes": (lambda f: f(Q, K.double(), V), TypeError, r"must share dtype.* q torch\.float32 .* k torch\.float64"),
    "rank": (lambda f: f(Q[0], K, V), ValueError, r"q must have shape \(B, H, N_out, D\), got \(2, 3, 4\)"),
    "head size": (lambda f: f(Q[..., :3], K, V), ValueError, r"k must have shape \(B=2, H=2, N_in, D=3\)"),
    "heads": (lambda f: f(Q[:, :1], K, V), ValueError, r"k must have shape \(B=2, H=1.* got \(2, 2, 5, 4\)"),
    "batch": (lambda f: f(Q[:1], K, V), ValueError, r"k must have shape \(B=1.* got \(2, 2, 5, 4\)"),
    "tokens": (lambda f: f(Q, K, V[:, :, :4]), ValueError, r"v must have shape .*N_in=5.* got \(2, 2, 4, 6\)"),
    "no neighbourhood": (lambda f: f(Q, K, V, (5, 3)), TypeError, "must be a Neighbourhood or None, got tuple"),
    "other grid": (
        lambda f: f(Q, K, V, Neighbourhood((4,), (2,), 2, 3, 1, 3)),
        ValueError,
        r"k has 5 tokens and q 3 groups, .* \(4,\) \(4\) and \(2,\) \(2\)",
    ),
    "scale nan": (lambda f: f(Q, K, V, scale=NAN), ValueError, "scale must be finite, got nan"),
    "scale word": (lambda f: f(Q, K, V, scale="1"), TypeError, "scale must be a number, got '1'"),
    "scale tensor": (lambda f: f(Q, K, V, scale=torch.ones(())), TypeError, "scale must be a number"),
    "bias shape": (
        lambda f: f(Q, K, V, WINDOW, bias=torch.zeros(2, 5)),
        ValueError,
        r"bias must have shape \(H, \*window\) = \(2, 3\) or \(B, H, N_in, N_out\) = \(2, 2, 5, 3\), got \(2, 5\)",
    ),
    "table without window": (lambda f: f(Q, K, V, bias=BIAS), ValueError, r"bias must have shape .* got \(2, 3\)"),
    "integer bias": (
        lambda f: f(Q, K, V, WINDOW, bias=BIAS.long()),
        TypeError,
        r"bias must be float64.* got torch\.int64",
    ),
    "bias transposed": (lambda f: f(Q, K, V, bias=torch.zeros(3, 5)), ValueError, r"bias must have .* got \(3, 5\)"),
    "valid dtype": (lambda f: f(Q, K, V, valid=torch.ones(2, 5)), TypeError, r"valid must be .*bool.* torch\.float32"),
    "valid list": (lambda f: f(Q, K, V, valid=[True]), TypeError, "valid must be .*bool.* got list"),
    "valid shape": (
        lambda f: f(Q, K, V, valid=torch.ones(2, 3, dtype=BOOL)),
        ValueError,
        r"valid must have shape \(B=2, N_in=5\), got \(2, 3\)",
    ),
    "unknown backend": (lambda f: f(Q, K, V, backend="best"), ValueError, "backend must be one of .* got 'best'"),
}


@pytest.mark.parametrize("case", OPERATORS)
@pytest.mark.parametrize("name", ["grouping_attention", "assign", "pool", "group"])
def test_operators(name: str, case: str) -> None:
    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: object, **kwargs: object) -> object:
        if name == "assign":
            u = torch.zeros(*Q.shape[:3], 6)
            return functional.assign(q, k, u, *args, **kwargs)
        if name == "pool":
            return functional.pool(q, k, v, torch.zeros(2, 2, 5), *args, **kwargs)
        return getattr(functional, name)(q, k, v, *args, **kwargs)

    if (name, case) == ("assign", "tokens"):
        with pytest.raises(ValueError, match=r"u must have shape .*N_out=3.* got \(2, 2, 5, 6\)"):
            functional.assign(Q, K, V)
        return
    call, error, match = OPERATORS[case]
    with pytest.raises(error, match=match):
        call(function)


def test_normalisers_of_pool() -> None:
    with pytest.raises(ValueError, match=r"lse must have shape \(B=2, H=2, N_in=5\), got \(2, 2, 3\)"):
        functional.pool(Q, K, V, torch.zeros(2, 2, 3))
    with pytest.raises(TypeError, match=r"lse must be float64.* got torch\.int64"):
        functional.pool(Q, K, V, torch.zeros(2, 2, 5).long())


def test_a_backend_that_cannot_serve_says_every_reason() -> None:
    with pytest.raises(ValueError, match=r"backend='fused' cannot serve") as refused:
        functional.grouping_attention(Q, K, V, WINDOW, bias=BIAS, backend="fused")
    reasons = str(refused.value).splitlines()[1:]
    assert len(reasons) == 2
    assert any("window that covers every group" in reason for reason in reasons)
    assert any("bias" in reason for reason in reasons)
    with pytest.raises(ValueError, match=r"backend='tiled' cannot serve") as refused:
        functional.grouping_attention(Q, K, V, bias=torch.zeros(5, 3), backend="tiled")
    reasons = str(refused.value).splitlines()[1:]
    assert len(reasons) == 2
    assert any("needs a neighbourhood" in reason for reason in reasons)
    assert any("bias per window offset" in reason for reason in reasons)


@pytest.mark.parametrize("operator", ["assign", "pool", "group"])
def test_every_operator_asks_the_backend(operator: str) -> None:
    for arguments in ((Q, K, torch.zeros(2, 2, 3, 1)) if operator == "assign" else (Q, K, V),):
        extra = (torch.zeros(2, 2, 5),) if operator == "pool" else ()
        with pytest.raises(ValueError, match="tiled is windowed: it needs a neighbourhood"):
            getattr(functional, operator)(*arguments, *extra, backend="tiled")


def test_selection_explains_itself() -> None:
    assert functional.select(Q).backend == "fused"
    assert functional.select(Q, Neighbourhood((5,), (3,), 2, 3, 1, 5)).backend == "fused"
    windowed = functional.select(Q, WINDOW)
    assert windowed.backend == "tiled"
    assert re.search(r"^tiled: .*\n.*fused cannot: .*window", str(windowed))
    full = functional.select(Q, bias=torch.zeros(5, 3))
    assert full.backend == "reference"
    assert "fused cannot" in str(full)
    assert "tiled cannot" in str(full)
    assert functional.select(Q, WINDOW, backend="reference").backend == "reference"
    # Whatever is chosen can serve; whatever is refused has a reason.
    for arguments in ((Q,), (Q, WINDOW), (Q, Neighbourhood((5,), (3,), 2, 3, 1, 5))):
        for bias in (None, torch.zeros(1, 1, 5, 3)):
            chosen = functional.select(*arguments, bias=bias)
            assert not chosen.refusals.get(chosen.backend)
            assert set(BACKENDS) <= {backend.value for backend in chosen.refusals}


def test_a_scale_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="scale must not be 0"):
        functional.grouping_attention(
            torch.randn(1, 1, 2, 4), torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4), scale=0.0
        )


def test_words_are_no_flags() -> None:
    with pytest.raises(TypeError, match="checkpoint must be True or False, got 'no'"):
        VARIANTS["sparse"](8, 2, 3, 2, checkpoint="no")


def test_select_checks_its_query() -> None:
    with pytest.raises(TypeError, match="q must be"):
        functional.select(torch.zeros(1, 1, 2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="q must have shape"):
        functional.select(torch.zeros(2, 4))
