"""Memberships of fine tokens in groups: what a grouping layer hands back besides features.

``upsample`` carries anything known of the groups to the tokens, ``pool`` averages anything known of the tokens over
the groups. No matrix of all pairs is ever kept, so both take any number of channels at the cost of a forward pass,
and gradients flow through them into the layer.
"""

from .attention import AttentionAssignment
from .base import Assignment, Usage
from .composed import ComposedAssignment, compose
from .deformable import DeformableAssignment

__all__ = [
    "Assignment",
    "AttentionAssignment",
    "ComposedAssignment",
    "DeformableAssignment",
    "Usage",
    "compose",
]
