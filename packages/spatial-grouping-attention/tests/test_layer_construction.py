"""Constructors of the layers: signatures, factory keywords, resets, seeds and copies."""

import copy
import inspect
import pickle

import pytest
import torch
from layer_cases import VARIANTS, full, make_layer, tokens
from spatial_grouping_attention import SpatialGroupingAttention

EVERY_VARIANT = tuple(VARIANTS)
SHAPE = (6, 9)


@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_copies_are_the_same_layer(variant: str) -> None:
    layer = make_layer(variant, relative_bias=variant != "dense")
    x = tokens(SHAPE)
    want = layer(x, 1.0, SHAPE).x_out
    loaded = make_layer(variant, relative_bias=variant != "dense", seed=9)
    assert (loaded(x, 1.0, SHAPE).x_out - want).abs().max() > 1e-2
    loaded.load_state_dict(layer.state_dict())
    for twin in (loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x, 1.0, SHAPE).x_out, want)


@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_seeds_reproduce(variant: str) -> None:
    states = []
    for seed in (4, 4, 5):
        torch.manual_seed(seed)
        layer = VARIANTS[variant](8, 2, 3, num_heads=2, mlp_dropout=0.3, drop_path=0.2)
        states.append(
            (layer.proposal.weight.detach(), layer.rotary.freqs.detach(), layer(tokens(SHAPE), 1.0, SHAPE).x_out)
        )
    for first, same, other in zip(*states, strict=True):
        assert torch.equal(first, same)
        assert not torch.equal(first, other)


@pytest.mark.parametrize("variant", EVERY_VARIANT)
def test_layers_can_be_made_without_memory_and_loaded(variant: str) -> None:
    layer = make_layer(variant)
    with torch.device("meta"):
        empty = VARIANTS[variant](8, 2, 3, 2, stride=2, iters=2, mlp_ratio=2)
    empty.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert torch.equal(empty(tokens(SHAPE), 1.0, SHAPE).x_out, layer(tokens(SHAPE), 1.0, SHAPE).x_out)


@pytest.mark.parametrize("variant", [*EVERY_VARIANT, "windowed self-attention"])
def test_factory_keywords_meet_all_parameters_alike(variant: str) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        layer = full(variant, dtype=dtype)
        for name, parameter in layer.named_parameters():
            wanted = torch.promote_types(dtype, torch.float32) if "rotary" in name else dtype
            assert parameter.dtype == wanted, name
    assert all(p.is_meta for p in full(variant, device="meta").parameters())


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("variant", [*EVERY_VARIANT, "windowed self-attention"])
def test_parameters_can_be_reset_after_construction_without_memory(variant: str, backwards: bool) -> None:
    """Whatever was in memory, and in whatever order modules are reset: what construction gives."""
    made = full(variant, init_jitter_std=0.0)
    layer = full(variant, device="meta", init_jitter_std=0.0).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(torch.nan)
    modules = list(layer.modules())
    for module in reversed(modules) if backwards else modules:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    random = 0
    for (name, want), got in zip(made.named_parameters(), layer.parameters(), strict=True):
        if want.unique().numel() <= 2 or "freqs" in name:
            assert torch.equal(got, want), name
        else:
            random += 1
            # Drawn anew from the same distribution: uniform, so its bound tells all.
            assert got.abs().max().item() == pytest.approx(want.abs().max().item(), rel=0.5), name
    assert random >= 4


def test_offsets_start_at_nothing() -> None:
    layer = full("deformable")
    assert all(p.eq(0).all() for p in layer.offsets.parameters())
    assert layer(torch.randn(2, 54, 16), 1.0, SHAPE).assignment.points.frac().eq(0).all()


def test_all_variants_have_the_constructor_of_the_base() -> None:
    base = inspect.signature(SpatialGroupingAttention).parameters
    own = {
        "dense": set(),
        "sparse": {"neighborhood_kernel", "neighborhood_dilation"},
        "deformable": {"num_points"},
    }
    assert not {p.kind for p in base.values()} & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    assert list(base)[-2:] == ["device", "dtype"]
    assert {"base_theta", "rotary_ratio", "wavelengths", "spacing_transform"} <= base.keys()
    for variant, layer in VARIANTS.items():
        mine = inspect.signature(layer).parameters
        assert mine.keys() - base.keys() == own[variant]
        assert all(mine[name].kind is inspect.Parameter.KEYWORD_ONLY for name in own[variant])
        shared = [name for name in mine if name in base]
        assert shared == list(base)
        for name in shared:
            assert mine[name].default == base[name].default, name
            assert mine[name].annotation == base[name].annotation, name
            assert mine[name].kind is base[name].kind, name
        annotations = SpatialGroupingAttention.__init__.__annotations__
        assert layer.__init__.__annotations__.items() >= annotations.items()
