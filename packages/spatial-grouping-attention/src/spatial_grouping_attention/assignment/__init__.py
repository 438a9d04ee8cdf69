"""Memberships of fine tokens in groups: what a grouping layer hands back besides features.

``upsample`` carries anything known of the groups to the tokens, ``pool`` averages anything known of the tokens over
the groups. No matrix of all pairs is ever kept, so both take any number of channels at the cost of a forward pass,
and gradients flow through them into the layer.
"""

from .base import Assignment, Movable, Usage
from .composed import ComposedAssignment, compose
from .from_attention import AttentionAssignment
from .from_points import DeformableAssignment
from .heads import AssignmentOfHeads

__all__ = [
    "Assignment",
    "AssignmentOfHeads",
    "AttentionAssignment",
    "ComposedAssignment",
    "DeformableAssignment",
    "Movable",
    "Usage",
    "compose",
]
