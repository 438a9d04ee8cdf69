"""Backward passes, in the terms of :mod:`.forward`; g is the gradient of the result.

    pool    dT_ij = D_ij (g_j . v_i - g_j . out_j + dM_j)      dl_i += -sum_j dT_ij      ds_ij = dT_ij + dl_i A_ij
    assign  ds_ij = A_ij (g_i . u_j - g_i . out_i + dl_i)

with D = A divided by its column sums, and dl_i entering ds only where l is these logits' own normaliser.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..operands import Gradients, Operands, Pooled
from .chunks import Chunk, Tiles


def assign_backward(x: Operands, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
    """Gradients of ``assign``."""
    tiles = Tiles(x)
    dq, du, of_heads = tiles.sums(x.q.shape[-1]), tiles.sums(x.values.shape[-1]), GradientsOfHeads(tiles)
    dk = torch.empty_like(x.k)
    delta = _less((grad_out.to(tiles.dtype) * out).sum(-1), grad_lse)
    for chunk in tiles.chunks():
        q, k = chunk.scaled_queries(), chunk.tokens(x.k)
        u, g = chunk.groups(x.values), chunk.tokens(grad_out)
        members = chunk.logits(q, k).sub_(chunk.tokens(lse)[..., None]).exp_()
        dscores = (g @ u.mT).sub_(chunk.tokens(delta)[..., None]).mul_(members)
        chunk.store(dk, dscores @ q)
        chunk.collect(dq, dscores.mT @ k)
        chunk.collect(du, members.mT @ g)
        of_heads.add(chunk, dscores)
    dq, du = _of_groups(tiles, dq.mul_(x.scale), x.q), _of_groups(tiles, du, x.values)
    return Gradients(dq, dk, du, of_heads.bias(), None, of_heads.compactness())


def pool_backward(
    x: Operands, pooled: Pooled, grad_out: Tensor, grad_mass: Tensor | None, grad_lse: Tensor | None
) -> Gradients:
    """Gradients of ``pool``; ``grad_lse`` given means that lse is the logits' own normaliser."""
    tiles = Tiles(x)
    dq, of_heads = tiles.sums(x.q.shape[-1]), GradientsOfHeads(tiles)
    dk, dv, dlse = torch.empty_like(x.k), torch.empty_like(x.values), tiles.per_token()
    delta = _less((grad_out.to(tiles.dtype) * pooled.out).sum(-1), grad_mass)
    # An empty group has no members to send anything to.
    log_mass = pooled.log_mass.masked_fill(pooled.log_mass == -torch.inf, torch.inf)
    for chunk in tiles.chunks():
        q, k = chunk.scaled_queries(), chunk.tokens(x.k)
        v, g = chunk.tokens(x.values), chunk.groups(grad_out)
        scores = chunk.logits(q, k).sub_(chunk.tokens(pooled.lse)[..., None])
        shares = (scores - chunk.groups(log_mass)[..., None, :]).exp_()
        dscores = (v @ g.mT).sub_(chunk.groups(delta)[..., None, :]).mul_(shares)
        chunk_dlse = dscores.sum(-1).neg_()
        if grad_lse is not None:
            chunk_dlse += chunk.tokens(grad_lse)
            dscores.addcmul_(scores.exp_(), chunk_dlse[..., None])
        chunk.store(dlse, chunk_dlse)
        chunk.store(dv, shares @ g)
        chunk.store(dk, dscores @ q)
        chunk.collect(dq, dscores.mT @ k)
        of_heads.add(chunk, dscores)
    dq = _of_groups(tiles, dq.mul_(x.scale), x.q)
    return Gradients(dq, dk, dv, of_heads.bias(), dlse, of_heads.compactness())


def _less(delta: Tensor, grad: Tensor | None) -> Tensor:
    return delta if grad is None else delta.sub_(grad)


def _of_groups(tiles: Tiles, sums: Tensor, like: Tensor) -> Tensor:
    """Padded sums as a gradient of ``like`` (B, H, N_out, C)."""
    return torch.empty_like(like).copy_(tiles.tiling.crop(sums).flatten(2, -2))


class GradientsOfHeads:
    """The gradients of what belongs to heads, the bias table and the compactness, where there are any."""

    def __init__(self, tiles: Tiles) -> None:
        """Nothing yet."""
        self.x = tiles.x
        self.dbias, self.dcompactness = (
            None if operand is None else torch.zeros_like(operand, dtype=tiles.dtype)
            for operand in (self.x.bias, self.x.compactness)
        )

    def add(self, chunk: Chunk, dscores: Tensor) -> None:
        """Add the logits' gradient (b, h, T, P, Q), summed over samples and over equal offsets, or all pairs."""
        if self.dbias is not None:
            entry = chunk.tables.window_entry.flatten()
            self.dbias.flatten(1)[chunk.heads].index_add_(1, entry, dscores.sum(0).flatten(1))
        if self.dcompactness is not None and chunk.tables.squares is not None:
            self.dcompactness[chunk.heads] -= (dscores.flatten(2) @ chunk.tables.squares.flatten()).sum(0)

    def bias(self) -> Tensor | None:
        """(H, *window) in the bias' dtype."""
        return None if self.dbias is None or self.x.bias is None else self.dbias.to(self.x.bias.dtype)

    def compactness(self) -> Tensor | None:
        """(H,) in float32 at least."""
        return self.dcompactness
