"""The passes on points, on tensors: what is allocated, and what is launched.

Operands are of one type, float32 or float64; results are too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from RoSE.kernels.sealed import seal
from torch import Tensor

from ....geometry.lattice import Index, Lattice
from ...derivatives import Derivatives, Relative, Wanted
from ...semantics import LOWEST
from ..launch import as_rows
from . import form
from .bundles import Points

MOST_CHANNELS = 128
"""That a program works through at a time."""

BLOCK_BYTES = 2**11
"""Of the vectors that a program sees at a point of its tokens."""

MOST_TOKENS = 128
"""Of a program that sees no vectors."""

WARPS = 1


class Room(NamedTuple):
    """What a launch of :func:`.form.derivatives` reads and fills, by its arguments' names."""

    factors: Tensor | None = None
    of_tokens: Tensor | None = None
    of_groups: Tensor | None = None
    highest: Tensor | None = None
    largest: Tensor | None = None
    grad_masses: Tensor | None = None
    to_factors: Tensor | None = None
    to_places: Tensor | None = None
    to_tokens: Tensor | None = None
    to_groups: Tensor | None = None
    to_masses: Tensor | None = None


class Pass:
    """Points as kernels take them."""

    def __init__(self, places: Tensor, groups: Lattice) -> None:
        """Places (B, H, N, P, ndim) in the type of all operands."""
        self.shape, self.ndim = tuple(places.shape[:4]), places.shape[4]
        self.size = math.prod(groups.shape)
        self.places = places.detach().contiguous()
        first = last = valid = None
        if groups.valid is not None:
            first, last = (_ends(groups, end, self.shape[0]) for end in (0, 1))
            valid = groups.valid.contiguous().view(torch.uint8)
        sizes = (1, 1, *groups.shape)[-3:]
        self.points = Points(self.places, first, last, valid, seal(sizes), seal(self.shape[2]), seal(self.shape[1]))

    def launch(self, kernel: Any, channels: int, *arguments: Any, **constants: int) -> None:
        """Launch a kernel whose programs own tokens, as many as blocks of so many channels leave room for."""
        batch, heads, tokens, per_token = self.shape
        seen = 2**self.ndim * channels * self.places.dtype.itemsize
        block = min(max(1, BLOCK_BYTES // seen), MOST_TOKENS)
        constants |= {"NDIM": self.ndim, "PER_TOKEN": per_token, "BLOCK": block, "num_warps": WARPS}
        # Triton launches on the current device, wherever the operands are.
        with torch.cuda.device_of(self.places):  # type: ignore[no-untyped-call]
            kernel[(batch * heads * triton.cdiv(tokens, block),)](self.points, *arguments, **constants)

    def derive(self, room: Room, channels: int) -> None:
        """Fill what there is room for, with derivatives over at most :data:`MOST_CHANNELS`."""
        padded = triton.next_power_of_2(channels)
        rows = {name: as_rows(getattr(room, name)) for name in ("of_tokens", "of_groups", "to_tokens", "to_groups")}
        arguments = {**room._asdict(), **rows}
        self.launch(form.derivatives, padded, *arguments.values(), CHANNELS=channels, PADDED=padded)

    def numbers(self) -> Tensor:
        """Room for a number of every point."""
        return self.places.new_empty(self.shape)

    def of_groups(self, *channels: int, start: float = 0.0) -> Tensor:
        """Room for what is gathered at groups."""
        return self.places.new_full((*self.shape[:2], self.size, *channels), start)


def products(q: Tensor, k: Tensor, places: Tensor, groups: Lattice) -> Tensor:
    """See :func:`...deformable.plain.products`."""
    found = derivatives(None, places, k, q, groups, Wanted(factors=True)).factors
    assert found is not None
    return found


def averages(shares: Tensor, places: Tensor, u: Tensor, groups: Lattice) -> Tensor:
    """See :func:`...deformable.plain.averages`."""
    found = derivatives(shares, places, None, u, groups, Wanted(tokens=True)).tokens
    assert found is not None
    return found


def sums(shares: Tensor, places: Tensor, v: Tensor, groups: Lattice) -> Tensor:
    """See :func:`...deformable.plain.sums`."""
    found = derivatives(shares, places, v, None, groups, Wanted(groups=True)).groups
    assert found is not None
    return found


def relative_sums(log_shares: Tensor, places: Tensor, v: Tensor, groups: Lattice) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`...deformable.plain.relative_sums`."""
    this, v, log_shares = Pass(places, groups), v.detach(), log_shares.detach().contiguous()
    top, masses = this.of_groups(start=LOWEST), this.of_groups()
    this.launch(form.highest, 1, log_shares, top)
    total = this.of_groups(v.shape[3])
    for i, c in enumerate(_slices(v.shape[3])):
        room = Room(factors=log_shares, of_tokens=v[..., c], highest=top, to_groups=total[..., c])
        this.derive(room._replace(to_masses=masses if i == 0 else None), v[..., c].shape[3])
    return total, masses, top


def touches(places: Tensor, groups: Lattice) -> Tensor:
    """See :func:`...deformable.interpolation.touches`."""
    this = Pass(places, groups)
    touched = torch.empty(this.shape, dtype=torch.int8, device=places.device)
    this.launch(form.touched, 1, touched)
    return touched.view(torch.bool)


def derivatives(
    factors: Tensor | None,
    places: Tensor,
    of_tokens: Tensor | None,
    of_groups: Tensor | None,
    groups: Lattice,
    wanted: Wanted,
    relative: Relative | None = None,
) -> Derivatives:
    """Derivatives of ``sum_ip c_ip <z(x_ip), r_i>``; an operand may be missing that those wanted do not depend on.

    Args:
        factors: c; where sums are relative the logarithms of shares (B, H, N, P).
        places: x (B, H, N, P, ndim).
        of_tokens: r (B, H, N, C).
        of_groups: z (B, H, M, C).
        groups: the grid of groups.
        wanted: which derivatives are.
        relative: of relative sums.
    """
    this = Pass(places, groups)
    factors = None if factors is None else factors.detach().contiguous()
    tokens, rows = (None if x is None else x.detach() for x in (of_tokens, of_groups))
    channels = next(x.shape[3] for x in (tokens, rows) if x is not None)
    to_tokens = places.new_empty(*this.shape[:3], channels) if wanted.tokens else None
    to_groups = this.of_groups(channels) if wanted.groups else None
    to_factors = to_places = None
    more = {} if relative is None else {name: x.contiguous() for name, x in relative._asdict().items()}
    for i, c in enumerate(_slices(channels)):
        room = Room(
            factors,
            _channels(tokens, c),
            _channels(rows, c),
            more.get("highest"),
            more.get("masses"),
            more.get("grad_masses") if i == 0 else None,
            this.numbers() if wanted.factors else None,
            torch.empty_like(this.places) if wanted.places else None,
            _channels(to_tokens, c),
            _channels(to_groups, c),
        )
        this.derive(room, min(MOST_CHANNELS, channels - c.start))
        # The form is a sum over channels.
        to_factors, to_places = _added(to_factors, room.to_factors), _added(to_places, room.to_places)
    return Derivatives(to_factors, to_places, to_tokens, to_groups)


def _slices(channels: int) -> Iterator[slice]:
    """Channels in pieces that programs can hold."""
    return (slice(i, i + MOST_CHANNELS) for i in range(0, channels, MOST_CHANNELS))


def _channels(x: Tensor | None, c: slice) -> Tensor | None:
    return None if x is None else x[..., c]


def _added(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    return part if total is None or part is None else total.add_(part)


def _ends(groups: Lattice, end: int, batch: int) -> Tensor:
    """First or last indices of the box along three axes, (B, 3)."""

    def of_sample(index: Index) -> Tensor:
        assert isinstance(index, Tensor)  # where not all groups are valid
        return index.view(-1).expand(batch)

    ends = [of_sample(axis[end]) for axis in groups.box]
    unused = [torch.zeros_like(ends[0])] * (3 - len(ends))
    return torch.stack([*unused, *ends], 1).to(torch.int32)
