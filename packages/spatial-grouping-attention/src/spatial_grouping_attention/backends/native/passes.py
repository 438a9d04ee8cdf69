"""The four passes on operands: what is allocated, and which kernels run in which order."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..operands import Gradients, Operands, Pooled
from ..semantics import rows_like, scalars_like, widened
from . import backward, forward
from .bundles import Rows
from .jit import compiled
from .plan import (
    ROWS_PER_SUM,
    Demand,
    blocks_of,
    call_of,
    floats,
    geometry_of,
    items_of,
    kept,
    make_room,
    readable,
    rows_of,
    threads_for,
)
from .simd import BYTES
from .structures import address, in_memory
from .threads import for_each


class Pass:
    """Operands as kernels take them, and how many threads work on them."""

    def __init__(self, x: Operands) -> None:
        """Operands of any floating type."""
        assert x.neighbourhood is not None
        self.x = x
        self.dtype = widened(x.q.dtype)
        self.kept = kept(x)
        self.geometry = geometry_of(x.neighbourhood)
        self.call = call_of(self.kept, self.geometry)
        self.values = rows_of(self.kept.values)
        self.channels = x.values.shape[3]
        self.threads = threads_for(x)
        self.masked = x.valid is not None or x.valid_groups is not None

    def run(self, kernel: Any, need: Demand | None, *bundles: tuple[Any, ...], halo: bool = True) -> int:
        """Run a kernel on all items of work; ``need`` is what it needs room for, if it does."""
        entry = compiled(kernel, self.dtype)
        items = items_of(self.x, self.threads, halo=halo)
        given = [in_memory(bundle) for bundle in (self.call, *bundles)]
        addresses = [address(words) for words in given]

        def worker() -> Callable[[int], int]:
            if need is None:
                return lambda item: entry(item, *addresses)
            room, memory = make_room(self.geometry, need, self.dtype, items.heads)
            words = array("q", room)

            def work(item: int, _: Any = memory) -> int:  # which lives as long as this
                return entry(item, *addresses, address(words))

            return work

        return for_each(worker, items.addresses, self.threads)

    def readable(self, x: Tensor) -> Tensor:
        """A further operand with rows of channels."""
        return readable(x, self.dtype)

    def numbers(self, x: Tensor | None) -> Tensor | None:
        """A further operand with a number for every token or group."""
        return None if x is None else x.detach().to(self.dtype).contiguous()

    def gradient(self, of: Tensor) -> Tensor:
        """Where kernels put the gradient of an operand, zero for what is masked."""
        result = torch.empty_like(of, dtype=self.dtype)
        if result.stride(3) != 1 and result.shape[3] > 1:
            result = torch.empty(of.shape, dtype=self.dtype)
        return result.zero_() if self.masked else result

    def of_pairs(self) -> tuple[backward.OfPairs, Tensor | None, Tensor | None]:
        """Sums over pairs, zeroed, for the bias and for compactness, where there are these."""
        assert self.x.neighbourhood is not None
        blocks = blocks_of(self.x.neighbourhood)
        sums = self.x.q.shape[0] * self.x.q.shape[1] * blocks
        entries, lanes = math.prod(axis.window for axis in self.x.neighbourhood.axes), BYTES // self.dtype.itemsize
        bias = None if self.x.bias is None else torch.zeros(sums, entries, dtype=self.dtype)
        compactness = None if self.x.compactness is None else torch.zeros(sums, lanes, dtype=self.dtype)
        return backward.OfPairs(ROWS_PER_SUM, blocks, floats(bias), floats(compactness)), bias, compactness

    def of_heads(self, bias: Tensor | None, compactness: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the bias table and of compactness, from the sums over pairs."""
        batch, heads = self.x.q.shape[:2]
        if bias is not None and self.x.bias is not None:
            summed = bias.view(batch, heads, -1, bias.shape[1]).sum((0, 2))
            bias = torch.empty_like(self.x.bias).copy_(summed.view(self.x.bias.shape))
        if compactness is not None and self.x.compactness is not None:
            summed = compactness.view(batch, heads, -1).sum((0, 2)).neg_()
            compactness = torch.empty_like(self.x.compactness).copy_(summed)
        return bias, compactness


