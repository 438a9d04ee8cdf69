"""What is remembered of geometries: once for all that are equal, bounded, and fit for every mode it may be made in."""

from __future__ import annotations

import gc
import multiprocessing
import threading
import weakref

import pytest
import torch
from grouping_cases import assert_near, make_case
from operator_calls import assign, group
from spatial_grouping_attention import Neighbourhood, SparseSpatialGroupingAttention, functional
from spatial_grouping_attention.backends.tiled import chunks, tables
from spatial_grouping_attention.geometry import relate
from torch._subclasses.fake_tensor import FakeTensorMode

CPU = torch.device("cpu")


def seen(size: int) -> Neighbourhood:
    """A geometry that only the test of this size asks for."""
    return Neighbourhood((size, 9), (-(-size // 2), 5), 2, 3, 1, 3)


def runs(neighbourhood: Neighbourhood, rows: int = 2) -> tuple[tables.Run, ...]:
    return tables.runs_of(neighbourhood, chunks.TOKENS_PER_AXIS, rows, CPU)


def results(size: int) -> list[torch.Tensor]:
    case = make_case(seen(size), bias="table", valid="some").to(torch.float32)
    leaves = case.leaves()
    loaded = case.with_leaves(leaves)
    out, lse, _ = group(loaded, "tiled")
    up, _ = assign(loaded, "tiled")
    (out.sum() + up.square().sum() + lse.masked_fill(lse.isinf(), 0.0).sum()).backward()
    return [out.detach(), up.detach(), *(leaves[name].grad for name in ("q", "k", "v", "u", "bias"))]


def assert_same(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)


def test_equal_geometries_are_one() -> None:
    arguments = ((8, 6), (4, 3), (2, 2), (3, 3), (1, 1), (3, 3), (1, 1))
    assert relate(*arguments) is relate(*arguments) == Neighbourhood(*arguments)
    assert relate(*arguments) is Neighbourhood.from_integers(Neighbourhood(*arguments).integers())
    integers = seen(40).integers()
    assert Neighbourhood.from_integers(integers) is Neighbourhood.from_integers(list(integers))
    assert Neighbourhood.from_integers(integers) == seen(40)
    assert runs(seen(40)) is runs(Neighbourhood.from_integers(integers))


def test_what_is_wrong_is_refused_every_time() -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="window must be odd"):
            relate((8,), (4,), (2,), (3,), (1,), (2,), (1,))


def test_runs_inside_of_the_grid_share_their_tables() -> None:
    """What is kept does not grow with the grid."""
    for size in (101, 403):
        every = runs(seen(size))
        assert len(every) > 10
        assert len({id(run.tables) for run in every}) <= 4
        covered = [index for run in every for index in range(run.tokens.start, run.tokens.stop)]
        assert covered == list(range(size * 9))


def test_a_bounded_number_is_kept() -> None:
    first = weakref.ref(runs(seen(41))[0].tables)
    assert first() is not None
    for size in range(50, 90):
        runs(seen(size))
    gc.collect()
    assert first() is None


def test_made_in_inference_mode_and_trained_with() -> None:
    with torch.inference_mode():
        case = make_case(seen(42), bias="table", valid="some").to(torch.float32)
        group(case, "tiled")
        layer = SparseSpatialGroupingAttention(8, 2, 3, 2)
        layer(torch.randn(1, 43 * 9, 8), 1.0, (43, 9))
    assert not any(run.tables.tokens.is_inference() for run in runs(seen(42)))
    assert all(grad.isfinite().all() for grad in results(42)[2:])


def test_made_under_another_default_device() -> None:
    """What is remembered from there serves: no table is on the default device of whoever asked first."""
    chosen, entries = [], tables.runs_of

    def watched(*args: object) -> tuple[tables.Run, ...]:
        chosen.append(args)
        return entries(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "runs_of", watched)
        want = results(44)
    tables.runs_of.forget()
    tables.tiling_of.forget()
    with torch.device("meta"):
        made = [tables.runs_of(*args) for args in chosen]
    assert made
    assert all(run.tables.tokens.device == CPU and run.tables.hidden.device == CPU for every in made for run in every)
    assert_same(results(44), want)


def test_fake_tensors_leave_nothing_behind() -> None:
    with FakeTensorMode():
        q, k, v = torch.randn(1, 1, 115, 4), torch.randn(1, 1, 45 * 9, 4), torch.randn(1, 1, 45 * 9, 4)
        fake, _ = functional.assign(q, k, q, seen(45), backend="tiled")
        assert fake.shape == v.shape
    assert all(type(run.tables.tokens) is torch.Tensor for run in runs(seen(45)))
    assert all(x.isfinite().all() for x in results(45)[2:])


def test_threads_that_meet_a_geometry_at_once_get_the_same_results() -> None:
    want = results(46)
    tables.runs_of.forget()
    tables.tiling_of.forget()
    got: list[list[torch.Tensor]] = []
    barrier = threading.Barrier(6)

    def work() -> None:
        barrier.wait()
        got.append(results(46))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 6
    for one in got:
        assert_same(one, want)


def in_child(queue: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    queue.put([x.tolist() for x in results(47)])


def test_a_forked_process_goes_on_with_what_its_parent_remembers() -> None:
    """As a DataLoader's worker does; one thread, because torch's own pools do not survive a fork."""
    want = results(47)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=in_child, args=(queue,))
    child.start()
    got = queue.get(timeout=60)
    child.join(timeout=60)
    assert child.exitcode == 0
    for mine, theirs in zip(got, want, strict=True):
        assert_near(torch.tensor(mine), theirs, 0.0)
