"""Whether kernels compute at points what the formulas say on a device: see :mod:`.selection`."""

from __future__ import annotations

from types import ModuleType

import torch
from RoSE.kernels.selfcheck import require_agreement
from torch import Tensor

from ...geometry.lattice import Lattice, lattice
from . import plain
from .compiled import Compiled

# Largest difference, relative to the largest value.
_TOLERANCE = 1e-5

_SHAPE = (3, 4, 5)


def agrees(kernels: Compiled, name: str, device: torch.device) -> None:
    """Compare kernels in float32 with the formulas in float64, on one small problem with holes.

    Args:
        kernels: those to check.
        name: "forward" or "backward"; the latter runs the former as well.
        device: of theirs.

    Raises:
        ArithmeticError: something differs.
        Exception: whatever keeps the kernels from compiling or running.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    rows, tokens, count = 60, 7, 5
    groups = lattice(_SHAPE, random(2, rows) < 0.5)
    # Some of them outside of the grid.
    places = random(2, 2, tokens, count, 3) * 2.0 + 2.0
    shares = random(2, 2, tokens, count).exp()
    leaves = [places, shares, random(2, 2, rows, 18), random(2, 2, tokens, 18), random(2, 2, tokens, 5)]
    mine, theirs = (_results(name, by, leaves, groups, wide=by is plain) for by in (kernels, plain))
    for i, (got, expected) in enumerate(zip(mine, theirs, strict=True)):
        require_agreement(f"points, {name}: result {i}", got, expected, _TOLERANCE)


def _results(
    name: str, by: ModuleType | Compiled, leaves: list[Tensor], groups: Lattice, *, wide: bool
) -> list[Tensor]:
    """Results, or gradients."""
    differentiated = name == "backward"
    leaves = [(x.double() if wide else x).detach().requires_grad_(differentiated) for x in leaves]
    places, shares, of_groups, of_tokens, values = leaves
    with torch.set_grad_enabled(differentiated):
        total, masses, _ = by.relative_sums(shares.log(), places, values, groups)
        results = [
            by.products(of_groups, of_tokens, places, groups),
            by.averages(shares, places, of_groups, groups),
            by.sums(shares, places, values, groups),
            total,
            masses,
            by.touches(places, groups).float(),
        ]
    if not differentiated:
        return results
    arriving = [x.detach().cos() for x in results[:-1]]
    return list(torch.autograd.grad(results[:-1], leaves, arriving))