def assign(x: Operands) -> tuple[Tensor, Tensor]:
    """See :func:`.native.assign`."""
    this = Pass(x)
    out, lse = rows_like(x.values, x.k.shape[2], this.channels), scalars_like(x.k)
    if this.masked:
        out.zero_()
        lse.fill_(torch.inf)
    need = Demand(x.q.shape[3], more=this.channels, rows=True)
    this.run(forward.assign, need, this.values, forward.Assigned(rows_of(out), floats(lse)), halo=False)
    return out, lse


def pool(x: Operands, given_lse: Tensor | None) -> Pooled:
    """See :func:`.native.pool`."""
    this = Pass(x)
    out, log_mass = rows_like(x.values, x.q.shape[2], this.channels), scalars_like(x.q)
    own = given_lse is None
    lse = scalars_like(x.k) if given_lse is None else given_lse
    if own and this.masked:
        lse.fill_(torch.inf)
    normalisers = lse if own else this.numbers(lse)
    to = forward.Averaged(this.values, floats(normalisers), own, rows_of(out), floats(log_mass))
    need = Demand(x.q.shape[3], of_tokens=this.channels, sums=(this.channels,))
    if this.run(forward.pool, need, to):
        this.run(forward.starved, None, to)
    return Pooled(out, log_mass, lse)


def assign_backward(x: Operands, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
    """See :func:`.native.assign_backward`."""
    this = Pass(x)
    grad_out = this.readable(grad_out)
    lse, grad_lse = lse.contiguous(), this.numbers(grad_lse)
    dq, dk, du = this.gradient(x.q), this.gradient(x.k), this.gradient(x.values)
    pairs, bias, compactness = this.of_pairs()
    to = backward.AssignBackward(
        floats(lse),
        rows_of(grad_out),
        floats(grad_lse),
        rows_of(dq),
        rows_of(dk),
        rows_of(du),
        pairs,
    )
    keys, channels = x.q.shape[3], this.channels
    need = Demand(keys, channels, more_columns=True, rows=True, of_tokens=channels, sums=(keys, channels))
    this.run(backward.assign_backward, need, this.values, to)
    dbias, dcompactness = this.of_heads(bias, compactness)
    return Gradients(_as(dq, x.q), _as(dk, x.k), _as(du, x.values), dbias, None, dcompactness)


def pool_backward(
    x: Operands, pooled: Pooled, grad_out: Tensor, grad_mass: Tensor | None, grad_lse: Tensor | None
) -> Gradients:
    """See :func:`.native.pool_backward`."""
    this = Pass(x)
    own = grad_lse is not None
    out, grad_out = this.readable(pooled.out), this.readable(grad_out)
    grad_mass, grad_lse = this.numbers(grad_mass), this.numbers(grad_lse)
    lse, log_mass = this.numbers(pooled.lse), this.numbers(pooled.log_mass)
    delta, dlse = scalars_like(x.q), scalars_like(x.k)
    if this.masked and not own:
        dlse.zero_()
    grad: Rows = rows_of(grad_out)
    this.run(backward.deltas, None, grad, backward.Deltas(rows_of(out), floats(grad_mass), floats(delta)), halo=False)
    dq, dk, dv = this.gradient(x.q), this.gradient(x.k), this.gradient(x.values)
    pairs, bias, compactness = this.of_pairs()
    to = backward.PoolBackward(
        this.values,
        floats(lse),
        floats(log_mass),
        floats(delta),
        own,
        floats(grad_lse),
        rows_of(dq),
        rows_of(dk),
        rows_of(dv),
        floats(None if own else dlse),
        pairs,
    )
    keys, channels = x.q.shape[3], this.channels
    need = Demand(keys, channels, more_columns=True, rows=True, of_tokens=channels, sums=(keys,))
    this.run(backward.pool_backward, need, grad, to)
    dbias, dcompactness = this.of_heads(bias, compactness)
    return Gradients(_as(dq, x.q), _as(dk, x.k), _as(dv, x.values), dbias, dlse, dcompactness)


def _as(gradient: Tensor, operand: Tensor) -> Tensor:
    """A gradient as its operand is: in its type and order in memory."""
    if gradient.dtype == operand.dtype and gradient.stride(3) == 1:
        return gradient
    return torch.empty_like(operand).copy_(gradient)
