"""The one place where a call meets the engine that computes it."""

from __future__ import annotations

from torch import Tensor

from . import registered
from .autograd import as_given
from .engines import REGISTERED, Backend, engine
from .operands import Operands, Pooled, problem_of
from .selection import select
from .semantics import blanked


def assign(x: Operands, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Carry the groups' values to the fine tokens: ``A u`` (B, H, N_in, C), and their normalisers (B, H, N_in).

    Args:
        x: checked operands, ``values`` those of the groups.
        backend: see :func:`..functional.grouping_attention`.
    """
    chosen = _choose(x, backend)
    x = blanked(x, "groups")
    with as_given(x.q):
        if chosen in REGISTERED:
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
    chosen = _choose(x, backend)
    x = blanked(x, "tokens")
    with as_given(x.q):
        if chosen in REGISTERED:
            return registered.pool(x, lse, chosen.value)
        pooled: Pooled = engine(chosen.value).pool(x, lse)
        return pooled


def _choose(x: Operands, backend: str) -> Backend:
    chosen = select(problem_of(x.q, x.neighbourhood, x.bias, x.pair_bias, x.compactness), backend).backend
    # No kernel is made for no work at all, and a matrix without entries costs nothing.
    nothing = 0 in (*x.q.shape[:3], x.k.shape[2])
    return Backend.REFERENCE if nothing else chosen
