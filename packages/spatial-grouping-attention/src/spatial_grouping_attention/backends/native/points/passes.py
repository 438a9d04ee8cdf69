"""The passes on points, on tensors: what is allocated, and which kernels run.

Operands are of one type, float32 or float64; results are too. Sums over groups are taken in a number of parts that
depends on sizes alone, one after the other, so results do not depend on the number of threads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ....geometry.lattice import Index, Lattice
from ...derivatives import Derivatives, Relative, Wanted
from ...semantics import LOWEST
from ..bundles import Bytes, Floats, Integers, Rows
from ..jit import compiled
from ..plan import WORTH_A_THREAD, floats, rows_of
from ..simd import BYTES
from ..structures import address, in_memory
from ..threads import for_each
from . import backward, forward
from .bundles import Backward, Forward, Points, Room, Span, Sums

ITEMS = 16
"""Of work, where there are tokens for so many; more make more partial sums."""

_NOTHING = Floats(0)
_NO_ROWS = Rows(_NOTHING, 0, 0, 0, 0)


class Pass:
    """Points as kernels take them, and how work on them is divided."""

    def __init__(self, places: Tensor, groups: Lattice) -> None:
        """Places (B, H, N, P, ndim) in the type of all operands."""
        self.shape = tuple(places.shape[:4])
        batch, heads, tokens, per_token = self.shape
        ndim, size = places.shape[4], torch.Size(groups.shape).numel()
        self.places, self.size = places.detach().contiguous(), size
        self.first, self.last = (_ends(groups, end) for end in (0, 1))
        self.valid = None if groups.valid is None else groups.valid.contiguous()
        outer, middle, inner = (1, 1, *groups.shape)[-3:]
        self.points = Points(
            floats(self.places),
            ndim,
            2**ndim,
            tokens,
            per_token,
            (outer, middle, inner),
            size,
            Integers(self.first.data_ptr()),
            Integers(self.last.data_ptr()),
            0 if self.first.shape[0] == 1 else 3,
            Bytes(0 if self.valid is None else self.valid.data_ptr()),
        )
        # As many as make enough items, but no more numbers than are added up.
        most = max(1, tokens * per_token * 2**ndim // size)
        self.parts = min(-(-ITEMS // (batch * heads)), tokens, most)
        ends = [tokens * part // self.parts for part in range(self.parts + 1)]
        self.spans = [
            in_memory((Span(b, h, b * heads + h, (b * heads + h) * self.parts + part, first, last),))
            for b in range(batch)
            for h in range(heads)
            for part, (first, last) in enumerate(itertools.pairwise(ends))
        ]

    def run(self, kernel: Any, to: tuple[Any, ...], channels: int) -> None:
        """Run a kernel on all items of work."""
        entry = compiled(kernel, self.places.dtype)
        given = [in_memory(bundle) for bundle in (self.points, to)]
        addresses = [address(words) for words in given]

        def worker() -> Callable[[int], int]:
            room, memory = _make_room()
            words = in_memory(room)

            def work(item: int, _: Any = memory) -> int:  # which lives as long as this
                return entry(item, *addresses, address(words))

            return work

        operations = self.places.shape[:4].numel() * self.points.corners * (channels + 8)
        threads = torch.get_num_threads() if operations > WORTH_A_THREAD else 1
        for_each(worker, [address(words) for words in self.spans], threads)

    def numbers(self) -> Tensor:
        """Room for a number of every point."""
        return self.places.new_empty(self.shape)

    def sums(self, *channels: int, start: float = 0.0) -> Tensor:
        """Room for sums over groups, in parts."""
        return self.places.new_full((*self.shape[:2], self.parts, self.size, *channels), start)


def products(q: Tensor, k: Tensor, places: Tensor, groups: Lattice) -> Tensor:
    """See :func:`...deformable.plain.products`."""
    this, result = Pass(places, groups), places.new_empty(places.shape[:4])
    q, k = _readable(q), _readable(k)
    this.run(forward.products, Forward(rows_of(q), rows_of(k), floats(result)), q.shape[3])
    return result


def averages(shares: Tensor, places: Tensor, u: Tensor, groups: Lattice) -> Tensor:
    """See :func:`...deformable.plain.averages`."""
    this, channels = Pass(places, groups), u.shape[3]
    u, shares = _readable(u), shares.detach().contiguous()
    out = u.new_zeros(*places.shape[:3], u.shape[3])
    this.run(forward.averages, Forward(rows_of(u), rows_of(out), floats(shares)), u.shape[3])
    return _cut(out, channels)


def sums(shares: Tensor, places: Tensor, v: Tensor, groups: Lattice) -> Tensor:
    """See :func:`...deformable.plain.sums`."""
    this, channels = Pass(places, groups), v.shape[3]
    v, shares = _readable(v), shares.detach().contiguous()
    total = this.sums(v.shape[3])
    this.run(forward.sums, Sums(rows_of(v), floats(shares), _NOTHING, floats(total), _NOTHING), v.shape[3])
    return _cut(total.sum(2), channels)


def relative_sums(log_shares: Tensor, places: Tensor, v: Tensor, groups: Lattice) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`...deformable.plain.relative_sums`."""
    this, channels = Pass(places, groups), v.shape[3]
    v, log_shares = _readable(v), log_shares.detach().contiguous()
    tops = this.sums(start=LOWEST)
    this.run(forward.highest, Sums(_NO_ROWS, floats(log_shares), floats(tops), _NOTHING, _NOTHING), 0)
    top, total, masses = tops.amax(2), this.sums(v.shape[3]), this.sums()
    to = Sums(rows_of(v), floats(log_shares), floats(top), floats(total), floats(masses))
    this.run(forward.sums, to, v.shape[3])
    return _cut(total.sum(2), channels), masses.sum(2), top


