"""Integer and physical geometry of grouping: which fine token sees which group, and where groups lie."""

from .coarsen import coarse_shape, coarsen
from .neighbourhood import Neighbourhood

__all__ = ["Neighbourhood", "coarse_shape", "coarsen"]
