"""What kernels on points take; see :mod:`..bundles`. Channels of all rows fill whole vectors."""

from __future__ import annotations

from typing import NamedTuple

from ..bundles import Bytes, Floats, Integers, Rows, Triple


class Points(NamedTuple):
    """Points of tokens on a grid of groups with three axes, of which a grid of fewer leaves the first out."""

    places: Floats
    """In steps of the grid (B, H, N, P, ndim)."""
    ndim: int
    corners: int
    """2 ** ndim."""
    tokens: int
    """N."""
    per_token: int
    """P."""
    sizes: Triple
    groups: int
    """M."""
    first: Integers
    """First and last index of the box that holds all valid groups, (B or 1, 3)."""
    last: Integers
    box: int
    """From one sample's to the next: 3, or 0 where all have the same."""
    valid: Bytes
    """(B * M,)."""


class Span(NamedTuple):
    """An item of work: tokens ``first <= i < last`` of one sample and head."""

    sample: int
    head: int
    pair: int
    """``sample * H + head``."""
    sums: int
    """Which of the partial sums over groups are its own."""
    first: int
    last: int


class Room(NamedTuple):
    """What is known of the point at hand."""

    at: Integers
    """Index of the group at every corner, (8,)."""
    weight: Floats
    """Of every corner, (8,)."""
    slope: Floats
    """Their derivatives by the place, (3, 8)."""
    moves: Floats
    """1 per axis where the point lies in the box and sees something, 0 where its place has no gradient, (3,)."""
    share: Floats
    """Of every corner, relative to its group's largest; whole vectors."""


class Forward(NamedTuple):
    """What :func:`.forward.products` and :func:`.forward.averages` read and fill."""

    groups: Rows
    """z, (B, H, M, C)."""
    tokens: Rows
    """r, (B, H, N, C), read by products and filled by averages."""
    factors: Floats
    """c, (B, H, N, P), filled by products and read by averages."""


class Sums(NamedTuple):
    """What :func:`.forward.sums` and :func:`.forward.highest` read and fill."""

    tokens: Rows
    """r, (B, H, N, C)."""
    factors: Floats
    """c; or where sums are relative their logarithms, (B, H, N, P)."""
    highest: Floats
    """Logarithm of every group's largest membership, (B, H, M), or of a part of its members, (sums, M)."""
    sums: Floats
    """(sums, M, C)."""
    masses: Floats
    """The same of the memberships alone, (sums, M)."""


class Backward(NamedTuple):
    """What :func:`.backward.derivatives` reads and fills; what is not wanted is 0."""

    groups: Rows
    """z, or the gradient of sums, (B, H, M, C)."""
    tokens: Rows
    """r, or the gradient of averages, (B, H, N, C)."""
    factors: Floats
    """c, or the gradient of products; where sums are relative the logarithms of shares, (B, H, N, P)."""
    highest: Floats
    """Only of relative sums, (B, H, M),"""
    largest: Floats
    """as is what shares count for at most in the gradient of places, (B, H, M),"""
    grad_masses: Floats
    """and the gradient of the masses, (B, H, M)."""
    of_factors: Floats
    of_tokens: Rows
    of_places: Floats
    of_groups: Floats
    """(sums, M, C)."""
