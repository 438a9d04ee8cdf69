"""The kernels for the CPU: the laws of every backend, and what is particular to compiled code and its threads.

What is marked needs numba and runs in the tests-optional session.
"""

import multiprocessing
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from grouping_cases import Case, assert_near, cases, gradients, make_case, oracle_group
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import slow
from operator_calls import OPERATORS, call, operands
from spatial_grouping_attention import Neighbourhood, functional
from spatial_grouping_attention.backends import native, tiled
from test_operators import check
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

needs_numba = pytest.mark.native

GEOMETRIES = {
    "1-D": Neighbourhood((21,), (11,), 2, 3, 1, 3),
    "1-D, border blocks, dilated": Neighbourhood((29,), (8,), 3, 7, 0, 3, 2),
    "1-D, more phases than groups": Neighbourhood((9,), (3,), 3, 3, 0, 5, 4),
    "1-D, groups beyond the input": Neighbourhood((4,), (8,), 2, 2, 6, 3),
    "1-D, stride larger than kernel": Neighbourhood((41,), (5,), 9, 2, 0, 3),
    "2-D": Neighbourhood((10, 12), (5, 6), 2, 3, 1, 3),
    "2-D, dilated and anisotropic": Neighbourhood((9, 13), (3, 3), (2, 3), (4, 7), (0, 1), (3, 5), (2, 1)),
    "2-D, stride 1, wide": Neighbourhood((7, 9), (7, 9), 1, 1, 0, 7),
    "3-D": Neighbourhood((4, 5, 6), (2, 3, 3), 2, 3, 1, 3),
    "3-D, dilated": Neighbourhood((5, 6, 9), (5, 3, 5), (1, 2, 2), 3, 1, 3, (2, 1, 2)),
}


@needs_numba
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_geometries(geometry: str, dtype: torch.dtype) -> None:
    check(make_case(GEOMETRIES[geometry], bias="table", compact=True), "native", dtype)


@needs_numba
@settings(max_examples=40)
@given(st.data())
def test_float64(data: st.DataObject) -> None:
    check(data.draw(cases("native")), "native", torch.float64)


@needs_numba
@settings(max_examples=25)
@given(st.data())
def test_float32(data: st.DataObject) -> None:
    check(data.draw(cases("native")), "native", torch.float32)


@needs_numba
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@settings(max_examples=10)
@given(st.data())
def test_half_types(dtype: torch.dtype, data: st.DataObject) -> None:
    check(data.draw(cases("native")), "native", dtype)


@needs_numba
@settings(max_examples=15)
@given(st.data())
def test_starved_groups_stay_exact(data: st.DataObject) -> None:
    """Memberships as small as exp(-300), far below what float32 can hold."""
    case = data.draw(cases("native", strength=60.0)).to(torch.float64)
    check(case, "native", torch.float64)
    single = case.to(torch.float32)
    got, want = call("group", single, "native"), oracle_group(single.to(torch.float64))
    assert_near(got[0], want[0], 1e-3, "averages", size=case.v.abs().max().item())


@needs_numba
def test_normalisers_of_others_may_be_far_away() -> None:
    case = make_case(GEOMETRIES["2-D"]).to(torch.float32)
    for shift in (-200.0, 200.0):
        near, far = (call("pool", replace(case, lse=case.lse + by), "native")[0] for by in (0.0, shift))
        assert_near(far, near, 1e-4)


@needs_numba
@pytest.mark.parametrize("order", ["heads first", "tokens first", "channels last but one"])
def test_operands_in_any_order_of_memory(order: str) -> None:
    def laid(x: Tensor) -> Tensor:
        if order == "tokens first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        return x.mT.contiguous().mT if order == "channels last but one" else x

    case = make_case(GEOMETRIES["2-D"], head_size=16, value_size=16, compact=True).to(torch.float32)
    moved = replace(case, q=laid(case.q), k=laid(case.k), v=laid(case.v), u=laid(case.u))
    for operator in OPERATORS:
        plain, other = case.leaves(), {name: x.requires_grad_() for name, x in moved.leaves().items()}
        got, want = (
            call(operator, moved.with_leaves(other), "native"),
            call(operator, case.with_leaves(plain), "native"),
        )
        for mine, theirs in zip(got, want, strict=True):
            assert torch.equal(mine, theirs)
        theirs_of = gradients(want, plain)
        for name, gradient in gradients(got, other).items():
            assert_near(gradient, theirs_of[name], 1e-6, name, size=1.0)


