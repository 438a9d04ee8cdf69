"""Modules: a strided convolution proposes groups, attention refines them, memberships come out."""

from .base import SpatialGroupingAttention
from .dense import DenseSpatialGroupingAttention
from .sparse import SparseSpatialGroupingAttention

__all__ = ["DenseSpatialGroupingAttention", "SparseSpatialGroupingAttention", "SpatialGroupingAttention"]
