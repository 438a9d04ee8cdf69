"""Attention with compactness: squared distances as channels, in frames near to whoever looks.

With x and y the places of a query and of a key as seen from some origin,

    -beta |x - y|^2  =  2 beta <x, y> - beta |y|^2 - beta |x|^2

is a channel for every axis, a bias for every key, and a number of the query's own that its softmax does not see. Far
from the origin these terms are large and nearly cancel. So queries are worked through in patches, each with its origin
in its middle: for whatever is near to a query, and so counts, they are small, however large the grid.

Keys too far from a patch to count at all are left out (:func:`_horizon`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ..operands import Operands
from ..semantics import widened
from . import flash
from .channels import Call, Sums, Terms
from .grids import SMALL, Patch, Side, View, remembered_view, sides_of, view

# Largest beta |x|^2 in a patch: rounding then leaves about 1e-5 in a float32 logit.
LARGEST_TERM = 64.0
# Smallest reach: beyond a beta of 16, where patches would have few points, the error grows with beta instead.
SMALLEST_REACH = 4.0


class Frame(NamedTuple):
    """Queries that share an origin, and the keys that count for them."""

    queries: Patch
    keys: Patch
    view: View
    beta: Tensor
    """(H,)."""

    def of(self, call: Call) -> Call:
        """The part of a call that the frame sees: its channels' products are 2 beta <x, y>, its bias -beta |y|^2."""
        q, (k, v) = self.queries.rows(call.q), (self.keys.rows(x) for x in (call.k, call.v))
        bias = -self.beta[:, None] * self.view.others
        bias = bias.expand(q.shape[0], -1, -1) if call.key_bias is None else self.keys.rows(call.key_bias) + bias
        return Call(q, k, v, call.scale, bias, Terms(self.view.x, 2 * self.beta[:, None, None] * self.view.y))

    def squares(self) -> Tensor:
        """beta |x|^2 of the queries, (H, L)."""
        return self.beta[:, None] * self.view.own

    def gradient(self, sums: Sums, dbias: Tensor) -> Tensor:
        """Gradient to beta, (H,), from sums of the logits' gradient, of which ``dbias`` are those over queries."""
        to_products = 2 * (sums.right * self.view.y).sum((0, 2, 3))
        return to_products - ((dbias @ self.view.others) + (sums.rows @ self.view.own)).sum(0)


class Frames(NamedTuple):
    """The compactness of one direction of looking."""

    queries: Side
    keys: Side
    widths: tuple[int, ...]
    beta: Tensor
    horizon: tuple[float, ...]
    """How far from a query keys count, axis by axis in the units of places."""

    def each(self) -> Iterator[Frame]:
        """One patch of queries after another."""
        for patch in self.queries.patches:
            near = self.queries.near(patch, self.keys, self.horizon)
            see = remembered_view if patch.points + near.points <= SMALL else view
            seen = see(*self[:3], patch, near, self.beta.dtype, self.beta.device)
            yield Frame(patch, near, seen, self.beta)


def frames_of(x: Operands, *, own_lse: bool = True) -> tuple[Frames | None, Frames | None]:
    """Of tokens that look at groups, and of groups that look at tokens; None where there is no compactness.

    Args:
        x: operands.
        own_lse: whether the tokens' normalisers are those of their own logits; of given ones nothing is known.
    """
    if x.compactness is None or x.neighbourhood is None:
        return None, None
    tokens, groups, widths, isolation = sides_of(x.neighbourhood, _reach(x.compactness))
    radius = _horizon(x, isolation) if own_lse else math.inf
    rest = widths, x.compactness, tuple(radius * width for width in widths)
    return Frames(tokens, groups, *rest), Frames(groups, tokens, *rest)


def _reach(beta: Tensor) -> float:
    """How large patches may be, for the largest beta; on devices for one of 1: looking would mean waiting for them."""
    largest = beta.max().item() if _on_cpu(beta) else 1.0
    if not largest > 0:
        return math.inf
    # Few different sizes, so that what is remembered serves while beta is learned.
    reach = max(LARGEST_TERM / largest, SMALLEST_REACH)
    return 2.0 ** (math.floor(4 * math.log2(reach)) / 4) if reach < math.inf else reach