@needs_numba
def test_distances_are_exact_on_long_axes() -> None:
    """On 4096 groups an axis, positions are large and distances within a window small."""
    long = Neighbourhood((8191,), (4096,), 2, 3, 1, 3)
    case = make_case(long, batch=1, heads=1, head_size=4, value_size=4).to(torch.float32)
    leaf = torch.full((1,), 3.0, requires_grad=True)
    out, lse, _ = call("group", replace(case, compactness=leaf), "native")
    (slope,) = torch.autograd.grad(lse.sum() + out.sum(), leaf)
    part = slice(8000, 8191)
    cells = torch.arange(8191).add(0).div(2, rounding_mode="floor")
    window = (cells[:, None] + torch.arange(-1, 2)).clamp(0, 4095)
    hidden = (cells[:, None] + torch.arange(-1, 2) < 0) | (cells[:, None] + torch.arange(-1, 2) > 4095)
    q, k = case.q.double()[0, 0], case.k.double()[0, 0]
    places = torch.arange(8191, dtype=torch.float64)[:, None] / 2
    scores = (k[:, None] * q[window]).sum(-1) / 2.0 - 3.0 * (places - window).square()
    want = scores.masked_fill(hidden, -torch.inf).logsumexp(-1)
    assert_near(lse[0, 0, part], want[part], 1e-5)
    assert torch.isfinite(slope)
    exact = replace(case.to(torch.float64), compactness=leaf.detach().double().requires_grad_())
    exact_out, exact_lse, _ = call("group", exact, "native")
    (exact_slope,) = torch.autograd.grad(exact_lse.sum() + exact_out.sum(), exact.compactness)
    assert_near(slope, exact_slope, 1e-4)


@needs_numba
def test_the_exponential() -> None:
    """Within two units of the last place, exact at the ends, and NaN stays NaN."""
    import numba
    from spatial_grouping_attention.backends.native.exponential import exp
    from spatial_grouping_attention.backends.native.simd import Pointer, lanes, load, store

    for dtype, kind, lowest, most in (
        (torch.float32, numba.float32, -103.0, 88.7),
        (torch.float64, numba.float64, -745.0, 709.7),
    ):
        pointer = Pointer(kind)

        @numba.njit((pointer, pointer, numba.int64))
        def run(x, y, count):
            for i in range(0, count, lanes(x)):
                store(y, i, exp(load(x, i)))

        x = torch.empty(2**16, dtype=torch.float64).uniform_(lowest, most).to(dtype)
        x[: 2**15].uniform_(-3, 3)
        ends = torch.tensor([-torch.inf, torch.inf, torch.nan, 0.0, lowest - 10, most + 1, -1e30, 1e30], dtype=dtype)
        x[:8] = ends
        y = torch.empty_like(x)
        run.overloads[run.signatures[0]].entry_point(x.data_ptr(), y.data_ptr(), len(x))
        assert torch.equal(y[:8].nan_to_num(nan=-1.0), torch.exp(ends).nan_to_num(nan=-1.0))
        want = x[8:].double().exp()
        if dtype == torch.float32:
            space = torch.nextafter(want.float(), torch.tensor(torch.inf)).double() - want.float().double()
            assert ((y[8:].double() - want).abs() / space).max() <= 2.0
        else:
            normal = want > 1e-300
            assert ((y[8:] - want).abs() / want)[normal].max() <= 2 * torch.finfo(torch.float64).eps


