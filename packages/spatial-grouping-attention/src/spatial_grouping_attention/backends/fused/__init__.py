"""Dense operators on torch's fused attention kernels: exact, and memory O(N) forward and backward."""

from .dense import assign, assign_backward, pool, pool_backward, refusals

__all__ = ["assign", "assign_backward", "pool", "pool_backward", "refusals"]
