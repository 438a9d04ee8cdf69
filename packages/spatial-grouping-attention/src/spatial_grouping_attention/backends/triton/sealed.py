"""What a kernel is told at its launch, sealed (:mod:`RoSE.kernels.sealed`): sizes of grids compile nothing again."""

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401  # the interpreter looks for it in a kernel's module
from RoSE.kernels.sealed import opened

from .bundles import Sizes


@triton.jit
def opened_triple(numbers):
    """A sealed tuple of three."""
    return opened(numbers[0]), opened(numbers[1]), opened(numbers[2])


@triton.jit
def opened_sizes(sizes):
    """What a kernel was told at its launch, as plain numbers."""
    return Sizes(
        sizes.scale,
        opened(sizes.heads),
        opened_triple(sizes.programs),
        opened_triple(sizes.size),
        opened_triple(sizes.groups),
        opened_triple(sizes.offset),
        opened_triple(sizes.lead),
        opened_triple(sizes.length),
        opened_triple(sizes.centre),
    )