@needs_numba
@pytest.mark.parametrize("side_by_side", [False, True])
@pytest.mark.parametrize("operator", OPERATORS)
def test_results_do_not_depend_on_threads(operator: str, side_by_side: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor on how many heads one item of work has, which depends on threads where heads lie side by side."""
    from spatial_grouping_attention.backends.native import plan

    monkeypatch.setattr(plan, "WORTH_A_THREAD", 0)
    case = make_case(Neighbourhood((70, 9), (35, 5), 2, 3, 1, 3), heads=6, bias="table", compact=True).to(torch.float32)
    if side_by_side:
        moved = {
            name: getattr(case, name).transpose(1, 2).contiguous().transpose(1, 2) for name in ("q", "k", "v", "u")
        }
        case = replace(case, **moved)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            leaves = case.leaves()
            results = call(operator, case.with_leaves(leaves), "native")
            found.append([*results, *gradients(results, leaves).values()])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@needs_numba
def test_python_threads_may_call_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from spatial_grouping_attention.backends.native import plan

    monkeypatch.setattr(plan, "WORTH_A_THREAD", 0)
    case = make_case(Neighbourhood((40, 9), (20, 5), 2, 3, 1, 3), compact=True).to(torch.float32)
    want = call("group", case, "native")[0]
    failures: list[str] = []

    def work() -> None:
        torch.set_num_threads(3)
        for _ in range(30):
            if not torch.equal(call("group", case, "native")[0], want):
                failures.append("differs")

    before = torch.get_num_threads()
    try:
        callers = [threading.Thread(target=work) for _ in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(60)
            assert not caller.is_alive()
    finally:
        torch.set_num_threads(before)
    assert not failures


def _in_a_child(case: Case, want: Tensor, results: Any) -> None:
    torch.set_num_threads(2)
    results.put(torch.equal(call("group", case, "native")[0], want))


@needs_numba
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_forked_processes_have_threads_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from spatial_grouping_attention.backends.native import plan

    monkeypatch.setattr(plan, "WORTH_A_THREAD", 0)
    case = make_case(Neighbourhood((40, 9), (20, 5), 2, 3, 1, 3)).to(torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        want = call("group", case, "native")[0]  # the parent has threads now
    finally:
        torch.set_num_threads(before)
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=_in_a_child, args=(case, want, results))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert results.get()


class _Grouped(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Tensor:
        return call("group", make_case(GEOMETRIES["2-D"], seed=i).to(torch.float32), "native")[0]


@needs_numba
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_workers_of_a_data_loader() -> None:
    loader = torch.utils.data.DataLoader(_Grouped(), batch_size=None, num_workers=2)
    for i, got in enumerate(loader):
        assert torch.equal(got, _Grouped()[i])


PROGRAM = """
import sys, warnings
warnings.simplefilter("error")
import torch
from spatial_grouping_attention import Neighbourhood
from spatial_grouping_attention.functional import grouping_attention
assert "numba" not in sys.modules
q, k = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 8, 8)
out, _ = grouping_attention(q, k, k, Neighbourhood((8,), (4,), 2, 3, 1, 3), backend="native")
assert torch.isfinite(out).all() and "numba" in sys.modules
"""


@needs_numba
@pytest.mark.parametrize("place", ["a file", *slow("missing")])
def test_quiet_where_nothing_can_be_cached(place: str, tmp_path: Path) -> None:
    """Folders that cannot be made stand for those that may not be written: root may write everywhere."""
    obstacle = tmp_path / "file"
    obstacle.write_text("")
    cache = obstacle / "cache" if place == "missing" else obstacle
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert not any(obstacle.parent.glob("**/*.nbc"))


@pytest.mark.slow
@needs_numba
def test_kernels_are_kept_for_the_next_process(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "NUMBA_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    again = PROGRAM + (
        "from spatial_grouping_attention.backends.native import forward\n"
        "print(sum(forward.pool.stats.cache_hits.values()))\n"
    )
    hits = [
        subprocess.run(
            [sys.executable, "-c", again], env=environment, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert [int(count) for count in hits] == [0, 1]


@needs_numba
def test_a_kept_kernel_says_itself_what_it_is(tmp_path: Path) -> None:
    """Numba's own index may name a file that another process, or an older version, has filled with something else."""
    from spatial_grouping_attention.backends.native.jit import _Files

    def files(stamp: int) -> _Files:
        return _Files(str(tmp_path), "kernel.py311", stamp)

    keys = [(dtype, ("machine",), digest) for dtype in ("float32", "float64") for digest in ("old", "new")]
    for key in keys:
        files(1).save(key, f"code of {key}")
    assert len(list(tmp_path.iterdir())) == 2  # of an older version nothing is left
    assert [files(1).load(key) for key in keys] == [None, f"code of {keys[1]}", None, f"code of {keys[3]}"]
    assert files(2).load(keys[1]) is None
    first, second = sorted(tmp_path.iterdir())
    first.write_bytes(second.read_bytes())
    assert sorted(map(str, map(files(1).load, (keys[1], keys[3])))).count("None") == 1


