"""Windowed operators in plain torch: tiles of cells, two small matrix products each, memory O(N).

Along each axis the groups are cut into tiles of ``T`` cells. A tile holds ``P`` fine tokens (those its cells own)
and the ``Q`` groups that any of them sees: its own cells and a halo of ``reach`` cells on both sides. Because a
token's whole window lies in its tile, its softmax is finished there; what a group receives is the sum over the few
tiles whose halos overlap it. In N dimensions a tile is the product of its axes.

Tiles are worked through in chunks small enough to stay in the processor's cache, which on a CPU is worth more than
any arithmetic trick: freshly mapped pages cost more than the two small matrix products. Logits are recomputed chunk
by chunk in the backward passes instead of being stored.
"""

from ..operands import Problem
from .backward import assign_backward, pool_backward
from .forward import assign, labels, pool

__all__ = ["assign", "assign_backward", "labels", "pool", "pool_backward", "refusals"]


def refusals(problem: Problem) -> list[str]:
    """Reasons why tiles cannot serve a call; empty where they can."""
    reasons = []
    if problem.neighbourhood is None:
        reasons.append("tiled is windowed: it needs a neighbourhood")
    if problem.bias == "full":
        reasons.append("tiled takes a bias per window offset only; got one for every pair")
    return reasons
