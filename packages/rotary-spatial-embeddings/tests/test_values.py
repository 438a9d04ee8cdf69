"""Values that are not there: every module is traced, faked and called with nothing, and reads no value it may not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from RoSE import (
    AliasingWarning,
    Grid,
    MultiResolutionBlock,
    RoSEMultiHeadAttention,
    RoSEMultiHeadCrossAttention,
    RotarySpatialEmbedding,
    aliasing,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

SHAPE = (2, 3)

# What a user calls, beside its constructor: a function of the module, features and what says where they are.
CALLS: dict[str, tuple[Callable[..., nn.Module], Callable[..., Any]]] = {
    "embedding": (RotarySpatialEmbedding, lambda m, x, **w: m(x, **w)),
    "rotate_pair": (RotarySpatialEmbedding, lambda m, x, **w: m.rotate_pair(x, x, **w)[1]),
    "scores": (RoSEMultiHeadCrossAttention, lambda m, x, **w: m(x, x, **w)),
    "attend": (RoSEMultiHeadCrossAttention, lambda m, x, **w: m.attend(x, x, x, **w)),
    "attention": (RoSEMultiHeadAttention, lambda m, x, **w: m(x, **w)),
    "block": (MultiResolutionBlock, lambda m, x, **w: m(x, **w)),
    "block of a list": (
        MultiResolutionBlock,
        lambda m, x, **w: m([x, x], **{name: [value, value] for name, value in w.items()})[1],
    ),
}
TAKE_MASKS = ("attend", "attention", "scores", "block", "block of a list")

# Where tokens are, for a batch size.
WHERE: dict[str, Callable[[int], dict[str, Any]]] = {
    "numbers": lambda b: {"spacing": (0.5, 0.7), "grid_shape": SHAPE},
    "tensor": lambda b: {"spacing": torch.tensor([0.5, 0.7]), "grid_shape": SHAPE},
    "per sample": lambda b: {"spacing": torch.rand(b, 2) + 0.1, "grid_shape": SHAPE},
    "grid": lambda b: {"coordinates": Grid(SHAPE, torch.rand(b, 2) + 0.1, torch.rand(b, 2))},
    "points": lambda b: {"coordinates": torch.rand(6, 2)},
    "points per sample": lambda b: {"coordinates": torch.rand(b, 6, 2)},
    "masked": lambda b: {"spacing": 0.5, "grid_shape": SHAPE, "valid": torch.ones(b, 6, dtype=torch.bool)},
}
OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "fixed": {"learnable": False},
    "power": {"spacing_transform": "power"},
    "log": {"spacing_transform": "log", "rotary_ratio": 0.5},
    "identity": {"spacing_transform": "identity", "rotary_partition": "heads", "rotary_ratio": 0.5},
}


def meets(call: str, where: str, options: str) -> bool:
    """Every option meets every way to say where tokens are in an embedding, and in a block of a list, which wants each
    twice; the other calls hand both on to an embedding, so every call meets every way and every option.
    """
    if where == "masked" and call not in TAKE_MASKS:
        return False
    shift = list(CALLS).index(call) + list(WHERE).index(where)
    return call in ("embedding", "block of a list") or options == list(OPTIONS)[shift % len(OPTIONS)]


EVERY = [
    pytest.param(call, where, options, id=f"{call}, {where}, {options}")
    for call in CALLS
    for where in WHERE
    for options in OPTIONS
    if meets(call, where, options)
]
every = pytest.mark.parametrize(("call", "where", "options"), EVERY)


def made(call: str, options: str) -> nn.Module:
    torch.manual_seed(0)
    return CALLS[call][0](16, 2, 2, **OPTIONS[options])


def placed(where: str, options: str, batch: int) -> dict[str, Any]:
    torch.manual_seed(1)
    given = WHERE[where](batch)
    if where.startswith("points") and options in ("power", "log"):
        given["spacing"] = 0.5
    return given


@every
def test_fake_tensors_of_a_fake_module(call: str, where: str, options: str) -> None:
    with FakeTensorMode():
        out = CALLS[call][1](made(call, options), torch.randn(2, 6, 16), **placed(where, options, 2))
    assert out.shape[0] == 2


@every
def test_fake_tensors_of_a_real_module(call: str, where: str, options: str) -> None:
    """As code that plans memory does, and then the real call, which still looks at its grid."""
    module, given = made(call, options), placed(where, options, 2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.randn(2, 6, 16)
        assert CALLS[call][1](module, x, **given).shape[0] == 2
    assert CALLS[call][1](module, torch.randn(2, 6, 16), **given).isfinite().all()


@every
def test_meta_tensors_with_and_without_autocast(call: str, where: str, options: str) -> None:
    with torch.device("meta"):
        module, x, given = made(call, options), torch.randn(2, 6, 16), placed(where, options, 2)
        assert CALLS[call][1](module, x, **given).is_meta
        with torch.autocast("cpu", torch.bfloat16):
            assert CALLS[call][1](module, x, **given).is_meta


@pytest.mark.parametrize("mode", [pytest.param("real", marks=pytest.mark.slow), "symbolic"])
@pytest.mark.parametrize("options", ["plain", pytest.param("log", marks=pytest.mark.slow)])
@pytest.mark.parametrize("where", [w for w in WHERE if w != "masked"])
@pytest.mark.parametrize("call", ["rotate_pair", "scores", "attention", "block of a list"])
def test_proxies(call: str, where: str, options: str, mode: str) -> None:
    """Traced by make_fx over features and over every tensor that says where they are."""
    module, given = made(call, options).requires_grad_(False), placed(where, options, 2)
    names = [name for name, value in given.items() if isinstance(value, Tensor)]
    x = torch.randn(2, 6, 16)

    def function(x: Tensor, *tensors: Tensor) -> Tensor:
        return CALLS[call][1](module, x, **given | dict(zip(names, tensors, strict=True)))

    if where == "grid" and mode != "real":  # its tensors are none of the arguments, and so not fake
        given["coordinates"] = Grid(SHAPE, (0.5, 0.7), 1.0)
    tensors = [given[name] for name in names]
    expected = function(x, *tensors)
    got = make_fx(function, tracing_mode=mode, _allow_non_fake_inputs=True)(x, *tensors)(x, *tensors)
    torch.testing.assert_close(got, expected)


@every
def test_nothing_at_all(call: str, where: str, options: str) -> None:
    """An empty batch, forward and backward."""
    module, x = made(call, options), torch.randn(0, 6, 16, requires_grad=True)
    out = CALLS[call][1](module, x, **placed(where, options, 0))
    assert out.shape[0] == 0
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is None or not p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("call", CALLS)
def test_no_tokens_at_all(call: str) -> None:
    module, x = made(call, "plain"), torch.randn(2, 0, 16, requires_grad=True)
    out = CALLS[call][1](module, x, coordinates=torch.zeros(0, 2))
    out.sum().backward()
    assert x.grad.shape == x.shape


def test_what_was_only_faked_is_still_warned_of() -> None:
    embedding, x = RotarySpatialEmbedding(16, 2, 2), torch.randn(1, 6, 16)
    for mode in (FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False)):
        with mode:
            embedding(x, 5.0, SHAPE)
    with pytest.warns(AliasingWarning, match="spacing 5"):
        embedding(x, 5.0, SHAPE)


def test_grids_in_turn_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU every look at the wave vectors waits for it; however many grids there are, a new one is looked at."""
    looked = []
    message = aliasing.aliasing_message
    monkeypatch.setattr(aliasing, "MOST_SEEN", 3)
    monkeypatch.setattr(
        aliasing, "aliasing_message", lambda *given: (looked.append(given[1].shape), message(*given))[1]
    )
    embedding = RotarySpatialEmbedding(16, 2, 2)
    both = [Grid((1, 2), 1.0), Grid((2, 2), 0.5)]
    for _ in range(3):
        embedding(torch.randn(1, 6, 16), coordinates=both)
        embedding(torch.randn(1, 6, 16), 1.0, SHAPE)
    assert looked == [(1, 2), (2, 2), SHAPE]
    embedding(torch.randn(1, 6, 16), 1.0, (6, 1))
    assert looked[3:] == [(6, 1)]
    with pytest.warns(AliasingWarning, match="spacing 5"):
        embedding(torch.randn(1, 6, 16), 5.0, SHAPE)


