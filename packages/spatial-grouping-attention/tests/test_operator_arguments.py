"""Whatever is wrong with an operator's argument is said before anything is computed: the rule, and the value."""

import re

import pytest
import torch
from engine_cases import BACKENDS
from spatial_grouping_attention import Neighbourhood, functional

NAN = float("nan")
BOOL = torch.bool
Q, K, V = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 6)
WINDOW = Neighbourhood((5,), (3,), 2, 3, 1, 3)
BIAS = torch.zeros(2, 3)
OPERATORS = {
    "integer q": (lambda f: f(Q.long(), K, V), TypeError, r"q must be float64, .* got torch\.int64"),
    "no tensor": (lambda f: f(Q, [1.0], V), TypeError, r"k must be a torch\.Tensor; got list"),
    "dtypes": (lambda f: f(Q, K.double(), V), TypeError, r"must share dtype.* q torch\.float32 .* k torch\.float64"),
    "rank": (lambda f: f(Q[0], K, V), ValueError, r"q must have shape \(B, H, N_out, D\); got \(2, 3, 4\)"),
    "head size": (lambda f: f(Q[..., :3], K, V), ValueError, r"k must have shape \(B=2, H=2, N_in, D=3\)"),
    "heads": (lambda f: f(Q[:, :1], K, V), ValueError, r"k must have shape \(B=2, H=1.* got \(2, 2, 5, 4\)"),
    "batch": (lambda f: f(Q[:1], K, V), ValueError, r"k must have shape \(B=1.* got \(2, 2, 5, 4\)"),
    "tokens": (lambda f: f(Q, K, V[:, :, :4]), ValueError, r"v must have shape .*N_in=5.* got \(2, 2, 4, 6\)"),
    "no neighbourhood": (lambda f: f(Q, K, V, (5, 3)), TypeError, "must be a Neighbourhood or None; got tuple"),
    "other grid": (
        lambda f: f(Q, K, V, Neighbourhood((4,), (2,), 2, 3, 1, 3)),
        ValueError,
        r"the 5 tokens of k and the 3 groups of q; got .* \(4,\) \(4\) and \(2,\) \(2\)",
    ),
    "scale nan": (lambda f: f(Q, K, V, scale=NAN), ValueError, "scale must be finite; got nan"),
    "scale word": (lambda f: f(Q, K, V, scale="1"), TypeError, "scale must be a real number; got '1'"),
    "scale tensor": (lambda f: f(Q, K, V, scale=torch.ones(())), TypeError, "scale must be a real number"),
    "bias shape": (
        lambda f: f(Q, K, V, WINDOW, bias=torch.zeros(2, 5)),
        ValueError,
        r"bias must have shape \(H, \*window\) = \(2, 3\) or \(B, H, N_in, N_out\) = \(2, 2, 5, 3\); got \(2, 5\)",
    ),
    "bias of pairs without samples": (
        lambda f: f(Q, K, V, WINDOW, bias=torch.zeros(5, 3)),
        ValueError,
        r"bias must have shape \(H, \*window\) = .*; got \(5, 3\)",
    ),
    "table without window": (
        lambda f: f(Q, K, V, bias=BIAS),
        ValueError,
        r"bias must have shape \(B, H, N_in, N_out\) = \(2, 2, 5, 3\); got \(2, 3\)",
    ),
    "two biases of pairs": (
        lambda f: f(Q, K, V, bias=torch.zeros(1, 1, 5, 3), pair_bias=torch.zeros(1, 1, 5, 3)),
        ValueError,
        "pair_bias must be the only bias",
    ),
    "pairs without samples": (
        lambda f: f(Q, K, V, pair_bias=torch.zeros(5, 3)),
        ValueError,
        r"pair_bias must have shape \(B, H, N_in, N_out\) = \(2, 2, 5, 3\), where any size may be 1; got \(5, 3\)",
    ),
    "integer pairs": (
        lambda f: f(Q, K, V, pair_bias=torch.zeros(1, 1, 5, 3, dtype=torch.long)),
        TypeError,
        r"pair_bias must be float64.* got torch\.int64",
    ),
    "no channels": (
        lambda f: f(Q[..., :0], K[..., :0], V),
        ValueError,
        r"q must have a head size D of at least 1; got \(2, 2, 3, 0\)",
    ),
    "integer bias": (
        lambda f: f(Q, K, V, WINDOW, bias=BIAS.long()),
        TypeError,
        r"bias must be float64.* got torch\.int64",
    ),
    "pairs transposed": (
        lambda f: f(Q, K, V, pair_bias=torch.zeros(1, 1, 3, 5)),
        ValueError,
        r"pair_bias must have .* got \(1, 1, 3, 5\)",
    ),
    "valid dtype": (lambda f: f(Q, K, V, valid=torch.ones(2, 5)), TypeError, r"valid must be .*bool.* torch\.float32"),
    "valid list": (lambda f: f(Q, K, V, valid=[True]), TypeError, "valid must be a torch.Tensor; got list"),
    "valid shape": (
        lambda f: f(Q, K, V, valid=torch.ones(2, 3, dtype=BOOL)),
        ValueError,
        r"valid must have shape \(B=2, N_in=5\); got \(2, 3\)",
    ),
    "valid groups": (
        lambda f: f(Q, K, V, valid_groups=torch.ones(2, 5, dtype=BOOL)),
        ValueError,
        r"valid_groups must have shape \(B=2, N_out=3\); got \(2, 5\)",
    ),
    "unknown backend": (lambda f: f(Q, K, V, backend="best"), ValueError, "backend must be one of .* got 'best'"),
}


