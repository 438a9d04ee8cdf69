"""How the work is cut and which plan a call gets: no result depends on it."""

import math

import pytest
import torch
from grouping_cases import gradients, make_case
from layer_cases import mostly_slow
from operator_calls import operands
from spatial_grouping_attention import Neighbourhood
from spatial_grouping_attention.backends import triton as engine
from triton_cases import LARGER, TOLERANCE, call, check, in_interpreter, moved, on_gpu


@in_interpreter
@pytest.mark.parametrize(
    ("tile", "rows"),
    mostly_slow(((1, 8, 8), 64), ((1, 4, 4), 16), ((1, 16, 4), 32), ((1, 8, 16), 16), ((1, 2, 8), 16)),
)
def test_cutting_the_work_changes_nothing(
    tile: tuple[int, int, int], rows: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of a GPU's candidates, and tiles that neither divide nor are divided by the stride."""
    from spatial_grouping_attention.backends.triton import plan

    monkeypatch.setitem(plan.INTERPRETED_TILES, 2, tile)
    monkeypatch.setattr(plan, "INTERPRETED_ROWS", rows)
    monkeypatch.setattr(plan, "_CHOSEN", {})
    case = make_case(Neighbourhood((13, 11), (5, 6), (3, 2), 3, 1, 3), batch=1, heads=1, bias="table")
    check(case, device, operators=("assign", "group"))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """No plans chosen yet; a list for those that are launched, timed or not."""
    from spatial_grouping_attention.backends.triton import plan

    monkeypatch.setattr(plan, "_CHOSEN", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return []


def plans_of(*widths: int) -> list:
    from spatial_grouping_attention.backends.triton.plan import Plan

    return [Plan((1, 1, width), 16, 4, 1) for width in widths]


def timed_by_width(monkeypatch: pytest.MonkeyPatch, failures: dict[int, Exception]) -> list[int]:
    """Stands in for a clock: wide plans are slow, some cannot be launched. Returns a list for the widths timed."""
    from spatial_grouping_attention.backends.triton import plan

    timed: list[int] = []

    def time(run: object, candidate: plan.Plan) -> float:
        width = candidate.tile[2]
        timed.append(width)
        if width in failures:
            raise failures[width]
        return float(width)

    monkeypatch.setattr(plan, "_time", time)
    return timed


@pytest.mark.triton
def test_a_class_of_calls_is_timed_once_and_remembered(launched: list, monkeypatch: pytest.MonkeyPatch) -> None:
    from spatial_grouping_attention.backends.triton import plan

    timed = timed_by_width(monkeypatch, {})
    slow, quick = plans_of(128, 64)
    for _ in range(2):
        plan.choose("a class", lambda: [slow, quick], launched.append)
    assert timed == [128, 64]
    assert launched == [quick, quick]
    # While a graph is captured nothing may be tried out, and nothing is remembered.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    plan.choose("another", lambda: [slow, quick], launched.append)
    assert launched[-1] == slow
    assert len(timed) == 2


@pytest.mark.triton
def test_whatever_a_plan_fails_with_costs_that_plan_alone(launched: list, monkeypatch: pytest.MonkeyPatch) -> None:
    from spatial_grouping_attention.backends.triton import plan
    from triton.runtime.errors import OutOfResources

    failures = {16: OutOfResources(300000, 232448, "shared memory"), 32: RuntimeError("PassManager::run failed")}
    timed = timed_by_width(monkeypatch, failures)
    with pytest.warns(RuntimeWarning, match=r"left out, Plan\(tile=\(1, 1, 32\).*PassManager::run failed") as warned:
        plan.choose("a class", lambda: plans_of(16, 32, 128, 64), launched.append)
    # That a plan needs more than the GPU has is no news.
    assert len(warned) == 1
    assert timed == [16, 32, 128, 64]
    assert launched == plans_of(64)
    with pytest.raises(OutOfResources, match="shared memory"):
        plan.choose("no plan at all", lambda: plans_of(16, 16), launched.append)


@pytest.mark.triton
def test_deterministic_algorithms_have_a_plan_that_no_clock_chose(
    launched: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spatial_grouping_attention.backends.triton import plan

    timed = timed_by_width(monkeypatch, {})
    plans = plans_of(128, 64)
    plan.choose("a class", lambda: plans, launched.append)
    torch.use_deterministic_algorithms(True)
    try:
        for key in ("a class", "another"):
            plan.choose(key, lambda: plans, launched.append)
    finally:
        torch.use_deterministic_algorithms(False)
    assert launched == [plans[1], plans[0], plans[0]]
    assert timed == [128, 64]


@pytest.mark.triton
def test_no_candidate_has_tiles_beyond_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small grids compile few candidates, large ones all that fit into registers."""
    from spatial_grouping_attention.backends.triton import plan
    from spatial_grouping_attention.backends.triton.layout import layout_of

    monkeypatch.setattr(plan, "INTERPRETED", False)
    small, large = (layout_of(Neighbourhood((2 * n,) * 2, (n,) * 2, 2, 3, 1, 3)) for n in (3, 64))
    for plans, tiles in ((plan.token_plans, plan.TOKEN_TILES[2]), (plan.group_plans, plan.GROUP_TILES[2])):
        within = [tile for tile, *_ in tiles if math.prod(tile) <= (36 if plans is plan.token_plans else 9)]
        # Where all that a tile sees fits into one step, plans that differ in their steps are one.
        assert {candidate.tile for candidate in plans(small, 32)} == set(within or [tiles[0][0]])
        assert [(candidate.tile, candidate.num_warps) for candidate in plans(large, 32)] == [
            (candidate[0], candidate[-1]) for candidate in tiles
        ]


@pytest.mark.triton
@pytest.mark.parametrize("row_bytes", [32, 64, 128, 256, 512])
@pytest.mark.parametrize("shape", [(4000,), (64, 64), (32, 32, 32)])
def test_no_plan_is_compiled_for_groups_of_warps(
    shape: tuple[int, ...], row_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such plans gave wrong results on an H100 (see ``plan.py``); and tiles and steps have a product's 16 rows."""
    from spatial_grouping_attention.backends.triton import plan
    from spatial_grouping_attention.backends.triton.layout import layout_of

    monkeypatch.setattr(plan, "INTERPRETED", False)
    layout = layout_of(Neighbourhood(shape, tuple(n // 2 for n in shape), 2, 3, 1, 3))
    plans = [*plan.token_plans(layout, row_bytes), *plan.group_plans(layout, row_bytes)]
    for candidate in plans:
        rows = math.prod(candidate.tile)
        assert candidate.num_warps <= (2 if rows >= 64 else 4)
        assert rows >= 16
        assert candidate.block >= 16


@on_gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_results_do_not_depend_on_the_order_of_programs(dtype: torch.dtype, device: str) -> None:
    case = moved(make_case(LARGER["2-D"], bias="table", head_size=32).to(dtype), device)
    runs = []
    for _ in range(3):
        leaves = case.leaves()
        got = call("group", case.with_leaves(leaves))
        runs.append([*got, *gradients(tuple(x.cpu() for x in got), leaves).values()])
    for first, other in zip(runs[0] * 2, runs[1] + runs[2], strict=True):
        assert torch.equal(first, other)


@pytest.mark.triton
def test_the_gradient_of_a_wide_bias_table_takes_no_more_reductions(monkeypatch: pytest.MonkeyPatch) -> None:
    """One per step over tokens, whether the window has 3 entries or 15."""
    from triton.runtime import interpreter

    reductions: list[object] = []
    reduce = interpreter.ReduceOps.apply_impl

    def counted(operation: object, *arguments: object) -> object:
        reductions.append(operation)
        return reduce(operation, *arguments)

    monkeypatch.setattr(interpreter.ReduceOps, "apply_impl", counted)
    counts = []
    for window in (3, 15):
        case = make_case(Neighbourhood((8,), (4,), 2, 3, 1, window), batch=1, heads=1, bias="table").to(torch.float32)
        x = operands(case, case.u)
        out, lse = engine.assign(x)
        reductions.clear()
        engine.assign_backward(x, out, lse, case.v, None)
        counts.append(len(reductions))
    assert counts[0] == counts[1] > 0
