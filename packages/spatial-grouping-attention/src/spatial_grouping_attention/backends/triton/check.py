"""Whether the kernels compute what the formulas say on a device: what "auto" wants to know before it takes them."""

from __future__ import annotations

import torch
from RoSE.kernels.selfcheck import require_agreement
from torch import Tensor

from ...geometry import Neighbourhood
from ..operands import Operands
from ..semantics import logits, memberships, normaliser, safe_logsumexp
from . import assign, assign_backward, pool, pool_backward

# Small enough for a single candidate of every plan (nothing is timed), with two phases, clipped borders, and tokens
# and groups that do not count.
_WINDOW = (3, 3)
_NEIGHBOURHOOD = Neighbourhood((9, 7), (5, 4), 2, 3, 1, _WINDOW, (2, 1))

# Largest difference, relative to the largest value: sums are kept in float32, what enters products is rounded.
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 4e-2}

_RESULTS = {"assign": ("out", "lse"), "pool": ("out", "log mass", "lse")}
_LEAVES = ("q", "k", "values", "bias", "compactness")


def agrees(device: torch.device) -> None:
    """Compare both operators and all their gradients with the formulas in float64, on one small problem.

    Args:
        device: a CUDA device, or the CPU in triton's interpreter.

    Raises:
        ArithmeticError: something differs.
        Exception: whatever keeps the kernels from compiling or running.
    """
    for dtype, tolerance in _TOLERANCES.items():
        for operator, results in _RESULTS.items():
            x, arriving = _problem(operator, device, dtype)
            names = (*results, *(f"the gradient of {leaf}" for leaf in _LEAVES))
            got, expected = _by_kernels(operator, x, arriving), _by_formulas(operator, x, arriving)
            for name, mine, theirs in zip(names, got, expected, strict=True):
                what = f"{operator}: {name} in {dtype}"
                if not torch.equal(mine.isinf(), theirs.isinf()):
                    raise ArithmeticError(f"{what} is infinite in other places")
                require_agreement(what, _finite(mine), _finite(theirs), tolerance)


def _problem(operator: str, device: torch.device, dtype: torch.dtype) -> tuple[Operands, list[Tensor]]:
    """Operands, and the gradients that arrive at the operator's results."""
    generator = torch.Generator().manual_seed(0)
    groups, tokens = _NEIGHBOURHOOD.num_groups, _NEIGHBOURHOOD.num_inputs
    senders, receivers = (groups, tokens) if operator == "assign" else (tokens, groups)

    def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    x = Operands(
        random(2, 2, groups, 16, dtype=dtype),
        random(2, 2, tokens, 16, dtype=dtype),
        random(2, 2, senders, 16, dtype=dtype),
        _NEIGHBOURHOOD,
        0.25,
        bias=random(2, *_WINDOW),
        valid=random(2, tokens) < 1.0,
        valid_groups=random(2, groups) < 0.5,
        compactness=random(2).exp(),
    )
    arriving = [random(2, 2, receivers, 16, dtype=dtype)]
    for rows in (tokens,) if operator == "assign" else (groups, tokens):
        arriving.append(random(2, 2, rows))
    return x, arriving


def _by_kernels(operator: str, x: Operands, arriving: list[Tensor]) -> list[Tensor]:
    results: tuple[Tensor, ...]
    if operator == "assign":
        grad_out, grad_lse = arriving
        results = out, lse = assign(x)
        gradients = assign_backward(x, out, lse, grad_out, grad_lse)
    else:
        grad_out, grad_mass, grad_lse = arriving
        pooled = pool(x, None)
        results = pooled.out, pooled.log_mass, pooled.lse
        gradients = pool_backward(x, pooled, grad_out, grad_mass, grad_lse)
    return [*results, *(gradient for leaf in _LEAVES if (gradient := getattr(gradients, leaf)) is not None)]


def _by_formulas(operator: str, x: Operands, arriving: list[Tensor]) -> list[Tensor]:
    leaves = [getattr(x, name).double().requires_grad_() for name in _LEAVES]
    x = x._replace(**dict(zip(_LEAVES, leaves, strict=True)))
    scores = logits(x)
    lse = normaliser(scores)
    if operator == "assign":
        results = [memberships(scores) @ x.values, lse]
    else:
        shifted = scores - lse[..., None]
        log_mass = safe_logsumexp(shifted, -2)
        shares = (shifted - log_mass.masked_fill(log_mass.isinf(), torch.inf)[..., None, :]).exp()
        results = [shares.mT @ x.values, log_mass, lse]
    weighed = [(_finite(result) * gradient).sum() for result, gradient in zip(results, arriving, strict=True)]
    return [*results, *torch.autograd.grad(torch.stack(weighed).sum(), leaves)]


def _finite(x: Tensor) -> Tensor:
    """Infinite normalisers and masses as 0, without a gradient."""
    return x.masked_fill(x.isinf(), 0.0)
