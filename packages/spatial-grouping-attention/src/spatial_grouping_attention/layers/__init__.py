"""Modules: a strided convolution proposes groups, attention refines them, memberships come out."""

from .attention import WindowedSelfAttention
from .base import SpatialGroupingAttention
from .deformable import DeformableSpatialGroupingAttention
from .dense import DenseSpatialGroupingAttention
from .sparse import SparseSpatialGroupingAttention

__all__ = [
    "DeformableSpatialGroupingAttention",
    "DenseSpatialGroupingAttention",
    "SparseSpatialGroupingAttention",
    "SpatialGroupingAttention",
    "WindowedSelfAttention",
]