class Users(nn.Module):
    """A module of a user, whose line is to be changed."""

    def __init__(self, call: str) -> None:
        super().__init__()
        self.call, self.inner = call, made(call, "fixed")

    def forward(self, x: Tensor) -> Tensor:
        return CALLS[self.call][1](self.inner, x, spacing=5.0, grid_shape=SHAPE)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("inside", [False, True])
def test_warnings_point_at_the_users_line(call: str, inside: bool) -> None:
    module, x = Users(call), torch.randn(1, 6, 16)
    where = {"spacing": 5.0, "grid_shape": SHAPE}
    with pytest.warns(AliasingWarning) as caught:
        nn.Sequential(module)(x) if inside else CALLS[call][1](module.inner, x, **where)
    assert [w.filename for w in caught] == [__file__]


def test_warnings_point_behind_the_layers_built_on_this_package() -> None:
    embedding = RotarySpatialEmbedding(16, 2, 2)
    names = {"__name__": "spatial_grouping_attention.layers.dense"}
    exec(compile("def layer(m, *given): return m(*given)", "a layer", "exec"), names)
    with pytest.warns(AliasingWarning) as caught:
        names["layer"](embedding, torch.randn(1, 6, 16), 5.0, SHAPE)
    assert [w.filename for w in caught] == [__file__]
