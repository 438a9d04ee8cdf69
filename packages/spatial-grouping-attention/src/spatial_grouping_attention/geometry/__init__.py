"""Integer and physical geometry of grouping: which fine token sees which group, and where groups lie."""

from RoSE.memo import remembered

from .coarsen import coarse_shape, coarsen, group_validity
from .neighbourhood import Neighbourhood, relate
from .token_grid import Shape, Spacing, TokenGrid, place_tokens

__all__ = [
    "Neighbourhood",
    "Shape",
    "Spacing",
    "TokenGrid",
    "coarse_shape",
    "coarsen",
    "group_validity",
    "place_tokens",
    "relate",
    "remembered",
]
