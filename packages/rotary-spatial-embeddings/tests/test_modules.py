import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from process_groups import process_group
from RoSE import (
    Grid,
    MultiResolutionBlock,
    RoSEMultiHeadAttention,
    RoSEMultiHeadCrossAttention,
    RotarySpatialEmbedding,
)
from rose_cases import Case, cases, formula_scores


@given(cases(), st.sampled_from([1.0, 0.3]))
def test_cross_attention_scores_are_the_formula_and_attend_is_their_softmax(case: Case, scale: float) -> None:
    attention = RoSEMultiHeadCrossAttention(
        case.dim, case.num_heads, case.spatial_dims, scale=scale, reference_spacing=4.0, dtype=torch.float64,
        **dict(case.options),
    )  # fmt: skip
    fine, coarse = Grid(case.shape, case.spacing), Grid((2,) * case.spatial_dims, 0.7)
    q, k = case.features(), case.features(coarse.size)
    got = attention(q, k, case.spacing, case.shape, 0.7, coarse.shape)
    expected = scale * formula_scores(attention.rotary, q, k, fine.coordinates(), coarse.coordinates())
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    v = torch.randn(2, coarse.size, 3 * case.num_heads, dtype=torch.float64)
    out = attention.attend(q, k, v, coordinates=fine, k_coordinates=coarse)
    by_hand = expected.softmax(-1) @ v.unflatten(-1, (case.num_heads, 3)).transpose(1, 2)
    torch.testing.assert_close(out, by_hand.transpose(1, 2).flatten(2), rtol=1e-8, atol=1e-8)


def test_prefix_tokens_of_queries_and_keys_may_differ() -> None:
    attention = RoSEMultiHeadCrossAttention(32, 2, 2)
    q, k = torch.randn(1, 7, 32), torch.randn(1, 8, 32)
    got = attention(q, k, 0.5, (2, 3), num_prefix_tokens=1, k_num_prefix_tokens=2)
    assert got.shape == (1, 2, 7, 8)
    plain = [t.unflatten(-1, (2, 16)).transpose(1, 2) for t in (q, k)]
    torch.testing.assert_close(got[:, :, 0, :2], (plain[0] @ plain[1].transpose(-1, -2))[:, :, 0, :2])


def test_the_score_limit_names_attend_and_can_be_raised() -> None:
    q = torch.randn(1, 100, 32)
    tight = RoSEMultiHeadCrossAttention(32, 2, 2, max_score_bytes=79_999)
    with pytest.raises(ValueError, match=r"attend\(q, k, v, \.\.\.\)"):
        tight(q, q, 0.5, (10, 10))
    assert RoSEMultiHeadCrossAttention(32, 2, 2, max_score_bytes=80_000)(q, q, 0.5, (10, 10)).shape[-1] == 100
    assert tight.attend(q, q, q, 0.5, (10, 10)).shape == q.shape


