"""The rotation in Triton kernels: every channel is read once and written once.

:func:`rotate` turns pairs of channels by given cosines and sines, :func:`rotate_positions` computes the angles from
positions and wave vectors in registers and turns q and k together. Both are registered with torch as operators, so
``torch.compile`` and ``torch.export`` take them as they are. Importing this folder does not import triton; the first
call does.
"""

from .operators import refusals, rotate, rotate_positions

__all__ = ["refusals", "rotate", "rotate_positions"]
