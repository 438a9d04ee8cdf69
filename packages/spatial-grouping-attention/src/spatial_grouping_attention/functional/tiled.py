"""Windowed operators in plain torch: tiles of cells, two small matrix products each, memory O(N).

The signatures are those of :mod:`.reference`. Forward and backward are written by hand and recompute the logits
chunk by chunk instead of storing them. They are registered as operators, so that ``torch.compile`` and
``torch.export`` take them as they are instead of unrolling the chunks.

Formulas (A = assignment, D = A / column sums, T_ij = s_ij - l_i, M = log column sums):

    forward    l_i = logsumexp_j s_ij      out_j = sum_i exp(T_ij - M_j) v_i      M_j = logsumexp_i T_ij
    backward   dT_ij = D_ij (g_j . v_i - g_j . out_j + dM_j)      dl_i += -sum_j dT_ij
               ds_ij = dT_ij + dl_i A_ij
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..geometry import Neighbourhood
from .chunked import Collector, Problem, normaliser
from .once import without_autocast
from .registration import register_gradients


def assign(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    neighbourhood: Neighbourhood,
    scale: float,
    bias: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`.reference.assign`."""
    out, lse = _assign(q, k, u, bias, valid, neighbourhood.integers(), scale)
    return out, lse


def pool(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    neighbourhood: Neighbourhood,
    scale: float,
    bias: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`.reference.pool`."""
    out, log_mass, _ = _pool(q, k, v, lse, bias, valid, neighbourhood.integers(), scale)
    return out, log_mass


def grouping_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    neighbourhood: Neighbourhood,
    scale: float,
    bias: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`.reference.grouping_attention`; one pass over the tiles."""
    out, log_mass, lse = _pool(q, k, v, None, bias, valid, neighbourhood.integers(), scale)
    return out, lse, log_mass


_OP = "spatial_grouping_attention::tiled_"


@torch.library.custom_op(_OP + "pool", mutates_args=())
@without_autocast
def _pool(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    given_lse: Tensor | None,
    bias: Tensor | None,
    valid: Tensor | None,
    geometry: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, log_mass, lse); without ``given_lse`` the logits' own normaliser, else an empty tensor."""
    problem = Problem(q, k, bias, valid, geometry, scale)
    collector = Collector(problem, v.shape[-1])
    lse = problem.per_token() if given_lse is None else q.new_empty(0)
    for chunk in problem.chunks(v.shape[-1]):
        scores = problem.logits(chunk, problem.scaled_queries(chunk), problem.tokens(chunk, k))
        if given_lse is None:
            tile_lse = normaliser(scores)
            chunk.store_tokens(lse, tile_lse)
        else:
            tile_lse = problem.tokens(chunk, given_lse)
        collector.add(chunk, scores.sub_(tile_lse[..., None]), problem.tokens(chunk, v))
    out, log_mass = collector.result()
    return out.to(v.dtype), log_mass, lse


@torch.library.custom_op(_OP + "assign", mutates_args=())
@without_autocast
def _assign(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    bias: Tensor | None,
    valid: Tensor | None,
    geometry: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    problem = Problem(q, k, bias, valid, geometry, scale)
    lse, out = problem.per_token(), problem.per_token(u.shape[-1])
    for chunk in problem.chunks(u.shape[-1]):
        scores = problem.logits(chunk, problem.scaled_queries(chunk), problem.tokens(chunk, k))
        tile_lse = normaliser(scores)
        chunk.store_tokens(lse, tile_lse)
        chunk.store_tokens(out, scores.sub_(tile_lse[..., None]).exp_() @ problem.groups(chunk, u))
    return out.to(u.dtype), lse


@torch.library.custom_op(_OP + "pool_backward", mutates_args=())
@without_autocast
def _pool_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    valid: Tensor | None,
    geometry: list[int],
    scale: float,
    out: Tensor,
    lse: Tensor,
    log_mass: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_mass: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to (q, k, v, bias, lse); ``grad_lse`` given means that lse is the logits' own normaliser.

    Then what reaches lse, from outside and through T, goes on into the logits, and the last result is unused.
    """
    problem = Problem(q, k, bias, valid, geometry, scale)
    dq, dbias = problem.sums(q.shape[-1]), problem.bias_sums()
    dk, dv, dlse = problem.per_token(k.shape[-1]), problem.per_token(v.shape[-1]), problem.per_token()
    # dT_ij = D_ij (g_j . v_i - delta_j); an empty group has no members to send anything to.
    delta = (grad_out.to(problem.dtype) * out.to(problem.dtype)).sum(-1) - grad_mass
    log_mass = log_mass.masked_fill(log_mass == -torch.inf, torch.inf)
    for chunk in problem.chunks(v.shape[-1]):
        q_tile, k_tile = problem.scaled_queries(chunk), problem.tokens(chunk, k)
        v_tile, g_tile = problem.tokens(chunk, v), problem.groups(chunk, grad_out)
        scores = problem.logits(chunk, q_tile, k_tile).sub_(problem.tokens(chunk, lse)[..., None])
        members = (scores - problem.groups(chunk, log_mass)[..., None, :]).exp_()
        dscores = (v_tile @ g_tile.mT).sub_(problem.groups(chunk, delta)[..., None, :]).mul_(members)
        dlse_tile = dscores.sum(-1).neg_()
        if grad_lse is not None:
            dlse_tile += problem.tokens(chunk, grad_lse)
            dscores.addcmul_(scores.exp_(), dlse_tile[..., None])
        chunk.store_tokens(dlse, dlse_tile)
        chunk.store_tokens(dv, members @ g_tile)
        chunk.store_tokens(dk, dscores @ q_tile)
        chunk.collect(dq, dscores.mT @ k_tile)
        problem.collect_bias(chunk, dbias, dscores)
    dq = problem.tiling.crop(dq).mul_(scale)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbias, dlse


@torch.library.custom_op(_OP + "assign_backward", mutates_args=())
@without_autocast
def _assign_backward(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    bias: Tensor | None,
    valid: Tensor | None,
    geometry: list[int],
    scale: float,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem = Problem(q, k, bias, valid, geometry, scale)
    dq, du, dbias = problem.sums(q.shape[-1]), problem.sums(u.shape[-1]), problem.bias_sums()
    dk = problem.per_token(k.shape[-1])
    # ds_ij = A_ij (g_i . u_j - delta_i)
    delta = (grad_out.to(problem.dtype) * out.to(problem.dtype)).sum(-1) - grad_lse
    for chunk in problem.chunks(u.shape[-1]):
        q_tile, k_tile = problem.scaled_queries(chunk), problem.tokens(chunk, k)
        u_tile, g_tile = problem.groups(chunk, u), problem.tokens(chunk, grad_out)
        scores = problem.logits(chunk, q_tile, k_tile)
        members = scores.sub_(problem.tokens(chunk, lse)[..., None]).exp_()
        dscores = (g_tile @ u_tile.mT).sub_(problem.tokens(chunk, delta)[..., None]).mul_(members)
        chunk.store_tokens(dk, dscores @ q_tile)
        chunk.collect(dq, dscores.mT @ k_tile)
        chunk.collect(du, members.mT @ g_tile)
        problem.collect_bias(chunk, dbias, dscores)
    dq = problem.tiling.crop(dq).mul_(scale)
    return dq.to(q.dtype), dk.to(k.dtype), problem.tiling.crop(du).to(u.dtype), dbias


@_pool.register_fake
def _(q, k, v, given_lse, bias, valid, geometry, scale):  # type: ignore[no-untyped-def]
    dtype = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_empty(k.shape[:-1] if given_lse is None else (0,), dtype=q.dtype if given_lse is not None else dtype)
    return v.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=dtype), lse


@_assign.register_fake
def _(q, k, u, bias, valid, geometry, scale):  # type: ignore[no-untyped-def]
    dtype = torch.promote_types(q.dtype, torch.float32)
    return u.new_empty(*k.shape[:-1], u.shape[-1]), k.new_empty(k.shape[:-1], dtype=dtype)


@_pool_backward.register_fake
def _(q, k, v, bias, valid, geometry, scale, out, lse, *grads):  # type: ignore[no-untyped-def]
    dtype = torch.promote_types(q.dtype, torch.float32)
    dbias = q.new_empty((0,) if bias is None else bias.shape, dtype=dtype)
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        dbias,
        lse.new_empty(lse.shape, dtype=dtype),
    )


@_assign_backward.register_fake
def _(q, k, u, bias, valid, geometry, scale, *rest):  # type: ignore[no-untyped-def]
    dtype = torch.promote_types(q.dtype, torch.float32)
    dbias = q.new_empty((0,) if bias is None else bias.shape, dtype=dtype)
    return q.new_empty(q.shape), k.new_empty(k.shape), u.new_empty(u.shape), dbias


register_gradients(_pool, _assign, _pool_backward, _assign_backward)