def _on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _horizon(x: Operands, isolation: float) -> float:
    """Distance, in units of the group spacing, beyond which no membership and no share can be told from 0.

    With S the largest product, h the largest distance of anything from what is nearest to it and G groups,

        log A_ij  =  s_ij - l_i  <=  S - beta d^2 - (-S - beta h^2),

    and a group's mass is no less than what its nearest token gives it: log M_j >= -S - beta h^2 - (S + log G). So a
    share A_ij / M_j is below eps / N from beta (d^2 - 2 h^2) = 4 S + log(G N / eps) on. Infinite where beta is 0, where
    masks may take away what is nearest, and on devices.
    """
    if not _on_cpu(x.q) or x.valid is not None or x.valid_groups is not None:
        return math.inf
    longest = [rows.detach().float().norm(dim=-1).max().item() for rows in (x.q, x.k)]
    products, beta = abs(x.scale) * math.prod(longest), x.compactness.min().item()  # type: ignore[union-attr]
    counts = 4 * products + math.log(x.q.shape[2] * x.k.shape[2] / torch.finfo(widened(x.q.dtype)).eps)
    return math.sqrt(2 * isolation + counts / beta) if beta > 0 and math.isfinite(counts) else math.inf


def attention(call: Call, frames: Frames | None) -> tuple[Tensor, Tensor]:
    """:func:`.flash.attention` whose logits are lowered by the squared distances of ``frames``, if there are any."""
    if frames is None:
        return flash.attention(call)
    q = call.q
    out, lse = q.new_empty(*q.shape[:3], call.v.shape[-1]), q.new_empty(q.shape[:3], dtype=widened(q.dtype))
    for frame in frames.each():
        part, part_lse = flash.attention(frame.of(call))
        _put(frame.queries, out, part)
        _put(frame.queries, lse, part_lse - frame.squares())
    return out, lse


def attention_backward(
    call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, frames: Frames | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of :func:`attention` to (q, k, v, key_bias, beta)."""
    if frames is None:
        return *flash.attention_backward(call, out, lse, grad_out, grad_lse)[:4], None
    dq = torch.empty_like(call.q)
    dk, dv = (torch.zeros_like(x, dtype=widened(x.dtype)) for x in (call.k, call.v))
    dbias, dbeta = dk.new_zeros(call.k.shape[:3]), torch.zeros_like(frames.beta)
    for frame in frames.each():
        rows = frame.queries.rows
        results = rows(out), rows(lse) + frame.squares(), rows(grad_out), None if grad_lse is None else rows(grad_lse)
        part = flash.attention_backward(frame.of(call), *results)
        _put(frame.queries, dq, part[0])
        of_bias, sums = cast(Tensor, part[3]), cast(Sums, part[4])
        for total, more in ((dk, part[1]), (dv, part[2]), (dbias, of_bias)):
            place = frame.keys.of(total)
            place += more.reshape(place.shape)
        dbeta += frame.gradient(sums, of_bias)
    return dq, dk, dv, dbias, dbeta


def weighted_means(call: Call, weights: Tensor, frames: Frames | None) -> tuple[Tensor, Tensor | None]:
    """What every query sees on average of ``weights`` (B, H, M) times the keys, and times their squared distance.

    Returns:
        (B, H, N, D), and (B, H, N) or None where there are no frames. The call's own values do not matter.
    """
    q, k, weights = call.q, call.k, weights[..., None]
    if frames is None:
        return flash.attention(call._replace(v=(weights * k).to(k.dtype)))[0], None
    means, squares = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=widened(q.dtype))
    for frame in frames.each():
        keys, weight, seen = frame.keys.rows(k), frame.keys.rows(weights), frame.view
        places = torch.cat((seen.y, seen.others[:, None], torch.ones_like(seen.y[:, :1])), -1)
        values = torch.cat((weight * keys, weight * places), -1).to(k.dtype)
        out, _ = flash.attention(frame.of(call)._replace(v=values))
        mean, products, lengths, total = torch.split(out, [k.shape[-1], seen.x.shape[-1], 1, 1], -1)
        _put(frame.queries, means, mean)
        apart = lengths - 2 * (products * seen.x).sum(-1, keepdim=True) + seen.own[:, None] * total
        _put(frame.queries, squares, apart.squeeze(-1))
    return means, squares


def _put(patch: Patch, x: Tensor, rows: Tensor) -> None:
    """Write a patch's rows (B, H, L[, C]) of x (B, H, N[, C])."""
    place = patch.of(x)
    place.copy_(rows.reshape(place.shape))