@needs_numba
def test_what_a_kernel_calls_is_optimised_with_it_and_not_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """By whatever numba calls today for what our helpers are to leave out: else they would compile twice as long."""
    import numba
    from numba.core.codegen import JITCodeLibrary
    from spatial_grouping_attention.backends.native.jit import helper

    optimised, optimise = [], JITCodeLibrary._optimize_final_module

    def watched(library: Any) -> None:
        optimised.append(library.name)
        optimise(library)

    monkeypatch.setattr(JITCodeLibrary, "_optimize_final_module", watched)
    twice = helper(lambda x: 2 * x)
    more = helper(lambda x: twice(x) + 1)

    @numba.njit
    def outermost(x: float) -> Any:
        return more(x) * 3

    assert outermost(1.0) == 9.0
    assert [name for name in optimised if "locals" in name] == [outermost.py_func.__qualname__]  # and numba's runtime


@needs_numba
@pytest.mark.parametrize("operator", OPERATORS)
def test_nan_stays_near_its_token(operator: str) -> None:
    case = make_case(Neighbourhood((40,), (20,), 2, 3, 1, 3), batch=1, heads=1).to(torch.float32)
    broken = replace(case, k=case.k.clone(), v=case.v.clone())
    broken.k[0, 0, 21], broken.v[0, 0, 21] = torch.nan, torch.nan
    got, want = call(operator, broken, "native")[0][0, 0], call(operator, case, "native")[0][0, 0]
    far = torch.ones(len(got), dtype=torch.bool)
    far[slice(21, 22) if operator == "assign" else slice(9, 12)] = False
    assert torch.equal(got[far], want[far])
    assert got[~far].isnan().all()


@needs_numba
def test_nan_of_a_group_stays_near_it() -> None:
    case = make_case(Neighbourhood((40,), (20,), 2, 3, 1, 3), batch=1, heads=1).to(torch.float32)
    broken = replace(case, q=case.q.clone())
    broken.q[0, 0, 10] = torch.nan
    got, want = call("assign", broken, "native")[0][0, 0], call("assign", case, "native")[0][0, 0]
    far = torch.ones(40, dtype=torch.bool)
    far[18:24] = False  # the tokens of the cells 9, 10 and 11
    assert torch.equal(got[far], want[far])
    assert got[~far].isnan().all()


@needs_numba
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler calls what torch has deprecated
def test_compiled_exported_counted_and_mapped() -> None:
    case = make_case(GEOMETRIES["2-D"]).to(torch.float32)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.grouping_attention(q, k, v, case.neighbourhood, backend="native")[0]

    want = attend(case.q, case.k, case.v)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(attend, fullgraph=True, backend="aot_eager")(case.q, case.k, case.v), want)

    class Module(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v)

    exported = torch.export.export(Module(), (case.q, case.k, case.v))
    assert torch.equal(exported.module()(case.q, case.k, case.v), want)
    with FlopCounterMode(display=False) as counter:
        attend(case.q, case.k, case.v)
    pairs = case.neighbourhood.num_pairs * case.q.shape[0] * case.q.shape[1]
    assert counter.get_total_flops() == 2 * pairs * (case.q.shape[3] + case.v.shape[3])
    several = [torch.stack([x, x + 0.1]) for x in (case.q, case.k, case.v)]
    mapped = torch.func.vmap(attend)(*several)
    for i in range(2):
        assert_near(mapped[i], attend(*(x[i] for x in several)), 1e-6)


@needs_numba
def test_gradients_of_many_groups_match_those_of_tiles() -> None:
    """Large enough for several items of work, rows of sums and blocks of vectors."""
    case = make_case(
        Neighbourhood((66, 50), (33, 25), 2, 3, 1, 5), head_size=20, value_size=36, bias="table", compact=True
    )
    found = {}
    for name, engine in (("native", native), ("tiled", tiled)):
        x = operands(case, case.v)
        pooled = engine.pool(x, None)
        generator = torch.Generator().manual_seed(0)
        grads = [torch.randn(y.shape, generator=generator, dtype=torch.float64) for y in pooled[:3]]
        found[name] = [*pooled[:3], *engine.pool_backward(x, pooled, *grads)[:4]]
    for mine, theirs in zip(found["native"], found["tiled"], strict=True):
        assert_near(mine, theirs, 1e-11)
