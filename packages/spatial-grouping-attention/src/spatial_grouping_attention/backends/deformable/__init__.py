"""Grouping over points at fractional places of the grid of groups; what layers and assignments need of it."""

from .interpolation import Lattice, lattice
from .points import assign, point_log_shares, pool

__all__ = ["Lattice", "assign", "lattice", "point_log_shares", "pool"]
