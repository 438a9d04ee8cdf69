"""The operators as pure functions of already rotated tensors: they know grids and windows, but no positions.

``grouping_attention`` is ``pool`` with the normalisers of ``assign``; ``assign`` and ``pool`` are each other's
transpose up to the groups' masses. ``select`` tells what would compute a call, and why.
"""

from .operators import assign, grouping_attention, pool, select

__all__ = ["assign", "grouping_attention", "pool", "select"]


def __dir__() -> list[str]:
    return __all__
