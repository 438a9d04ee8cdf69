"""Whether the kernels compute what the formulas say on this processor: what "auto" wants to know before it takes them.

A numba that does not go with the numpy at hand fails here too, and is left alone.
"""

from __future__ import annotations

import torch
from RoSE.kernels.selfcheck import require_agreement
from torch import Tensor

from ...geometry import Neighbourhood
from ..operands import Operands
from ..semantics import logits, memberships, normaliser, safe_logsumexp
from . import assign, assign_backward, pool, pool_backward

# Dilated, with clipped borders, and tokens and groups that do not count.
_NEIGHBOURHOOD = Neighbourhood((9, 7), (5, 4), 2, 3, 1, (3, 3), (2, 1))

# Largest difference, relative to the largest value.
_TOLERANCE = 1e-5

_LEAVES = ("q", "k", "values", "bias", "compactness")


def agrees(name: str, device: torch.device) -> None:
    """Compare a pass in float32 with the formulas in float64, on one small problem.

    Args:
        name: "pool", "assign", "pool_backward" or "assign_backward"; the latter two run the former as well.
        device: a CPU.

    Raises:
        ArithmeticError: something differs.
        Exception: whatever keeps the kernels from compiling or running.
    """
    operator = name.removesuffix("_backward")
    x, arriving = _problem(operator, device)
    mine, theirs = (by(operator, x, arriving if operator != name else None) for by in (_by_kernels, _by_formulas))
    for i, (got, expected) in enumerate(zip(mine, theirs, strict=True)):
        require_agreement(f"{name}: result {i}", _finite(got), _finite(expected), _TOLERANCE)


def _problem(operator: str, device: torch.device) -> tuple[Operands, Tensor]:
    """Operands, and the gradient that arrives at the operator's result."""
    generator = torch.Generator().manual_seed(0)
    groups, tokens = _NEIGHBOURHOOD.num_groups, _NEIGHBOURHOOD.num_inputs
    senders, receivers = (tokens, groups) if operator == "pool" else (groups, tokens)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    x = Operands(
        random(2, 2, groups, 18),
        random(2, 2, tokens, 18),
        random(2, 2, senders, 5),
        _NEIGHBOURHOOD,
        0.25,
        bias=random(2, 3, 3),
        valid=random(2, tokens) < 1.0,
        valid_groups=random(2, groups) < 0.5,
        compactness=random(2).exp(),
    )
    return x, random(2, 2, receivers, 5)


def _by_kernels(operator: str, x: Operands, arriving: Tensor | None) -> list[Tensor]:
    """Results, or where a gradient arrives, gradients."""
    if operator == "pool":
        pooled = pool(x, None)
        if arriving is None:
            return [pooled.out, pooled.log_mass, pooled.lse]
        gradients = pool_backward(x, pooled, arriving, None, torch.zeros_like(pooled.lse))
    else:
        out, lse = assign(x)
        if arriving is None:
            return [out, lse]
        gradients = assign_backward(x, out, lse, arriving, None)
    named = gradients._asdict()
    return [named[name] for name in _LEAVES]


def _by_formulas(operator: str, x: Operands, arriving: Tensor | None) -> list[Tensor]:
    leaves = [getattr(x, name).double().requires_grad_() for name in _LEAVES]
    x = x._replace(**dict(zip(_LEAVES, leaves, strict=True)))
    scores = logits(x)
    lse = normaliser(scores)
    if operator == "pool":
        shifted = scores - lse[..., None]
        log_mass = safe_logsumexp(shifted, -2)
        shares = (shifted - log_mass.masked_fill(log_mass.isinf(), torch.inf)[..., None, :]).exp()
        results = [shares.mT @ x.values, log_mass, lse]
    else:
        results = [memberships(scores) @ x.values, lse]
    return results if arriving is None else list(torch.autograd.grad((results[0] * arriving).sum(), leaves))


def _finite(x: Tensor) -> Tensor:
    """Infinite normalisers and masses as a number that no other can be."""
    return x.nan_to_num(nan=torch.nan, posinf=1e3, neginf=-1e3)
