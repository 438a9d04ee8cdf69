"""What computes the operators: engines, the rule that picks one, and the bundles that travel between them."""

from .dispatch import assign, group, pool
from .engines import Backend
from .labelling import labels
from .operands import Gradients, Operands, Pooled, Problem
from .selection import Selection, select

__all__ = [
    "Backend",
    "Gradients",
    "Operands",
    "Pooled",
    "Problem",
    "Selection",
    "assign",
    "group",
    "labels",
    "pool",
    "select",
]
