"""What travels together through the kernels on points, see :mod:`..bundles`."""

from __future__ import annotations

from typing import Any, NamedTuple


class Points(NamedTuple):
    """Points of tokens on a grid of groups with three axes, of which a grid of fewer leaves the first out."""

    places: Any
    """Pointer to them in steps of the grid, (B, H, N, P, ndim), contiguous."""
    first: Any
    """Pointer to the first index of the box that holds all valid groups, (B, 3); None where that is the whole grid,"""
    last: Any
    """as to the last."""
    valid: Any
    """Pointer to (B, M) bytes, or None."""
    sizes: Any
    """Of the grid, sealed (:mod:`RoSE.kernels.sealed`)."""
    tokens: Any
    """N, sealed,"""
    heads: Any
    """as is H."""
    end: None = None
    """See :class:`..bundles.Inputs`."""


class Here(NamedTuple):
    """The tokens that a program works for, one a slot."""

    batch: Any
    head: Any
    index: Any
    exists: Any
    pair: Any
    """``batch * H + head``, in 64 bits."""
    groups: Any
    """M."""


class Along(NamedTuple):
    """Corners along one axis, (tokens, corners), and whether the point may move along it (tokens,)."""

    index: Any
    weight: Any
    slope: Any
    """Of the weight by the place."""
    moves: Any


class Corners(NamedTuple):
    """The groups around the point at hand of every token, (tokens, corners)."""

    index: Any
    weight: Any
    slopes: Any
    """Of the weights by the place, a triple."""
    moves: Any
    """Where a place has a gradient, a triple of (tokens,)."""
