"""Attention with compactness: squared distances as channels, in frames near to whoever looks.

With x and y the places of a query and of a key as seen from some origin,

    -beta |x - y|^2  =  2 beta <x, y> - beta |y|^2 - beta |x|^2

is a channel for every axis, a bias for every key, and a number of the query's own that its softmax does not see. Far
from the origin these terms are large and nearly cancel. So queries are worked through in blocks, each with its origin
in its middle: for whatever is near to a query, and so counts, they are small, however large the grid.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...geometry import Neighbourhood, remembered
from ..operands import Operands
from ..semantics import widened
from . import flash
from .channels import Terms

# No query is farther from its block's origin than the root of this many group spacings, so that rounding leaves about
# 4e-6 times beta in a float32 logit.
REACH = 64

# Largest whole number up to which bfloat16 has every one.
WHOLE = 256


class Side(NamedTuple):
    """Tokens or groups: a grid, and where its points lie in units of half a token's spacing, which are whole numbers."""

    shape: tuple[int, ...]
    starts: tuple[int, ...]
    """Place of the first point, axis by axis."""
    steps: tuple[int, ...]
    """From one point to the next."""
    blocks: tuple[tuple[slice, ...], ...]
    """The grid cut so that no block is too large."""

    def places(self, block: tuple[slice, ...], origin: tuple[int, ...], like: Tensor) -> Tensor:
        """Places of a block's points as seen from an origin, (points, ndim) with the dtype and device of ``like``."""
        columns = [
            torch.arange(*where.indices(n), dtype=like.dtype, device=like.device) * step + (start - seen_from)
            for where, n, step, start, seen_from in zip(block, self.shape, self.steps, self.starts, origin, strict=True)
        ]
        return torch.stack(torch.meshgrid(*columns, indexing="ij"), -1).flatten(0, -2)

    def middle(self, block: tuple[slice, ...]) -> tuple[int, ...]:
        """Place of the point in the middle of a block."""
        indices = [(where.start + where.stop) // 2 for where in block]
        return tuple(i * step + start for i, step, start in zip(indices, self.steps, self.starts, strict=True))


@remembered(256)
def sides_of(neighbourhood: Neighbourhood) -> tuple[Side, Side]:
    """The tokens and the groups of a geometry."""
    axes = neighbourhood.axes
    widths = [2 * axis.stride for axis in axes]
    tokens = tuple(-round(2 * axis.centre) for axis in axes), (2,) * len(axes)
    groups = (0,) * len(axes), tuple(widths)
    return (
        Side(neighbourhood.input_shape, *tokens, _cut(neighbourhood.input_shape, tokens[1], widths)),
        Side(neighbourhood.output_shape, *groups, _cut(neighbourhood.output_shape, groups[1], widths)),
    )


def _cut(shape: tuple[int, ...], steps: tuple[int, ...], widths: list[int]) -> tuple[tuple[slice, ...], ...]:
    """Blocks of a grid whose points have these steps, where a group spacing is so many units wide."""
    cuts = []
    for n, step, width in zip(shape, steps, widths, strict=True):
        longest = min(2 * math.sqrt(REACH / len(shape)) * width, 2 * WHOLE)
        count = max(1, math.ceil(n * step / longest))
        bounds = [n * i // count for i in range(count + 1)]
        cuts.append([slice(*pair) for pair in itertools.pairwise(bounds)])
    return tuple(itertools.product(*cuts))


class Frames(NamedTuple):
    """The compactness of one direction of looking."""

    queries: Side
    keys: Side
    unit: Tensor
    """Group spacings in half a token's spacing, axis by axis (ndim,)."""
    beta: Tensor
    """(H,) in float32 at least."""

    def each(self) -> Iterator[Frame]:
        """One block of queries after another."""
        everything = tuple(slice(0, n) for n in self.keys.shape)
        for block in self.queries.blocks:
            origin = self.queries.middle(block)
            x, y = self.queries.places(block, origin, self.unit), self.keys.places(everything, origin, self.unit)
            yield Frame(self.queries.shape, block, x, y, self.unit, self.beta)


class Frame(NamedTuple):
    """Queries that share an origin, and all keys as seen from there."""

    shape: tuple[int, ...]
    block: tuple[slice, ...]
    x: Tensor
    """(L, ndim), small whole numbers."""
    y: Tensor
    """(M, ndim)."""
    unit: Tensor
    beta: Tensor

    def rows(self, x: Tensor) -> Tensor:
        """The block's rows of something of the queries: (B, H, N[, C]) -> (B, H, L[, C])."""
        return self._of(x).flatten(2, 1 + len(self.shape))

    def put(self, x: Tensor, rows: Tensor) -> None:
        """Write the block's rows."""
        place = self._of(x)
        place.copy_(rows.reshape(place.shape))

    def _of(self, x: Tensor) -> Tensor:
        return torch.unflatten(x, 2, self.shape)[(slice(None), slice(None), *self.block)]

    def terms(self) -> Terms:
        """Channels whose products are 2 beta <x, y>."""
        return Terms(self.x, 2 * self.beta[:, None, None] * (self.y * self.unit.square()))

    def squares(self, places: Tensor) -> Tensor:
        """beta |x|^2 of every head, (H, points)."""
        return self.beta[:, None] * self.lengths(places)

    def lengths(self, places: Tensor) -> Tensor:
        """|x|^2 in units of the group spacing, (points,)."""
        return (places * self.unit).square().sum(-1)

    def key_bias(self, bias: Tensor | None, batch: int) -> Tensor:
        """A bias of the keys (B, H, M) or None, less beta |y|^2."""
        own = -self.squares(self.y)
        return own.expand(batch, -1, -1) if bias is None else bias + own

    def gradient(self, dright: Tensor, dbias: Tensor, grad_lse: Tensor | None) -> Tensor:
        """Gradient to beta, (H,), from those to the channels, to the keys' bias and to the block's own numbers."""
        to_products = 2 * (dright * (self.y * self.unit.square())).sum((0, 2, 3))
        gradient = to_products - (dbias * self.lengths(self.y)).sum((0, 2))
        return gradient if grad_lse is None else gradient - (self.rows(grad_lse) * self.lengths(self.x)).sum((0, 2))


def from_tokens(x: Operands) -> Frames | None:
    """For tokens that look at groups; None where there is no compactness."""
    return _frames(x, 0)


def from_groups(x: Operands) -> Frames | None:
    """For groups that look at tokens."""
    return _frames(x, 1)


def _frames(x: Operands, queries: int) -> Frames | None:
    if x.compactness is None or x.neighbourhood is None:
        return None
    sides, beta = sides_of(x.neighbourhood), x.compactness
    halves = [1 / (2 * axis.stride) for axis in x.neighbourhood.axes]
    return Frames(sides[queries], sides[1 - queries], torch.tensor(halves, dtype=beta.dtype, device=beta.device), beta)


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, key_bias: Tensor | None, frames: Frames | None
) -> tuple[Tensor, Tensor]:
    """:func:`.flash.attention` whose logits are lowered by the squared distances of ``frames``, if there are any."""
    if frames is None:
        return flash.attention(q, k, v, scale, key_bias)
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    lse = q.new_empty(q.shape[:3], dtype=widened(q.dtype))
    for frame in frames.each():
        bias = frame.key_bias(key_bias, q.shape[0])
        part, part_lse = flash.attention(frame.rows(q), k, v, scale, bias, frame.terms())
        frame.put(out, part)
        frame.put(lse, part_lse - frame.squares(frame.x))
    return out, lse


def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    key_bias: Tensor | None,
    frames: Frames | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of :func:`attention` to (q, k, v, key_bias, beta)."""
    if frames is None:
        return *flash.attention_backward(grad_out, grad_lse, q, k, v, out, lse, scale, key_bias)[:4], None
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros_like(x, dtype=widened(x.dtype)) for x in (k, v))
    dbias, dbeta = dk.new_zeros(k.shape[:3]), torch.zeros_like(frames.beta)
    for frame in frames.each():
        of_lse = None if grad_lse is None else frame.rows(grad_lse)
        operands = frame.rows(q), k, v, frame.rows(out), frame.rows(lse) + frame.squares(frame.x)
        bias = frame.key_bias(key_bias, q.shape[0])
        part = flash.attention_backward(frame.rows(grad_out), of_lse, *operands, scale, bias, frame.terms())
        frame.put(dq, part[0])
        for total, more in zip((dk, dv, dbias), part[1:4], strict=True):
            total += more
        dbeta += frame.gradient(part[4], part[3], grad_lse)
    return dq, dk, dv, dbias, dbeta


def weighted_means(
    q: Tensor, k: Tensor, weights: Tensor, scale: float, key_bias: Tensor, frames: Frames | None
) -> tuple[Tensor, Tensor | None]:
    """What every query sees on average of ``weights`` (B, H, M) times the keys, and times their squared distance.

    Returns:
        (B, H, N, D), and (B, H, N) or None where there are no frames.
    """
    weights = weights[..., None]
    if frames is None:
        return flash.attention(q, k, (weights * k).to(k.dtype), scale, key_bias)[0], None
    means, squares = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=widened(q.dtype))
    for frame in frames.each():
        x, y = frame.x * frame.unit, frame.y * frame.unit
        places = torch.cat((y, frame.lengths(frame.y)[:, None], torch.ones_like(y[:, :1])), -1)
        values = torch.cat((weights * k, weights * places), -1).to(k.dtype)
        bias = frame.key_bias(key_bias, q.shape[0])
        out = flash.attention(frame.rows(q), k, values, scale, bias, frame.terms())[0]
        mean, products, lengths, total = out.split((k.shape[-1], x.shape[-1], 1, 1), -1)
        frame.put(means, mean)
        own = frame.lengths(frame.x) * total.squeeze(-1)
        frame.put(squares, lengths.squeeze(-1) - 2 * (products * x).sum(-1) + own)
    return means, squares
