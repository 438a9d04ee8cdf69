"""Windowed operators in Triton kernels, for CUDA and for the interpreter that runs kernels on a CPU.

Two passes each way, each writing its results once: the *token* pass gives every program a tile of fine tokens and
walks over the groups they see, the *group* pass gives it a tile of groups and walks over their members. Sums are
gathered where they belong, never scattered, so results do not depend on the order of programs.

Importing this package does not import triton, so it works where triton is not installed; the first call does.
"""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from ..operands import Gradients, Operands, Pooled, Problem

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_HEAD_CHANNELS = 128
MOST_AXES = 3
LONGEST_COMPACT_AXIS = 2**23

# Compute capability of the oldest GPUs whose tensor cores take bfloat16.
OLDEST_GPU = (8, 0)

_INSTALLED = importlib.util.find_spec("triton") is not None
# Triton decides this when a kernel is defined, so it must not change once kernels have been imported.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def refusals(problem: Problem) -> list[str]:
    """Reasons why the kernels cannot serve a call; empty where they can."""
    reasons = refusals_of_device(problem.device)
    if problem.dtype not in DTYPES:
        reasons.append(f"triton takes float32, bfloat16 and float16; got {problem.dtype}")
    if problem.head_size > MOST_HEAD_CHANNELS:
        reasons.append(f"triton takes head sizes up to {MOST_HEAD_CHANNELS}; got {problem.head_size}")
    if problem.neighbourhood is None:
        reasons.append("triton is windowed: it needs a neighbourhood")
    elif problem.neighbourhood.ndim > MOST_AXES:
        reasons.append(f"triton takes up to {MOST_AXES} axes; got {problem.neighbourhood.ndim}")
    elif problem.compactness and max(problem.neighbourhood.input_shape) > LONGEST_COMPACT_AXIS:
        reasons.append(
            f"triton takes compactness on axes of up to {LONGEST_COMPACT_AXIS} tokens, whose places float32 tells "
            f"apart; got {max(problem.neighbourhood.input_shape)}"
        )
    if problem.bias == "full":
        reasons.append("triton takes a bias per window offset only; got one for every pair")
    return reasons


def refusals_of_device(device: torch.device) -> list[str]:
    """Reasons why no kernel of ours can run there; empty where they can."""
    reasons = []
    if not _INSTALLED:
        reasons.append("triton is not installed")
    if device.type not in (("cpu", "cuda") if _INTERPRETED else ("cuda",)):
        reasons.append(f"triton needs tensors on cuda (or TRITON_INTERPRET=1 for tests on a cpu); got {device.type}")
    elif device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST_GPU:
        oldest = ".".join(map(str, OLDEST_GPU))
        reasons.append(f"triton needs a GPU of compute capability {oldest} or newer")
    return reasons


def assign(x: Operands) -> tuple[Tensor, Tensor]:
    """Values of the groups for every fine token, and the tokens' normalisers: a pass over the tokens."""
    out, lse = _passes().assign(x)
    return out, lse


def pool(x: Operands, lse: Tensor | None) -> Pooled:
    """Averages over the members of every group: a pass over the groups, without ``lse`` after one over the tokens."""
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
