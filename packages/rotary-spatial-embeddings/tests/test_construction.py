"""Constructors: keywords that people see, factory keywords, and parameters that can be set anew."""

from __future__ import annotations

import copy
import inspect
import pickle
import typing

import pytest
import RoSE
import torch
from RoSE import (
    Grid,
    MultiResolutionBlock,
    RoSEMultiHeadAttention,
    RoSEMultiHeadCrossAttention,
    RotarySpatialEmbedding,
)
from RoSE.blocks import MLP, DropPath
from RoSE.keywords import RotaryKeywords, spell_out_rotary_keywords
from RoSE.transforms import LogSpacing, PowerSpacing
from torch import nn

LAYERS = [RoSEMultiHeadCrossAttention, RoSEMultiHeadAttention, MultiResolutionBlock]
EVERY = [*LAYERS, RotarySpatialEmbedding, MLP, DropPath, PowerSpacing, LogSpacing, Grid]


@pytest.mark.parametrize("cls", EVERY)
def test_signatures_name_every_keyword(cls: type) -> None:
    kinds = {p.kind for p in inspect.signature(cls).parameters.values()}
    assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    assert "kwargs" not in str(inspect.signature(cls))


def test_every_public_class_is_looked_at() -> None:
    public = {getattr(RoSE, name) for name in RoSE.__all__}
    assert {c for c in public if inspect.isclass(c) and not issubclass(c, Warning)} <= set(EVERY)


def keyword_only(cls: type) -> dict[str, inspect.Parameter]:
    return {n: p for n, p in inspect.signature(cls).parameters.items() if p.kind is p.KEYWORD_ONLY}


def test_the_keywords_are_the_embeddings_own() -> None:
    wanted = {n: p for n, p in keyword_only(RotarySpatialEmbedding).items() if n not in ("device", "dtype")}
    assert RotaryKeywords.__annotations__.keys() == wanted.keys()
    types = typing.get_type_hints(RotarySpatialEmbedding.__init__)
    assert typing.get_type_hints(RotaryKeywords) == {name: types[name] for name in wanted}
    for layer in LAYERS:
        shown = keyword_only(layer)
        assert all(shown[name].default == p.default for name, p in wanted.items())
        assert list(shown)[-2:] == ["device", "dtype"]


@pytest.mark.parametrize("layer", LAYERS)
def test_what_nobody_knows_is_refused_in_the_layers_name(layer: type[nn.Module]) -> None:
    with pytest.raises(TypeError, match=rf"^{layer.__name__}\(\) got an unexpected keyword argument 'feature_dims'"):
        layer(32, 2, feature_dims=3)


class Mine(RoSEMultiHeadAttention):
    """A user's layer with a constructor of its own."""

    def __init__(self, heads: int, **more: object) -> None:
        super().__init__(16, heads, **more)
        self.extra = nn.Linear(16, 16)


def test_subclasses_copies_and_pickles() -> None:
    x = torch.randn(1, 6, 16)
    layer = Mine(2, directions="axial", learnable=False)
    expected = layer(x, 0.5, (2, 3))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x, 0.5, (2, 3)), expected)
    with pytest.raises(TypeError, match=r"Mine\(\) got an unexpected keyword argument 'direction'"):
        Mine(2, direction="axial")
    with pytest.raises(TypeError, match="num_heads"):
        RoSEMultiHeadAttention(16)  # type: ignore[call-arg]


def test_a_class_of_its_own_may_be_decorated() -> None:
    @spell_out_rotary_keywords
    class Layer(nn.Module):
        """Fixes one keyword itself."""

        def __init__(self, dim: int, *, interleaved: bool = False, **rotary: object) -> None:
            super().__init__()
            self.rotary = RotarySpatialEmbedding(dim, 2, interleaved=interleaved, **rotary)

    assert inspect.signature(Layer).parameters["interleaved"].default is False
    assert "rotary" not in inspect.signature(Layer).parameters
    assert typing.get_type_hints(Layer.__init__)["rotary_ratio"] is float
    assert Layer(16, rotary_ratio=0.5).rotary.rotary_ratio == 0.5


MAKERS = {
    "embedding": lambda **f: RotarySpatialEmbedding(16, 2, 2, spacing_transform="log", **f),
    "fixed embedding": lambda **f: RotarySpatialEmbedding(16, 2, 2, learnable=False, **f),
    "scores": lambda **f: RoSEMultiHeadCrossAttention(16, 2, 2, spacing_transform="power", **f),
    "attention": lambda **f: RoSEMultiHeadAttention(16, 2, 2, context_dim=8, **f),
    "block": lambda **f: MultiResolutionBlock(16, 2, 2, **f),
    "mlp": lambda **f: MLP(16, **f),
    "power": lambda **f: PowerSpacing((1.0, 2.0), **f),
    "log": lambda **f: LogSpacing((1.0, 2.0), **f),
}


@pytest.mark.parametrize("name", MAKERS)
def test_factory_keywords_meet_every_parameter(name: str) -> None:
    make = MAKERS[name]
    meta = make(device="meta", dtype=torch.float64)
    assert all(t.is_meta and t.dtype == torch.float64 for t in meta.state_dict().values())
    for half in (torch.bfloat16, torch.float16):
        module = make(dtype=half)
        for path, tensor in module.state_dict().items():
            is_wave = name in ("power", "log") or "freqs" in path or "spacing_transform" in path
            assert tensor.dtype == (torch.float32 if is_wave else half), path
        cast = make().to(half)
        assert {p: t.dtype for p, t in module.state_dict().items()} == {
            p: t.dtype for p, t in cast.state_dict().items()
        }


