"""Modules: a strided convolution proposes groups, attention refines them, memberships come out."""

from .deformable import DeformableSpatialGroupingAttention
from .dense import DenseSpatialGroupingAttention
from .grouping import SpatialGroupingAttention
from .sparse import SparseSpatialGroupingAttention
from .windowed_self_attention import WindowedSelfAttention

__all__ = [
    "DeformableSpatialGroupingAttention",
    "DenseSpatialGroupingAttention",
    "SparseSpatialGroupingAttention",
    "SpatialGroupingAttention",
    "WindowedSelfAttention",
]