@pytest.mark.parametrize("backend", ["MATH", "FLASH_ATTENTION"])
def test_attention_with_projections_on_any_backend(backend: str) -> None:
    torch.manual_seed(0)
    attention = RoSEMultiHeadAttention(32, 2, 2, context_dim=24).double()
    x, context = torch.randn(2, 6, 32).double(), torch.randn(2, 4, 24).double()
    with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, backend)):
        got = attention(x, 0.5, (2, 3), 1.0, (2, 2), context=context)
    q = attention.q_proj(x)
    k, v = attention.kv_proj(context).chunk(2, -1)
    where = Grid((2, 3), 0.5).coordinates(), Grid((2, 2), 1.0).coordinates()
    weights = (formula_scores(attention.rotary, q, k, *where) / 4).softmax(-1)
    out = (weights @ v.unflatten(-1, (2, 16)).transpose(1, 2)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(got, attention.proj(out))


def test_self_attention_knows_only_relative_positions() -> None:
    attention = RoSEMultiHeadAttention(32, 2, 3, rotary_ratio=0.5).double()
    x = torch.randn(2, 24, 32).double()
    here, there = Grid((2, 3, 4), 0.5), Grid((2, 3, 4), 0.5, origin=(10.0, -4.0, 2.0))
    torch.testing.assert_close(attention(x, coordinates=here), attention(x, coordinates=there))


def test_dropout_acts_in_training_only() -> None:
    attention = RoSEMultiHeadAttention(32, 2, 2, attn_dropout=0.5, proj_dropout=0.5)
    x = torch.randn(2, 6, 32)
    assert not torch.equal(attention(x, 0.5, (2, 3)), attention(x, 0.5, (2, 3)))
    attention.eval()
    assert torch.equal(attention(x, 0.5, (2, 3)), attention(x, 0.5, (2, 3)))


def block(**options: object) -> MultiResolutionBlock:
    torch.manual_seed(0)
    return MultiResolutionBlock(32, 2, 2, **options).double()


def test_block_of_one_grid_is_a_transformer_block() -> None:
    layer = block()
    x = torch.randn(2, 6, 32).double()
    q, k, v = layer.qkv(layer.norm1(x)).chunk(3, -1)
    where = Grid((2, 3), 0.5).coordinates()
    weights = (formula_scores(layer.rotary, q, k, where, where) / 4).softmax(-1)
    mixed = (weights @ v.unflatten(-1, (2, 16)).transpose(1, 2)).transpose(1, 2).flatten(2)
    y = x + layer.proj(mixed)
    expected = y + layer.mlp(layer.norm2(y))
    torch.testing.assert_close(layer(x, 0.5, (2, 3)), expected)
    torch.testing.assert_close(layer([x], [0.5], [(2, 3)])[0], expected)


def test_block_returns_the_list_it_was_given_and_grids_share_a_frame() -> None:
    layer = block()
    registers, fine, coarse = (torch.randn(2, n, 32).double() for n in (3, 16, 4))
    spacings = [0.5, torch.tensor([[1.0, 1.0], [0.9, 1.1]])]
    out = layer([registers, fine, coarse], spacings, [(4, 4), (2, 2)], leading_tokens=True)
    assert [t.shape for t in out] == [registers.shape, fine.shape, coarse.shape]
    together = layer([fine, coarse], spacings, [(4, 4), (2, 2)])
    moved = layer([fine, coarse], coordinates=[Grid((4, 4), 0.5, 7.0), Grid((2, 2), spacings[1], 7.0)])
    torch.testing.assert_close(moved, together, rtol=1e-7, atol=1e-8)
    apart = layer([fine, coarse], coordinates=[Grid((4, 4), 0.5), Grid((2, 2), spacings[1], 7.0)])
    assert not torch.allclose(apart[0], together[0])
    # Two halves of one grid, given as two grids, are that grid.
    whole = layer(fine, 0.5, (4, 4))
    halves = layer(list(fine.split(8, 1)), coordinates=[Grid((2, 4), 0.5), Grid((2, 4), 0.5, (1.0, 0.0))])
    torch.testing.assert_close(torch.cat(halves, 1), whole)


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean() -> None:
    layer = block(drop_path=0.5)
    x = torch.randn(64, 6, 32).double()
    branch = block().proj  # same seed, same weights
    out = layer(x, 0.5, (2, 3))
    untouched = (out == x).flatten(1).all(1)
    assert 0 < untouched.sum() < 64
    assert torch.equal(layer.eval()(x, 0.5, (2, 3)), block().eval()(x, 0.5, (2, 3)))
    assert torch.equal(branch.weight, layer.proj.weight)
    depth = layer.drop_path.train()
    kept = depth(torch.ones(20_000, 1))
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert abs(kept.mean().item() - 1) < 0.03


MODULES = [
    lambda: RotarySpatialEmbedding(32, 2, 2, spacing_transform="power"),
    lambda: RotarySpatialEmbedding(32, 2, 2, learnable=False),
    lambda: RoSEMultiHeadAttention(32, 2, 2),
    lambda: MultiResolutionBlock(32, 2, 2, drop_path=0.1),
]


@pytest.mark.parametrize("make", MODULES)
def test_copies_and_state_dicts_carry_everything(make) -> None:
    module = make().eval()
    x = torch.randn(2, 6, 32)
    expected = module(x, 0.5, (2, 3))
    fresh = make().eval()
    fresh.load_state_dict(module.state_dict())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), fresh):
        assert torch.equal(other(x, 0.5, (2, 3)), expected)


@pytest.mark.parametrize("make", MODULES)
def test_every_parameter_gets_a_gradient_as_ddp_demands(make) -> None:
    module = make()
    out = module(torch.randn(2, 6, 32), 0.5, (2, 3))
    if out.requires_grad:
        out.square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def train_in_parallel(make: Callable[[], torch.nn.Module]) -> None:
    module = make()
    if not any(p.requires_grad for p in module.parameters()):
        return
    parallel = torch.nn.parallel.DistributedDataParallel(module)
    for _ in range(2):  # an unused parameter is reported by the second forward
        parallel(torch.randn(2, 6, 32), 0.5, (2, 3)).square().sum().backward()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch's gloo backend")
def test_distributed_data_parallel_trains_without_searching_for_unused_parameters() -> None:
    with process_group():
        for make in MODULES:
            train_in_parallel(make)


@pytest.mark.parametrize("make", MODULES)
def test_meta_modules_can_be_materialised(make) -> None:
    with torch.device("meta"):
        module = make()
        assert all(p.is_meta for p in module.state_dict().values())
        assert module(torch.empty(2, 6, 32), 0.5, (2, 3)).is_meta
    module.to_empty(device="cpu")
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    rose = module if isinstance(module, RotarySpatialEmbedding) else module.rotary
    assert 0.9 < rose.freqs.norm(dim=-1).max() < 1.1
    assert module(torch.randn(2, 6, 32), 0.5, (2, 3)).isfinite().all()


class StandIn(torch.nn.Module):
    """What adapters put in a module's place: it can be called, and has none of its attributes."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("make", MODULES)
def test_parents_do_nothing_with_their_embedding_but_call_it(make) -> None:
    module = make().eval()
    x = torch.randn(2, 6, 32)
    expected = module(x, 0.5, (2, 3))
    for name, child in list(module.named_children()):
        setattr(module, name, StandIn(child))
    assert torch.equal(module(x, 0.5, (2, 3)), expected)


def test_learnable_freqs_of_the_2025_releases_load() -> None:
    """Their parameter is ``freqs`` (rotating heads, half the head size, spatial dims); ``rose.freqs`` in modules."""
    old = {"freqs": torch.rand(8, 8, 3)}
    embedding = RotarySpatialEmbedding(128, 8, 3)
    embedding.load_state_dict(old)
    assert torch.equal(embedding.freqs, old["freqs"])
    RoSEMultiHeadCrossAttention(128, 8, 3).load_state_dict({"rotary.freqs": old["freqs"]})
    half = RotarySpatialEmbedding(128, 8, 3, rotary_ratio=0.5, rotary_partition="heads")
    half.load_state_dict({"freqs": torch.rand(4, 8, 3)})