def touches(places: Tensor, groups: Lattice) -> Tensor:
    """See :func:`...deformable.interpolation.touches`."""
    this = Pass(places, groups)
    touched = this.numbers()
    this.run(forward.touched, Sums(_NO_ROWS, floats(touched), _NOTHING, _NOTHING, _NOTHING), 0)
    return touched > 0


def derivatives(
    factors: Tensor,
    places: Tensor,
    of_tokens: Tensor,
    of_groups: Tensor,
    groups: Lattice,
    wanted: Wanted,
    relative: Relative | None = None,
) -> Derivatives:
    """Derivatives of ``sum_ip c_ip <z(x_ip), r_i>``.

    Args:
        factors: c; where sums are relative the logarithms of shares (B, H, N, P).
        places: x (B, H, N, P, ndim).
        of_tokens: r (B, H, N, C).
        of_groups: z (B, H, M, C).
        groups: the grid of groups.
        wanted: which derivatives are.
        relative: of relative sums.
    """
    this, channels = Pass(places, groups), of_tokens.shape[3]
    factors, of_tokens, of_groups = factors.detach().contiguous(), _readable(of_tokens), _readable(of_groups)
    dfactors = this.numbers() if wanted.factors else None
    dplaces = torch.empty_like(this.places) if wanted.places else None
    dtokens = torch.zeros_like(of_tokens, memory_format=torch.contiguous_format) if wanted.tokens else None
    dgroups = this.sums(of_groups.shape[3]) if wanted.groups else None
    more = [None] * 3 if relative is None else [x.contiguous() for x in relative]
    to = Backward(
        rows_of(of_groups),
        rows_of(of_tokens),
        floats(factors),
        floats(more[0]),
        floats(more[1]),
        floats(more[2]),
        floats(dfactors),
        _NO_ROWS if dtokens is None else rows_of(dtokens),
        floats(dplaces),
        floats(dgroups),
    )
    this.run(backward.derivatives, to, 4 * of_tokens.shape[3])
    return Derivatives(
        dfactors,
        dplaces,
        None if dtokens is None else _cut(dtokens, channels),
        None if dgroups is None else _cut(dgroups.sum(2), channels),
    )


def _ends(groups: Lattice, end: int) -> Tensor:
    """First or last indices of the box along three axes, (B or 1, 3)."""

    def of_sample(index: Index) -> Tensor:
        return index.view(-1) if isinstance(index, Tensor) else torch.tensor([index])

    ends = [of_sample(axis[end]) for axis in groups.box]
    unused = [torch.zeros_like(ends[0])] * (3 - len(ends))
    return torch.stack([*unused, *ends], 1)


def _readable(x: Tensor) -> Tensor:
    """Rows in whole vectors of channels: copied only where they are not."""
    x, lanes = x.detach(), BYTES // x.dtype.itemsize
    if x.shape[3] % lanes or x.shape[3] == 0:
        return F.pad(x, (0, lanes - x.shape[3] % lanes))
    return x if x.stride(3) == 1 else x.contiguous()


def _cut(x: Tensor, channels: int) -> Tensor:
    """Rows without the channels that filled whole vectors; no view, which nobody could change in place."""
    return x if x.shape[-1] == channels else x[..., :channels].contiguous()


def _make_room() -> tuple[Room, Tensor]:
    """A room and the memory that it names, for one thread."""
    part = 24 * 8  # bytes, of which no part needs more
    memory = torch.zeros(len(Room._fields) * part, dtype=torch.uint8)
    at, *others = range(memory.data_ptr(), memory.data_ptr() + memory.numel(), part)
    weight, slope, moves, share = map(Floats, others)
    return Room(Integers(at), weight, slope, moves, share), memory
