"""How a pass is cut into programs: the candidates, and which of them a class of calls uses.

Triton's own tuner needs a GPU to be imported with several candidates and cannot express that good tiles depend on
the number of axes, so the choice is made here. The first call of a class compiles and times every candidate (some
seconds each on a cold cache) and later calls look the winner up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
import triton
from triton.runtime.jit import JITFunction

from .layout import Layout, Triple
from .relation import program

# Whether the kernels were built for the interpreter, which triton decides once, at their definition.
INTERPRETED = not isinstance(program, JITFunction)

# Tiles of fine tokens by number of axes. A tile's own cells should outnumber the halo of groups they share.
TOKEN_TILES: dict[int, tuple[Triple, ...]] = {
    1: ((1, 1, 64), (1, 1, 128)),
    2: ((1, 8, 8), (1, 8, 16)),
    3: ((4, 4, 4), (4, 4, 8)),
}

# Tiles of groups by number of axes. A group brings stride**axes tokens, so these are smaller.
GROUP_TILES: dict[int, tuple[Triple, ...]] = {
    1: ((1, 1, 16), (1, 1, 32), (1, 1, 64)),
    2: ((1, 4, 4), (1, 4, 8), (1, 8, 8)),
    3: ((2, 2, 4), (2, 4, 4), (4, 4, 4)),
}

# The interpreter pays per operation, not per element: few programs and few steps, yet several of each.
INTERPRETED_TILES: dict[int, Triple] = {1: (1, 1, 16), 2: (1, 4, 8), 3: (2, 4, 4)}
INTERPRETED_ROWS = 64

# Rows of the other side per step: more would spill registers, fewer starve the tensor cores.
ROWS = 64

# Products need this many rows and columns.
SMALLEST_PRODUCT = 16


@dataclass(frozen=True)
class Plan:
    """Tile of a program, rows of the other side per step, and how the compiler spreads them."""

    tile: Triple
    block: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """The compiler's share; the interpreter has no use for it."""
        return {} if INTERPRETED else {"num_warps": self.num_warps, "num_stages": self.num_stages}


def token_plans(layout: Layout, channels: int) -> list[Plan]:
    """Candidates of a token pass for rows of at most ``channels`` channels."""
    if INTERPRETED:
        return [Plan(INTERPRETED_TILES[layout.ndim], INTERPRETED_ROWS, 4, 1)]
    plans = []
    for tile in TOKEN_TILES[layout.ndim]:
        rows = triton.next_power_of_2(math.prod(layout.box(tile)))
        block = max(SMALLEST_PRODUCT, min(rows, ROWS if channels <= 64 else ROWS // 2))
        plans += [Plan(tile, block, warps, 2) for warps in (4, 8)]
    return plans


def group_plans(layout: Layout, channels: int) -> list[Plan]:
    """Candidates of a group pass for rows of at most ``channels`` channels."""
    if INTERPRETED:
        return [Plan(INTERPRETED_TILES[layout.ndim], INTERPRETED_ROWS, 4, 1)]
    block = ROWS if channels <= 64 else ROWS // 2
    return [Plan(tile, block, 4, stages) for tile in GROUP_TILES[layout.ndim] for stages in (1, 2)]


_CHOSEN: dict[Hashable, Plan] = {}


def choose(key: Hashable, plans: list[Plan], run: Callable[[Plan], None]) -> None:
    """Run with the plan of a class of calls, timing all candidates where the class is new.

    Args:
        key: everything that moves the optimum, such as sizes to within a factor of two.
        plans: the candidates, the safest first.
        run: launches one of them; it must be repeatable.
    """
    plan = _CHOSEN.get(key)
    if plan is None:
        # A graph that is being captured would record the trials.
        if len(plans) == 1 or torch.cuda.is_current_stream_capturing():
            plan = plans[0]
        else:
            plan = _CHOSEN[key] = min(plans, key=lambda candidate: _time(run, candidate))
    run(plan)


def _time(run: Callable[[Plan], None], plan: Plan) -> float:
    try:
        run(plan)
        return float(triton.testing.do_bench(lambda: run(plan), warmup=5, rep=20, return_mode="median"))
    except triton.runtime.errors.OutOfResources:
        return math.inf
