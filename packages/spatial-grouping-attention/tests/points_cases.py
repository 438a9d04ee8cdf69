"""What the tests of kernels for points share: where they run, grids and operands, results and gradients."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from spatial_grouping_attention.backends.deformable import lattice
from spatial_grouping_attention.backends.deformable.compiled import Compiled
from spatial_grouping_attention.backends.deformable.selection import NATIVE, TRITON
from spatial_grouping_attention.geometry.lattice import Lattice
from torch import Tensor

needs_numba = pytest.mark.native

Engine = ModuleType | Compiled

# Kernels, and a device on which they run.
ON_CPU = pytest.param((NATIVE, "cpu"), marks=pytest.mark.native, id="native")
INTERPRETED = pytest.param((TRITON, "cpu"), marks=pytest.mark.triton, id="interpreter")
ON_GPU = pytest.param((TRITON, "cuda"), marks=pytest.mark.gpu, id="gpu")
everywhere = pytest.mark.parametrize("kernels", [ON_CPU, INTERPRETED, ON_GPU])
# The same, in the interpreter among slow tests.
mostly_everywhere = pytest.mark.parametrize(
    "kernels",
    [
        ON_CPU,
        pytest.param((TRITON, "cpu"), marks=[pytest.mark.triton, pytest.mark.slow], id="interpreter"),
        ON_GPU,
    ],
)
compiled = pytest.mark.parametrize("kernels", [ON_CPU, ON_GPU])
Kernels = tuple[Compiled, str]

# What each computes from (groups' rows, tokens' rows, places, numbers of points).
FUNCTIONS: dict[str, Callable[[Any, Lattice, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]] = {
    "products": lambda by, grid, rows, tokens, places, numbers: (by.products(rows, tokens, places, grid),),
    "averages": lambda by, grid, rows, tokens, places, numbers: (by.averages(numbers, places, rows, grid),),
    "sums": lambda by, grid, rows, tokens, places, numbers: (by.sums(numbers, places, tokens, grid),),
    "relative sums": lambda by, grid, rows, tokens, places, numbers: by.relative_sums(numbers, places, tokens, grid)[
        :2
    ],
}


# Which of (rows, tokens, places, numbers) that is.
USED = {"products": (0, 1, 2), "averages": (0, 2, 3), "sums": (1, 2, 3), "relative sums": (1, 2, 3)}


def case(
    shape: tuple[int, ...], *, batch: int, heads: int, count: int, points: int, channels: int, holes: bool, seed: int
) -> tuple[Lattice, list[Tensor]]:
    """A grid and operands in float64, some of whose places lie on whole steps, and some outside."""
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    size = torch.Size(shape).numel()
    valid = torch.rand(batch, size, generator=generator) < 0.7 if holes else None
    places = (random(batch, heads, count, points, len(shape)) * 0.6 + 0.5) * torch.tensor(shape)
    places = torch.where(torch.rand(places.shape, generator=generator) < 0.2, places.round(), places)
    rows, of_tokens = random(batch, heads, size, channels), random(batch, heads, count, channels)
    return lattice(shape, valid), [rows, of_tokens, places, random(batch, heads, count, points) * 3]


@st.composite
def cases(draw: st.DrawFn, count: tuple[int, ...] = (1, 3, 20)) -> tuple[Lattice, list[Tensor]]:
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    sizes = {"batch": (1, 2), "heads": (1, 2, 3), "count": count, "points": (1, 2, 5), "channels": (1, 3, 8, 17)}
    drawn = {name: draw(st.sampled_from(choices)) for name, choices in sizes.items()}
    return case(shape, **drawn, holes=draw(st.booleans()), seed=draw(st.integers(0, 2**16)))


def arriving_at(got: tuple[Tensor, ...]) -> list[Tensor]:
    """Irregular gradients of results, exact in every type."""
    return [torch.arange(x.numel()).mul(2.4).sin().mul(64).round().div(64).to(x).view(x.shape) for x in got]


def on(grid: Lattice, operands: list[Tensor], device: str) -> tuple[Lattice, list[Tensor]]:
    """The same case elsewhere."""
    valid = None if grid.valid is None else grid.valid.to(device)
    return lattice(grid.shape, valid), [x.to(device) for x in operands]


def same(got: Tensor, want: Tensor, by: Compiled) -> bool:
    """Equal, or where sums have no order nearly so."""
    return torch.equal(got, want) if by is NATIVE else torch.allclose(got, want, rtol=1e-5, atol=1e-6)


def results(
    name: str, by: Engine, grid: Lattice, operands: list[Tensor]
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """What a function returns, and the gradients of its operands."""
    leaves = [x.detach().requires_grad_() for x in operands]
    got = FUNCTIONS[name](by, grid, *leaves)
    named = dict(zip(("rows", "tokens", "places", "numbers"), leaves, strict=True))
    found = torch.autograd.grad(got, list(named.values()), arriving_at(got), allow_unused=True)
    return got, {key: gradient for key, gradient in zip(named, found, strict=True) if gradient is not None}
