"""Grouping over points at fractional places of the grid of groups; what layers and assignments need of it."""

from ...geometry.lattice import Lattice, lattice
from .labelling import labels
from .points import assign, point_log_shares, pool, spread, squared_distances
from .selection import BACKENDS

__all__ = [
    "BACKENDS",
    "Lattice",
    "assign",
    "labels",
    "lattice",
    "point_log_shares",
    "pool",
    "spread",
    "squared_distances",
]
