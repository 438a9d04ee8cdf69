"""How the work is cut and which plan a call gets: no result depends on it."""

import pytest
import torch
from grouping_cases import gradients, make_case
from spatial_grouping_attention import Neighbourhood
from triton_cases import LARGER, TOLERANCE, call, check, in_interpreter, moved, on_gpu


@in_interpreter
@pytest.mark.parametrize(("tile", "rows"), [((1, 8, 8), 64), ((1, 8, 16), 16), ((1, 2, 8), 16), ((1, 16, 4), 32)])
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


@pytest.mark.triton
def test_a_class_of_calls_is_timed_once_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    from spatial_grouping_attention.backends.triton import plan

    quick, slow, too_large = (plan.Plan((1, 1, n), 16, 4, 1) for n in (64, 128, 256))
    monkeypatch.setattr(plan, "_CHOSEN", {})
    durations = {quick: 1.0, slow: 2.0, too_large: float("inf")}
    timed: list[plan.Plan] = []
    launched: list[plan.Plan] = []

    def time(run: object, candidate: plan.Plan) -> float:
        timed.append(candidate)
        return durations[candidate]

    monkeypatch.setattr(plan, "_time", time)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for _ in range(2):
        plan.choose("a class", lambda: [slow, too_large, quick], launched.append)
    assert timed == [slow, too_large, quick]
    assert launched == [quick, quick]
    # While a graph is captured nothing may be tried out, and nothing is remembered.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    plan.choose("another", lambda: [slow, quick], launched.append)
    assert launched[-1] == slow
    assert len(timed) == 3


@pytest.mark.triton
def test_no_candidate_has_tiles_beyond_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small grids compile one candidate, large ones all that fit into registers."""
    from spatial_grouping_attention.backends.triton import plan
    from spatial_grouping_attention.backends.triton.layout import layout_of

    monkeypatch.setattr(plan, "INTERPRETED", False)
    small, large = (layout_of(Neighbourhood((2 * n,) * 2, (n,) * 2, 2, 3, 1, 3)) for n in (3, 64))
    for plans, tiles in ((plan.token_plans, plan.TOKEN_TILES[2]), (plan.group_plans, plan.GROUP_TILES[2])):
        assert [candidate.tile for candidate in plans(small, 32)] == [tiles[0][0]]
        assert [(candidate.tile, candidate.num_warps) for candidate in plans(large, 32)] == list(tiles)


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
