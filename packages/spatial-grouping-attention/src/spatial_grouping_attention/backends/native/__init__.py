"""Windowed operators in kernels for the CPU, compiled by numba: tokens by their cell, vectors by their window.

The tokens of a cell see the same groups. So a walk over the cells keeps the queries of the window at hand, transposed,
and forms the logits of up to four tokens at a time with one vector for 16 groups (8 in float64); softmax, averages and
gradients follow while these are in the nearest cache. What belongs to a token is finished in its cell; what belongs to
a group is summed in a few rows of the grid that move along with the walk. A call is divided into runs of rows. Each
computes what it needs of its neighbours' cells again, so nothing is shared, and a group's sum has one order for any
number of threads.

Importing this package does not import numba; the first call does, and compiles, which takes several seconds where it
was not done before: compiled kernels are kept on disk.
"""

from __future__ import annotations

import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from ..operands import Gradients, Operands, Pooled, Problem

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MOST_AXES = 3


_INSTALLED = importlib.util.find_spec("numba") is not None


def refusals(problem: Problem) -> list[str]:
    """Reasons why the kernels cannot serve a call; empty where they can."""
    reasons = []
    if not _INSTALLED:
        reasons.append("native needs numba: pip install spatial-grouping-attention[cpu]")
    if problem.device.type != "cpu":
        reasons.append(f"native needs tensors on a cpu; got {problem.device.type}")
    if problem.dtype not in DTYPES:
        reasons.append(f"native takes float64, float32, bfloat16 and float16; got {problem.dtype}")
    if problem.neighbourhood is None:
        reasons.append("native is windowed: it needs a neighbourhood")
    elif problem.neighbourhood.ndim > MOST_AXES:
        reasons.append(f"native takes up to {MOST_AXES} axes; got {problem.neighbourhood.ndim}")
    if problem.bias == "full":
        reasons.append("native takes a bias per window offset only; got one for every pair")
    return reasons


def assign(x: Operands) -> tuple[Tensor, Tensor]:
    """Values of the groups for every fine token, and the tokens' normalisers."""
    out, lse = _passes().assign(x)
    return out, lse


def pool(x: Operands, lse: Tensor | None) -> Pooled:
    """Averages over the members of every group; without ``lse`` with the logits' own normalisers."""
    pooled: Pooled = _passes().pool(x, lse)
    return pooled


def assign_backward(x: Operands, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
    """Gradients of :func:`assign`."""
    gradients: Gradients = _passes().assign_backward(x, out, lse, grad_out, grad_lse)
    return gradients


def pool_backward(
    x: Operands, pooled: Pooled, grad_out: Tensor, grad_mass: Tensor | None, grad_lse: Tensor | None
) -> Gradients:
    """Gradients of :func:`pool`; ``grad_lse`` given means that lse is the logits' own normaliser.

    Then what reaches lse, from outside and through the averages, goes on into the logits.
    """
    gradients: Gradients = _passes().pool_backward(x, pooled, grad_out, grad_mass, grad_lse)
    return gradients


def _passes() -> ModuleType:
    from . import passes

    return passes
