"""Padding: what is not real is seen by nobody, gets nothing, and does not matter, whatever it holds."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from RoSE import Grid, MultiResolutionBlock, RoSEMultiHeadAttention, RoSEMultiHeadCrossAttention
from torch import Tensor

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def padded(x: Tensor, shape: tuple[int, ...], whole: tuple[int, ...], holds: float) -> Tensor:
    """(1, tokens, channels) of a grid at the start of a larger one, the rest filled up."""
    out = torch.full((1, *whole, x.shape[-1]), holds, dtype=x.dtype)
    out[(0, *(slice(n) for n in shape))] = x.detach().reshape(*shape, -1)
    return out.flatten(1, -2)


def inside(shape: tuple[int, ...], whole: tuple[int, ...]) -> Tensor:
    """(1, *whole), true in the part that is real."""
    valid = torch.zeros(1, *whole, dtype=torch.bool)
    valid[(0, *(slice(n) for n in shape))] = True
    return valid


@given(st.integers(1, 3), st.integers(0, 2), st.booleans(), st.sampled_from([0.0, 3.0, math.nan]), st.booleans())
def test_a_padded_sample_equals_the_sample_alone(
    dims: int, prefix: int, flat: bool, holds: float, causal: bool
) -> None:
    """In values and in gradients, of the attention with projections and of the block."""
    torch.manual_seed(0)
    shape, whole = (2, 3, 2)[:dims], (4, 3, 3)[:dims]
    attention = RoSEMultiHeadAttention(16, 2, dims, dtype=torch.float64)
    tokens = math.prod(shape)
    x = torch.randn(1, prefix + tokens, 16, dtype=torch.float64)
    valid = inside(shape, whole)
    kept = torch.nn.functional.pad(valid.flatten(1), (prefix, 0), value=True)[0]
    big = torch.cat((x[:, :prefix], padded(x[:, prefix:], shape, whole, holds)), 1).requires_grad_()
    x.requires_grad_()
    more = {"num_prefix_tokens": prefix, "is_causal": causal}
    alone = attention(x, coordinates=Grid(shape, 0.3).coordinates(), **more)
    together = attention(big, 0.3, whole, valid=valid.flatten(1) if flat else valid, **more)
    torch.testing.assert_close(together[:, kept], alone, **CLOSE)
    assert (together[:, ~kept] == 0).all()
    weight = torch.randn_like(alone)
    expected = torch.autograd.grad(alone, (x, *attention.parameters()), weight)
    spread = torch.full_like(together, 5.0)
    spread[:, kept] = weight
    got = torch.autograd.grad(together, (big, *attention.parameters()), spread)
    torch.testing.assert_close((got[0][:, kept], *got[1:]), expected, **CLOSE)
    assert (got[0][:, ~kept] == 0).all()


@pytest.mark.parametrize("holds", [1.0, math.nan])
def test_blocks_leave_padding_as_it_was(holds: float) -> None:
    torch.manual_seed(0)
    block = MultiResolutionBlock(16, 2, 2, dtype=torch.float64)
    register, fine, coarse = (torch.randn(1, n, 16, dtype=torch.float64) for n in (1, 6, 4))
    big = padded(fine, (2, 3), (3, 4), holds)
    valid = inside((2, 3), (3, 4))
    alone = block([register, fine, coarse], coordinates=[Grid((2, 3), 0.5), Grid((2, 2), 1.0)], leading_tokens=True)
    together = block([register, big, coarse], [0.5, 1.0], [(3, 4), (2, 2)], leading_tokens=True, valid=[valid, None])
    for got, expected in zip((together[0], together[1][:, valid[0].flatten()], together[2]), alone, strict=True):
        torch.testing.assert_close(got, expected, **CLOSE)
    rest = ~valid[0].flatten()
    torch.testing.assert_close(together[1][:, rest], big[:, rest], rtol=0, atol=0, equal_nan=True)
    leaf = torch.randn(2, 12, 16, dtype=torch.float64, requires_grad=True)
    single = block(leaf, 0.5, (3, 4), valid=valid.expand(2, -1, -1))
    (grad,) = torch.autograd.grad(single[:, rest].sum(), leaf)
    assert torch.equal(grad[:, rest], torch.ones_like(grad[:, rest]))
    assert (grad[:, ~rest] == 0).all()


def test_scores_of_hidden_keys_and_attention_without_them() -> None:
    torch.manual_seed(0)
    attention = RoSEMultiHeadCrossAttention(16, 2, 2, scale=0.3, dtype=torch.float64)
    q, k, v = (torch.randn(2, 6, 16, dtype=torch.float64) for _ in range(3))
    k_valid = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    where = {"spacing": 0.5, "grid_shape": (2, 3)}
    scores = attention(q, k, **where, k_valid=k_valid)
    plain = attention(q, k, **where)
    assert (scores[0, :, :, 4:] == -math.inf).all()
    assert torch.equal(scores[0, :, :, :4], plain[0, :, :, :4])
    assert torch.equal(scores[1], plain[1])
    out = attention.attend(q, k, v, **where, k_valid=k_valid.view(2, 2, 3))
    by_hand = scores.softmax(-1) @ v.unflatten(-1, (2, 8)).transpose(1, 2)
    torch.testing.assert_close(out, by_hand.transpose(1, 2).flatten(2), **CLOSE)
    # Queries on the same positions share the mask, and theirs are 0.
    both = attention.attend(q, k, v, **where, valid=k_valid)
    torch.testing.assert_close(both, out.masked_fill(~k_valid[..., None], 0), **CLOSE)
    assert (attention(q, k, **where, valid=k_valid)[0, :, 4:, :4] == 0).all()
    # Keys elsewhere have a mask of their own.
    apart = attention.attend(q, k, v, **where, k_spacing=0.7, valid=k_valid)
    assert torch.equal(apart[1], attention.attend(q, k, v, **where, k_spacing=0.7)[1])


ATTENTION = RoSEMultiHeadAttention(16, 2, 2)
CROSS = RoSEMultiHeadCrossAttention(16, 2, 2)
BLOCK = MultiResolutionBlock(16, 2, 2)
NONE = torch.tensor([[True] * 6, [False] * 6])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("call", "holds"),
    [
        (lambda x: ATTENTION(x, 0.5, (2, 3), valid=NONE), math.nan),
        (lambda x: ATTENTION(x, 0.5, (2, 3), valid=NONE, is_causal=True), math.nan),
        (lambda x: ATTENTION(x, 0.5, (2, 3), valid=NONE, attn_mask=torch.ones(6, 6).tril().bool()), math.nan),
        (lambda x: ATTENTION(x, 0.5, (2, 3), valid=NONE, attn_mask=torch.zeros(2, 1, 6, 6)), math.nan),
        (lambda x: ATTENTION(x, 0.5, (2, 3), k_valid=NONE), 1.0),
        (lambda x: ATTENTION(x.detach(), 0.5, (2, 3), context=x, k_spacing=0.7, valid=NONE, k_valid=NONE), math.nan),
        (lambda x: ATTENTION(x, 0.5, (2, 3), context=x[:, :4], k_grid_shape=(2, 2), k_valid=NONE[:, :4]), 1.0),
        (lambda x: CROSS.attend(x, x + 1, x - 1, 0.5, (2, 3), valid=NONE), math.nan),
        (lambda x: CROSS(x, x + 1, 0.5, (2, 3), valid=NONE).masked_fill(~NONE[:, None, None], 0), math.nan),
        (lambda x: BLOCK(x, 0.5, (2, 3), valid=NONE).masked_fill(~NONE[..., None], 0), math.nan),
    ],
)
def test_never_a_nan_even_where_no_key_is_real(call: Callable[[Tensor], Tensor], holds: float, training: bool) -> None:
    x = torch.randn(2, 6, 16)
    x[1] = holds
    x.requires_grad_()
    for module in (ATTENTION, CROSS, BLOCK):
        module.train(training).zero_grad()
    out = call(x)
    assert out.isfinite().all()
    out.square().sum().backward()
    assert x.grad.isfinite().all()
    for module in (ATTENTION, CROSS, BLOCK):
        assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def test_additive_and_boolean_masks_are_combined_with_it() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 16)
    valid = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    expected = ATTENTION(x, 0.5, (2, 3), valid=valid, is_causal=True)
    for mask in (causal, torch.zeros(6, 6).masked_fill(~causal, -math.inf)):
        torch.testing.assert_close(ATTENTION(x, 0.5, (2, 3), valid=valid, attn_mask=mask), expected)
    bias = torch.randn(2, 2, 6, 6, requires_grad=True)
    ATTENTION(x, 0.5, (2, 3), valid=valid, attn_mask=bias).sum().backward()
    assert bias.grad.isfinite().all()
    assert (bias.grad[0, :, :, 4:] == 0).all()


@pytest.mark.parametrize(
    ("mask", "error", "words"),
    [
        (torch.ones(2, 6), TypeError, "valid must be boolean; got torch.float32"),
        ([[True] * 6] * 2, TypeError, "valid must be a torch.Tensor; got list"),
        (torch.ones(1, 6, dtype=torch.bool), ValueError, r"valid must have shape \(2, 6\); got \(1, 6\)"),
        (torch.ones(2, 3, 2, dtype=torch.bool), ValueError, r"\(2, 2, 3\) or \(2, 6\); got \(2, 3, 2\)"),
    ],
)
def test_masks_of_another_kind_are_refused(mask: object, error: type[Exception], words: str) -> None:
    x = torch.randn(2, 6, 16)
    with pytest.raises(error, match=words):
        ATTENTION(x, 0.5, (2, 3), valid=mask)
    with pytest.raises(error, match=words.replace("valid", "k_valid")):
        CROSS(x, x, 0.5, (2, 3), k_valid=mask)
    with pytest.raises(error, match=words.replace("valid", r"valid\[0\]")):
        BLOCK(x, 0.5, (2, 3), valid=mask)


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_grid_of_other_tokens_is_refused(tokens: int) -> None:
    """A single token would be repeated for all of the grid, any other number is torch's to refuse."""
    valid, x, whole = inside((4,), (5,)), torch.randn(1, tokens, 8), torch.randn(1, 5, 8)
    attention, cross = RoSEMultiHeadAttention(8, 2, 1), RoSEMultiHeadCrossAttention(8, 2, 1)
    for call in (
        lambda: attention(x, 1.0, (5,), valid=valid),
        lambda: cross(x, whole, 1.0, (5,), valid=valid),
        lambda: cross(whole, x, 1.0, (5,), k_valid=valid),
        lambda: cross.attend(x, whole, whole, 1.0, (5,), valid=valid),
        lambda: cross.attend(whole, x, x, 1.0, (5,), k_valid=valid),
    ):
        with pytest.raises(ValueError, match=rf"valid must have one entry for each of the {tokens} tokens; got 5"):
            call()


def test_nested_features_need_no_padding() -> None:
    nested = torch.nested.nested_tensor([torch.randn(2, 16), torch.randn(4, 16)], layout=torch.jagged)
    with pytest.raises(ValueError, match="valid must be None for nested features"):
        ATTENTION(nested, coordinates=torch.zeros(6, 2), valid=NONE)


def test_compiled_and_exported_with_a_mask() -> None:
    x, valid = torch.randn(2, 6, 16), torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    expected = ATTENTION(x, 0.5, (2, 3), valid=valid)
    compiled = torch.compile(ATTENTION, fullgraph=True, dynamic=True, backend="eager")
    torch.testing.assert_close(compiled(x, 0.5, (2, 3), valid=valid), expected)
    program = torch.export.export(ATTENTION, (x, 0.5, (2, 3)), {"valid": valid})
    torch.testing.assert_close(program.module()(x, 0.5, (2, 3), valid=valid), expected)
