"""Compile the kernels for a CPU before tests need them: each element type in a process of its own, both at once.

numba keeps what it compiles beside the package, so test workers find it there instead of each compiling all of it.
"""

from __future__ import annotations

import subprocess
import sys

DTYPES = ("float32", "float64")


def use(name: str) -> None:
    """Call everything that has kernels, forward and backward."""
    import torch
    from spatial_grouping_attention import DeformableSpatialGroupingAttention, SparseSpatialGroupingAttention

    dtype, shape = getattr(torch, name), (6, 6)
    for variant in (SparseSpatialGroupingAttention, DeformableSpatialGroupingAttention):
        layer = variant(16, 2, 3, 2, 2, iters=1, compactness=1.0, relative_bias=True, backend="native").to(dtype)
        x = torch.randn(1, 36, 16, dtype=dtype, requires_grad=True)
        valid = torch.arange(36) < 30
        out = layer(x, 1.0, shape, valid=valid[None])
        out.assignment.upsample(out.x_out).sum().backward()
        out.assignment.labels()


def main() -> None:
    """All types, or the one that is named."""
    if len(sys.argv) > 1:
        use(sys.argv[1])
        return
    running = [subprocess.Popen([sys.executable, __file__, name]) for name in DTYPES]
    codes = [process.wait() for process in running]
    sys.exit(any(codes))


if __name__ == "__main__":
    main()
