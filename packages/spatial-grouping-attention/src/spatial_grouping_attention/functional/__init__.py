"""The operators as pure functions of already rotated tensors: they know grids and windows, but no positions.

``grouping_attention`` is ``pool`` with the normalisers of ``assign``; ``assign`` and ``pool`` are each other's
transpose up to the groups' masses. Every backend implements the same three signatures (:mod:`.reference`).
"""

from .api import assign, group, grouping_attention, pool, select
from .backends import Backend, Selection

__all__ = ["Backend", "Selection", "assign", "group", "grouping_attention", "pool", "select"]
