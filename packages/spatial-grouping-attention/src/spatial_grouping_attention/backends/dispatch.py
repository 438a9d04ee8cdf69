"""The one place where a call meets the engine that computes it."""

from __future__ import annotations

import torch
from torch import Tensor

from . import registered
from .autograd import as_given
from .engines import REGISTERED, Backend, engine
from .operands import Operands, Pooled, problem_of
from .selection import select
from .semantics import blanked
from .transforms import under_transform


def assign(x: Operands, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Carry the groups' values to the fine tokens: ``A u`` (B, H, N_in, C), and their normalisers (B, H, N_in).

    Args:
        x: checked operands, ``values`` those of the groups.
        backend: see :func:`..functional.grouping_attention`.
    """
    chosen = _choose(x, "assign", backend)
    x = blanked(x, "groups")
    with as_given(x.q):
        if chosen in REGISTERED and not torch.onnx.is_in_onnx_export():  # which has no operators of ours
            return registered.assign(x, chosen.value)
        out, lse = engine(chosen.value).assign(x)
        return out, lse


def group(x: Operands, backend: str = "auto") -> Pooled:
    """Average the fine tokens' values over the members of every group, with memberships that compete over groups.

    Args:
        x: checked operands, ``values`` those of the tokens.
        backend: see :func:`..functional.grouping_attention`.
    """
    return _pool(x, None, backend)


def pool(x: Operands, lse: Tensor, backend: str = "auto") -> Pooled:
    """The same with the tokens' normalisers (B, H, N_in) given, float32 at least."""
    if x.valid is not None:
        lse = lse.masked_fill(~x.valid[:, None, :], 0.0)
    return _pool(x, lse, backend)


def _pool(x: Operands, lse: Tensor | None, backend: str) -> Pooled:
    chosen = _choose(x, "pool", backend, lse)
    x = blanked(x, "tokens")
    with as_given(x.q):
        if chosen in REGISTERED and not torch.onnx.is_in_onnx_export():
            return registered.pool(x, lse, chosen.value)
        pooled: Pooled = engine(chosen.value).pool(x, lse)
        return pooled


def _choose(x: Operands, operator: str, backend: str, lse: Tensor | None = None) -> Backend:
    passes = _passes(x, operator, lse) if backend == Backend.AUTO else ()
    chosen = select(problem_of(x.q, x.neighbourhood, x.bias, x.pair_bias, x.compactness), backend, passes).backend
    # No kernel is made for no work at all, and a matrix without entries costs nothing.
    nothing = 0 in (*x.q.shape[:3], x.k.shape[2])
    return Backend.REFERENCE if nothing else chosen


def _passes(x: Operands, operator: str, lse: Tensor | None) -> tuple[str, ...]:
    """What a call may come to."""
    if not under_transform():
        differentiable = (x.q, x.k, x.values, x.bias, x.compactness, lse)
        if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in differentiable):
            return (operator,)
    return operator, f"{operator}_backward"