@pytest.mark.parametrize("name", MAKERS)
def test_parameters_can_be_set_anew_after_to_empty(name: str) -> None:
    """Every module that owns parameters restores what construction gives, and then trains."""
    module = MAKERS[name](device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.fill_(float("nan"))
    for part in module.modules():
        owns = list(part.parameters(recurse=False)) + list(part.buffers(recurse=False))
        assert not owns or callable(getattr(part, "reset_parameters", None))
        if owns:
            torch.manual_seed(0)
            part.reset_parameters()
    assert all(t.isfinite().all() for t in module.state_dict().values())
    if name in ("embedding", "attention", "block"):
        options = {"context": torch.randn(1, 6, 8)} if name == "attention" else {}
        module(torch.randn(1, 6, 16), 0.5, (2, 3), **options).square().sum().backward()
        assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("form", [PowerSpacing, LogSpacing])
def test_transforms_are_reset_to_where_they_start(form: type[nn.Module]) -> None:
    fresh, other = form((1.0, 2.0)), form((1.0, 2.0))
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1.0)
    other.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(("dim", "ratio", "hidden"), [(16, 4, 64), (7, 3.9, 27), (3, 0.1, 1), (10, 0.27, 2)])
def test_the_width_of_an_mlp_is_rounded_down_and_at_least_one(dim: int, ratio: float, hidden: int) -> None:
    mlp = MLP(dim, mlp_ratio=ratio, bias=False)
    assert mlp.fc1.weight.shape == (hidden, dim)
    assert list(mlp.state_dict()) == ["fc1.weight", "fc2.weight"]


def test_both_channels_of_an_mlp_are_dropped() -> None:
    torch.manual_seed(0)
    mlp = MLP(64, dropout=0.5, activation=nn.Identity)
    seen: list[torch.Tensor] = []
    mlp.fc2.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    out = mlp(torch.ones(8, 64))
    for dropped in (seen[0], out):
        assert 0.3 < (dropped == 0).float().mean() < 0.7


@pytest.mark.parametrize("bad", [1.0, -0.1, float("nan"), 2])
def test_every_probability_is_below_one(bad: float) -> None:
    for call, name in (
        (lambda: DropPath(bad), "rate"),
        (lambda: MLP(4, dropout=bad), "dropout"),
        (lambda: RoSEMultiHeadAttention(16, 2, attn_dropout=bad), "attn_dropout"),
        (lambda: RoSEMultiHeadAttention(16, 2, proj_dropout=bad), "proj_dropout"),
        (lambda: MultiResolutionBlock(16, 2, drop_path=bad), "drop_path"),
        (lambda: MultiResolutionBlock(16, 2, mlp_dropout=bad), "mlp_dropout"),
    ):
        with pytest.raises(ValueError, match=rf"{name} must be (in \[0, 1\)|finite); got"):
            call()


@pytest.mark.parametrize("cls", [MultiResolutionBlock, RoSEMultiHeadAttention])
def test_hooks_on_the_rotary_module_see_every_call(cls: type[nn.Module]) -> None:
    seen = []
    module = cls(16, 2, 2)
    module.rotary.register_forward_hook(lambda *given: seen.append(1))
    module(torch.randn(2, 6, 16), 0.5, (2, 3))
    assert len(seen) == 1


@pytest.mark.filterwarnings("ignore:a spacing_transform:RoSE.frames.FrameWarning")  # which is another test's
def test_hooks_see_scores_attention_and_pairs() -> None:
    seen = []
    module = RoSEMultiHeadCrossAttention(16, 2, 2, spacing_transform="log")
    module.rotary.register_forward_hook(lambda *given: seen.append("rotary"))
    module.rotary.spacing_transform.register_forward_hook(lambda *given: seen.append("transform"))
    q = torch.randn(2, 6, 16)
    module(q, q, 0.5, (2, 3))
    module.attend(q, q, q, 0.5, (2, 3), 0.7)
    module.rotary.rotate_pair(q, q, 0.5, (2, 3))
    assert seen.count("rotary") == 3
    assert seen.count("transform") == 4


def offload(module: nn.Module) -> None:
    """Keep every module's own tensors elsewhere except during its own call, as offloading libraries do."""
    for part in module.modules():
        stores = [(store, name) for store in (part._parameters, part._buffers) for name in store]
        kept = [store[name] for store, name in stores]
        away = [nn.Parameter(t.detach().to("meta")) if isinstance(t, nn.Parameter) else t.to("meta") for t in kept]

        def put(values: list[torch.Tensor], stores: list = stores) -> None:
            for (store, name), value in zip(stores, values, strict=True):
                store[name] = value

        put(away)
        part.register_forward_pre_hook(lambda *given, put=put, kept=kept: put(kept))
        part.register_forward_hook(lambda *given, put=put, away=away: put(away))


X = torch.randn(2, 6, 16)
CALLS = {
    "embedding": lambda m: m(X, 0.5, (2, 3)),
    "fixed embedding": lambda m: m.rotate_pair(X, X, 0.5, (2, 3), 0.5)[1],
    "scores": lambda m: m(X, X, 0.5, (2, 3)),
    "attention": lambda m: m(X, 0.5, (2, 3), context=X[..., :8]),
    "block": lambda m: m([X, X], [0.5, 1.0], [(2, 3)] * 2)[1],
}


@pytest.mark.parametrize("name", CALLS)
def test_parents_touch_no_childs_tensors(name: str) -> None:
    module = MAKERS[name]().eval()
    expected = CALLS[name](module)
    offload(module)
    assert torch.equal(CALLS[name](module), expected)
