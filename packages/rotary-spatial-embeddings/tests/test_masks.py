"""Masks and batches are what they are said to be: nothing broadcasts in silence, and types agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from RoSE import MultiResolutionBlock, RoSEMultiHeadAttention, RoSEMultiHeadCrossAttention, RotarySpatialEmbedding
from torch import Tensor

HEADS, TOKENS, KEYS = 2, 6, 4
A = RoSEMultiHeadAttention(16, HEADS, 2)
C = RoSEMultiHeadCrossAttention(16, HEADS, 2)
B = MultiResolutionBlock(16, HEADS, 2)
CALLS: dict[str, Callable[..., Tensor]] = {
    "attention": lambda x, k, **m: A(x, 0.5, (x.shape[1], 1), context=k, k_grid_shape=(k.shape[1], 1), **m),
    "attend": lambda x, k, **m: C.attend(x, k, k, 0.5, (x.shape[1], 1), k_grid_shape=(k.shape[1], 1), **m),
}
every = pytest.mark.parametrize("call", CALLS)
kinds = pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float64])


def features(batch: int, tokens: int = TOKENS, keys: int = KEYS) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(batch, tokens, 16), torch.randn(batch, keys, 16)


def a_mask(*shape: int, dtype: torch.dtype) -> Tensor:
    """With every query seeing some key."""
    seen = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.4
    seen[..., 0] = True
    return seen if dtype == torch.bool else torch.zeros(shape, dtype=dtype).masked_fill(~seen, -torch.inf)


@every
@kinds
@pytest.mark.parametrize("batch", [1, 3])
def test_accepted_masks_mean_what_they_say(call: str, dtype: torch.dtype, batch: int) -> None:
    x, k = features(batch)
    for b in {1, batch}:
        for h in (1, HEADS):
            for q in (1, TOKENS):
                mask = a_mask(b, h, q, KEYS, dtype=dtype)
                got = CALLS[call](x, k, attn_mask=mask)
                whole = mask.expand(batch, HEADS, TOKENS, KEYS)
                for i in range(batch):
                    alone = CALLS[call](x[i : i + 1], k[i : i + 1], attn_mask=whole[i : i + 1])
                    torch.testing.assert_close(got[i : i + 1], alone)
    mask = a_mask(TOKENS, KEYS, dtype=dtype)
    torch.testing.assert_close(CALLS[call](x, k, attn_mask=mask), CALLS[call](x, k, attn_mask=mask[None, None]))
    half = {"attention": A, "attend": C}[call].bfloat16()
    assert CALLS[call](x.bfloat16(), k.bfloat16(), attn_mask=mask).isfinite().all()
    half.float()


@every
@kinds
@pytest.mark.parametrize(
    "shape",
    [(3, KEYS), (KEYS,), (1, KEYS), (TOKENS, 1), (KEYS, TOKENS), (3, TOKENS, KEYS), (HEADS, TOKENS, KEYS),
     (1, TOKENS, KEYS), (2, 1, TOKENS, KEYS), (3, 3, TOKENS, KEYS), (3, 1, 5, KEYS), (3, 1, 1, 5), (1, 1, 1, 1, KEYS)],
)  # fmt: skip
def test_other_shapes_are_refused_and_key_masks_are_named(
    call: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x, k = features(3)
    with pytest.raises(ValueError, match=r"attn_mask must have shape \(queries, keys\) or.*; got \(") as caught:
        CALLS[call](x, k, attn_mask=torch.ones(shape).to(dtype))
    assert "k_valid=" in str(caught.value) or len(shape) == 4


@every
@kinds
def test_as_many_queries_as_samples_are_ambiguous(call: str, dtype: torch.dtype) -> None:
    x, k = features(TOKENS)
    mask = a_mask(TOKENS, KEYS, dtype=dtype)
    with pytest.raises(
        ValueError, match=r"could be \(queries, keys\) or \(batch, keys\); got \(6, 4\): give attn_mask"
    ):
        CALLS[call](x, k, attn_mask=mask)
    assert CALLS[call](x, k, attn_mask=mask[None, None]).isfinite().all()
    one = features(1, tokens=1)
    assert CALLS[call](*one, attn_mask=mask[:1]).isfinite().all()  # where both mean the same


@every
def test_masks_of_another_type_are_refused(call: str) -> None:
    x, k = features(3)
    for mask, words in (
        (torch.ones(TOKENS, KEYS).long(), r"boolean \(true where .*; got torch.int64"),
        ([[True]], "a torch.Tensor; got list"),
    ):
        with pytest.raises(TypeError, match=f"attn_mask must be {words}"):
            CALLS[call](x, k, attn_mask=mask)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_causal_and_masked_is_both(dtype: torch.dtype) -> None:
    x, _ = features(3)
    mask = a_mask(TOKENS, TOKENS, dtype=torch.bool)
    given = mask if dtype == torch.bool else torch.zeros(TOKENS, TOKENS).masked_fill(~mask, -torch.inf)
    both = A(x, 0.5, (2, 3), attn_mask=mask & torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril())
    torch.testing.assert_close(A(x, 0.5, (2, 3), attn_mask=given, is_causal=True), both)


def test_a_mask_does_not_fix_the_batch_of_an_exported_program() -> None:
    x, _ = features(3)
    mask = a_mask(TOKENS, TOKENS, dtype=torch.bool)
    batch = torch.export.Dim("batch", min=1)
    shapes = {"x": {0: batch}, "spacing": None, "grid_shape": (None, None), "attn_mask": {}}
    program = torch.export.export(A, (x, 0.5, (2, 3)), {"attn_mask": mask}, dynamic_shapes=shapes)
    other = torch.randn(TOKENS, TOKENS, 16)
    got = program.module()(other, 0.5, (2, 3), attn_mask=mask)
    torch.testing.assert_close(got, A(other, 0.5, (2, 3), attn_mask=mask[None, None]))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "call",
    [
        lambda x, other: A(x, 0.5, (2, 3), context=other),
        lambda x, other: A(x, 0.5, (2, 3), context=other, k_spacing=0.7),
        lambda x, other: C(x, other, 0.5, (2, 3)),
        lambda x, other: C.attend(x, other, other, 0.5, (2, 3)),
        lambda x, other: C.attend(x, x, other, 0.5, (2, 3)),
        lambda x, other: B([x, other], [0.5, 1.0], [(2, 3), (2, 3)]),
        lambda x, other: A(x, torch.ones(len(other), 2), (2, 3)),
        lambda x, other: A(x, 0.5, (2, 3), k_spacing=torch.ones(len(other), 2)),
        lambda x, other: A(x, 0.5, (2, 3), k_coordinates=torch.ones(len(other), 6, 2)),
        lambda x, other: A(x, 0.5, (2, 3), k_valid=other[..., 0] > 0),
        lambda x, other: A(x, 0.5, (2, 3), context=x, valid=other[..., 0] > 0),
    ],
)
def test_no_batch_broadcasts_in_silence(call: Callable[[Tensor, Tensor], Any], batch: int) -> None:
    x, other = torch.randn(2, 6, 16), torch.randn(batch, 6, 16)
    with pytest.raises(ValueError, match=r"batch|must have shape \(2, "):
        call(x, other)
    with pytest.raises(ValueError, match=r"batch|must have shape \(1, "):
        call(x[:1], torch.randn(3, 6, 16))


X = torch.randn(2, 6, 16)
JAGGED = torch.nested.nested_tensor([torch.randn(2, 16), torch.randn(4, 16)], layout=torch.jagged)
POINTS = torch.rand(6, 2)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: C(X.double(), X, 0.5, (2, 3)), TypeError, "k must have the dtype of q, torch.float64"),
        (lambda: C.attend(X, X.half(), X, 0.5, (2, 3)), TypeError, "k must have the dtype of q"),
        (lambda: C.attend(X, X, X.double(), 0.5, (2, 3)), TypeError, "v must have the dtype of q"),
        (lambda: B([X, X.half()], [0.5, 1.0], [(2, 3)] * 2), TypeError, r"x\[1\] must have the dtype of x\[0\]"),
        (lambda: A(X.to(torch.float8_e4m3fn), 0.5, (2, 3)), TypeError, "x must be float64, .* got torch.float8_e4m3fn"),
        (lambda: RotarySpatialEmbedding(16, 2, dtype=torch.float8_e5m2), TypeError, "dtype must be float64"),
        (lambda: B.rotary(X, torch.ones(2).to(torch.float8_e5m2), (2, 3)), TypeError, "spacing must be float64 or"),
        (lambda: A.rotary(JAGGED, torch.ones(2, 2), coordinates=POINTS), ValueError, r"one for all .* \(2, 2\)"),
        (lambda: A.rotary(JAGGED, coordinates=POINTS.expand(2, 6, 2)), ValueError, r"of all sequences.* \(2, 6, 2\)"),
        (lambda: A(JAGGED, coordinates=POINTS, attn_mask=torch.ones(6, 6)), ValueError, "attn_mask must be None"),
        (lambda: A(JAGGED, coordinates=POINTS, context=X, k_coordinates=POINTS), ValueError, "must both be nested"),
        (lambda: A(X, coordinates=POINTS, context=JAGGED), ValueError, "must both be nested"),
    ],
)  # fmt: skip
def test_types_and_forms_that_do_not_go_together(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


def test_autocast_makes_types_one() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert C(X.bfloat16(), X, 0.5, (2, 3)).dtype == torch.bfloat16
        assert C.attend(X, X.bfloat16(), X, 0.5, (2, 3)).dtype == torch.bfloat16
