"""Integer and physical geometry of grouping: which fine token sees which group, and where groups lie."""

from .coarsen import coarse_shape, coarsen
from .memo import remembered
from .neighbourhood import Neighbourhood, relate

__all__ = ["Neighbourhood", "coarse_shape", "coarsen", "relate", "remembered"]
