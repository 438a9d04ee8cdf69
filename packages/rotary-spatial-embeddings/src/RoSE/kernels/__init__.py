"""The rotation in Triton kernels: every channel is read once and written once.

:func:`rotate` turns pairs of channels by given cosines and sines, :func:`rotate_positions` computes the angles from
positions and wave vectors in registers and turns q and k together. Both are registered with torch as operators, so
``torch.compile`` takes them as they are. The modules of this package and :func:`RoSE.functional.rotate` reach them by
themselves, on GPUs where they agree with the plain form; called directly they run or raise. Importing this folder does
not import triton; the first call does.
"""

from .calls import rotate, rotate_positions
from .support import MOST_CHANNELS, MOST_DIMENSIONS, refusals

__all__ = ["MOST_CHANNELS", "MOST_DIMENSIONS", "refusals", "rotate", "rotate_positions"]
