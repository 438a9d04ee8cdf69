"""Integer and physical geometry of grouping: which fine token sees which group, and where groups lie."""

from .coarsen import coarsen, coarse_shape
from .neighbourhood import Neighbourhood

__all__ = ["Neighbourhood", "coarse_shape", "coarsen"]
