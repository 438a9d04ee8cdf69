"""Dense operators on torch's fused attention kernels: exact, and memory O(N) forward and backward."""

from .dense import assign, pool, refusals

__all__ = ["assign", "pool", "refusals"]
