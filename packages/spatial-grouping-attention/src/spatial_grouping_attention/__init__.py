"""Spatial grouping attention: soft assignment of fine tokens to a coarser grid of groups.

Layers (:mod:`.layers`) downsample a grid of tokens by content and hand back an :class:`Assignment`, through which
anything known of the groups flows back to the tokens. The operators underneath are pure functions in
:mod:`.functional`; the geometry they share is :class:`Neighbourhood`.
"""

from . import functional
from .__about__ import __version__
from .assignment import (
    Assignment,
    AttentionAssignment,
    ComposedAssignment,
    DeformableAssignment,
    Usage,
    compose,
)
from .geometry import Neighbourhood
from .layers import (
    DeformableSpatialGroupingAttention,
    DenseSpatialGroupingAttention,
    SparseSpatialGroupingAttention,
    SpatialGroupingAttention,
    WindowedSelfAttention,
)
from .output import GroupingOutput

__all__ = [
    "Assignment",
    "AttentionAssignment",
    "ComposedAssignment",
    "DeformableAssignment",
    "DeformableSpatialGroupingAttention",
    "DenseSpatialGroupingAttention",
    "GroupingOutput",
    "Neighbourhood",
    "SparseSpatialGroupingAttention",
    "SpatialGroupingAttention",
    "Usage",
    "WindowedSelfAttention",
    "__version__",
    "compose",
    "functional",
]