@pytest.mark.parametrize("case", OPERATORS)
@pytest.mark.parametrize("name", ["grouping_attention", "assign", "pool"])
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
    with pytest.raises(ValueError, match=r"lse must have shape \(B=2, H=2, N_in=5\); got \(2, 2, 3\)"):
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
        functional.grouping_attention(Q, K, V, pair_bias=torch.zeros(1, 1, 5, 3), backend="tiled")
    reasons = str(refused.value).splitlines()[1:]
    assert len(reasons) == 2
    assert any("needs a neighbourhood" in reason for reason in reasons)
    assert any("bias per window offset" in reason for reason in reasons)


@pytest.mark.parametrize("operator", ["assign", "pool", "grouping_attention"])
def test_every_operator_asks_the_backend(operator: str) -> None:
    for arguments in ((Q, K, torch.zeros(2, 2, 3, 1)) if operator == "assign" else (Q, K, V),):
        extra = (torch.zeros(2, 2, 5),) if operator == "pool" else ()
        with pytest.raises(ValueError, match="tiled is windowed: it needs a neighbourhood"):
            getattr(functional, operator)(*arguments, *extra, backend="tiled")


def test_selection_explains_itself() -> None:
    assert functional.select(Q).backend == "fused"
    assert functional.select(Q, Neighbourhood((5,), (3,), 2, 3, 1, 5)).backend == "fused"
    windowed = functional.select(Q, WINDOW)
    assert windowed.backend in ("tiled", "native")  # where numba is installed
    assert re.search(r"^(tiled|native): .*\n.*fused cannot: .*window", str(windowed))
    full = functional.select(Q, pair_bias=torch.zeros(1, 1, 5, 3))
    assert full.backend == "reference"
    assert "fused cannot" in str(full)
    assert "tiled cannot" in str(full)
    assert functional.select(Q, WINDOW, backend="reference").backend == "reference"
    # Whatever is chosen can serve; whatever is refused has a reason.
    for arguments in ((Q,), (Q, WINDOW), (Q, Neighbourhood((5,), (3,), 2, 3, 1, 5))):
        for bias in (None, torch.zeros(1, 1, 5, 3)):
            chosen = functional.select(*arguments, pair_bias=bias)
            assert not chosen.refusals.get(chosen.backend)
            assert set(BACKENDS) <= {backend.value for backend in chosen.refusals}


def test_a_scale_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="scale must not be 0"):
        functional.grouping_attention(
            torch.randn(1, 1, 2, 4), torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4), scale=0.0
        )


def test_select_checks_its_query() -> None:
    with pytest.raises(TypeError, match="q must be"):
        functional.select(torch.zeros(1, 1, 2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="q must have shape"):
        functional.select(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="q must have a head size D of at least 1"):
        functional.select(torch.zeros(2, 2, 4, 0))
