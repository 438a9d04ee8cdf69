"""How a pass is cut into programs: the candidates, and which of them a class of calls uses.

Triton's own tuner needs a GPU to be imported with several candidates and cannot express that good tiles depend on
the number of axes, so the choice is made here. The first call of a class compiles and times every candidate (some
seconds each on a cold cache) and later calls look the winner up.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
import triton
from triton.runtime.jit import JITFunction

from .layout import Layout, Triple
from .relation import work_of_program

R = TypeVar("R")

# Whether the kernels were built for the interpreter, which triton decides once, at their definition.
INTERPRETED = not isinstance(work_of_program, JITFunction)

# Tiles of fine tokens by number of axes, rows of groups per step, and warps. Tiles are small: most tokens of a tile do
# not see most groups of its box, and the larger it is, the more such pairs are formed for nothing. In 2-D and 3-D the
# fastest of what was timed on an H100 are among them (benchmarks/plan_sweep.py), but for one that is excluded below.
TOKEN_TILES: dict[int, tuple[tuple[Triple, int, int], ...]] = {
    1: (((1, 1, 16), 16, 1), ((1, 1, 32), 32, 1), ((1, 1, 64), 16, 2)),
    2: (((1, 4, 4), 16, 1), ((1, 4, 8), 32, 1), ((1, 4, 8), 16, 1), ((1, 8, 8), 16, 2)),
    3: (((2, 2, 4), 16, 1), ((2, 4, 4), 64, 1), ((2, 4, 4), 16, 1), ((4, 4, 4), 64, 2)),
}

# Tiles of groups likewise. A group brings stride**axes tokens, so these are smaller.
GROUP_TILES: dict[int, tuple[tuple[Triple, int, int], ...]] = {
    1: (((1, 1, 16), 16, 1), ((1, 1, 16), 32, 2), ((1, 1, 32), 16, 1)),
    2: (((1, 4, 4), 16, 1), ((1, 4, 4), 32, 2), ((1, 4, 4), 16, 2), ((1, 4, 8), 16, 1)),
    3: (((2, 2, 4), 16, 1), ((2, 2, 4), 32, 2), ((2, 2, 4), 16, 2), ((2, 4, 4), 32, 2)),
}

# Bytes of a row up to which a tile has the warps above; wider rows have more, in proportion.
WARP_ROW_BYTES = 128

# From four warps and so many rows on, Triton 3.6 compiles products for an H100's groups of warps (wgmma). Such plans
# gave wrong results and an illegal access there, which none of the others did; but for one pass in 3-D
# (pool_backward_tokens, 0.43 ms beside 0.52) others are faster.
MOST_WARPS, ROWS_OF_WARP_GROUPS = 4, 64

# Bytes of a tile's rows, and of the other side's rows per step, above which ptxas reports many spilled registers
# for sm_80 and sm_90 (benchmarks/compile_report.py).
TOKEN_TILE_BYTES = 16384
GROUP_TILE_BYTES = 8192
STEP_BYTES = 8192

# Entries of a bias table per step at most.
STEP_ENTRIES = 64

# Cells that a program of the pass for a bias table walks over, so that its shares stay fewer than the groups' rows.
CELLS = 64

# Steps whose loads are in flight at once.
STAGES = 2

# The interpreter pays per operation, not per element: few programs and few steps, yet several of each.
INTERPRETED_TILES: dict[int, Triple] = {1: (1, 1, 16), 2: (1, 4, 8), 3: (2, 4, 4)}
INTERPRETED_ROWS = 64

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


def token_plans(layout: Layout, row_bytes: int) -> list[Plan]:
    """Candidates of a token pass, for rows of at most ``row_bytes``."""
    if INTERPRETED:
        return [Plan(INTERPRETED_TILES[layout.ndim], INTERPRETED_ROWS, 4, 1)]
    # Tiles beyond the grid would only idle.
    positions = math.prod(map(sum, zip(layout.lead, layout.length, strict=True)))
    most = min(TOKEN_TILE_BYTES // row_bytes, positions)
    tiles = []
    for tile, step, warps in TOKEN_TILES[layout.ndim]:
        seen = int(triton.next_power_of_2(math.prod(layout.box(tile))))
        tiles.append((tile, min(step, seen), warps))
    return _fitting(tiles, most, row_bytes)


def group_plans(layout: Layout, row_bytes: int) -> list[Plan]:
    """Candidates of a group pass, for rows of at most ``row_bytes``."""
    if INTERPRETED:
        return [Plan(INTERPRETED_TILES[layout.ndim], INTERPRETED_ROWS, 4, 1)]
    most = min(GROUP_TILE_BYTES // row_bytes, math.prod(layout.longest))
    return _fitting(GROUP_TILES[layout.ndim], most, row_bytes)


def table_plan(layout: Layout) -> Plan:
    """The plan of the pass for a bias table; its columns are entries of the window."""
    entries = max(SMALLEST_PRODUCT, min(int(triton.next_power_of_2(layout.window)), STEP_ENTRIES))
    return Plan((1, 1, 1), entries, entries // SMALLEST_PRODUCT, 1)


def _fitting(candidates: Iterable[tuple[Triple, int, int]], most_rows: int, row_bytes: int) -> list[Plan]:
    """Plans of at most so many rows, the first one in any case, with as many warps as wide rows need."""
    plans: list[Plan] = []
    for tile, step, warps in candidates:
        rows = math.prod(tile)
        if plans and rows > most_rows:
            continue
        warps = min(warps * max(row_bytes // WARP_ROW_BYTES, 1), MOST_WARPS)
        if rows >= ROWS_OF_WARP_GROUPS:
            warps = min(warps, MOST_WARPS // 2)
        step = max(SMALLEST_PRODUCT, min(step, STEP_BYTES // row_bytes))
        plans.append(Plan(tile, step, warps, STAGES))
    return list(dict.fromkeys(plans))


_CHOSEN: dict[Hashable, Plan] = {}

# Classes that are remembered; far more than a process meets.
_MOST_CLASSES = 4096

# Of what a failed plan says.
_LONGEST_REASON = 300


def choose(key: Hashable, candidates: Callable[[], list[Plan]], run: Callable[[Plan], R]) -> R:
    """Run with the plan of a class of calls, timing all candidates where the class is new.

    Plans add up in different orders, and which of two is faster may turn out differently in another process. Under
    ``torch.use_deterministic_algorithms`` nothing is timed: a class has its first candidate, whatever was timed before.

    Args:
        key: everything that moves the optimum, such as sizes to within a factor of two.
        candidates: the plans to choose from.
        run: launches one of them; it must be repeatable.

    Returns:
        What ``run`` returned.

    Raises:
        Exception: what the last candidate failed with, where none of them can be launched.
    """
    if torch.are_deterministic_algorithms_enabled():
        return run(candidates()[0])
    plan = _CHOSEN.get(key)
    if plan is None:
        plans = candidates()
        # A graph that is being captured would record the trials.
        if len(plans) > 1 and torch.cuda.is_current_stream_capturing():
            plan = plans[0]
        else:
            plan = plans[0] if len(plans) == 1 else _fastest(plans, run)
            if len(_CHOSEN) >= _MOST_CLASSES:
                _CHOSEN.clear()
            _CHOSEN[key] = plan
    return run(plan)


def _fastest(plans: list[Plan], run: Callable[[Plan], object]) -> Plan:
    """The fastest of the plans that can be launched.

    A plan may need more registers or shared memory than there are, or meet a fault of the compiler's: that plan alone
    is lost. A warning tells of all but the first reason, which is expected.
    """
    times: dict[Plan, float] = {}
    for plan in plans:
        try:
            times[plan] = _time(run, plan)
        except triton.runtime.errors.OutOfResources as error:
            failure: Exception = error
        except Exception as error:
            failure = error
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_REASON]
            warnings.warn(f"a plan of the triton kernels is left out, {plan}: {reason}", RuntimeWarning, stacklevel=2)
    if not times:
        raise failure
    return min(times, key=times.__getitem__)


def _time(run: Callable[[Plan], object], plan: Plan) -> float:
    run(plan)
    return float(triton.testing.do_bench(lambda: run(plan), warmup=5, rep=20, return_mode="median"))
