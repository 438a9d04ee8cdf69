"""Grouping over points at fractional places of the grid of groups; what layers and assignments need of it."""

from .interpolation import Lattice, lattice
from .labelling import labels
from .points import assign, point_log_shares, pool, spread, squared_distances

__all__ = ["Lattice", "assign", "labels", "lattice", "point_log_shares", "pool", "spread", "squared_distances"]
