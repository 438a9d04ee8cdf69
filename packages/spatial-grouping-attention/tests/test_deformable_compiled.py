"""The kernels for points: what is particular to compiled code, and when it is taken.

The laws of points hold for all engines, see test_deformable.py. What is marked needs numba, triton or a GPU and runs in
the sessions tests-optional and tests-gpu.
"""

import itertools
import threading
from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from grouping_cases import assert_near
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import make_layer, tokens
from RoSE.kernels.selfcheck import SelfCheck
from spatial_grouping_attention import DeformableSpatialGroupingAttention
from spatial_grouping_attention.backends.deformable import interpolation, lattice, plain, selection
from spatial_grouping_attention.backends.deformable.compiled import Compiled
from spatial_grouping_attention.backends.deformable.selection import NATIVE, TRITON
from spatial_grouping_attention.geometry.lattice import Lattice
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

needs_numba = pytest.mark.native

Engine = ModuleType | Compiled

# Kernels, and a device on which they run.
ON_CPU = pytest.param((NATIVE, "cpu"), marks=pytest.mark.native, id="native")
INTERPRETED = pytest.param((TRITON, "cpu"), marks=pytest.mark.triton, id="interpreter")
ON_GPU = pytest.param((TRITON, "cuda"), marks=pytest.mark.gpu, id="gpu")
everywhere = pytest.mark.parametrize("kernels", [ON_CPU, INTERPRETED, ON_GPU])
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


def check(kernels: Kernels, name: str, dtype: torch.dtype, grid: Lattice, exact: list[Tensor]) -> None:
    """Results and gradients are those of the formulas in float64."""
    by, device = kernels
    operands = [x.to(dtype) for x in exact]
    want, gradients = results(name, plain, grid, [x.double() for x in operands])
    got, mine = results(name, by, *on(grid, operands, device))
    # Numbers of the size of the operands are added up, whatever is left in the end.
    tolerance, size = {torch.float64: 1e-12, torch.float32: 1e-5}[dtype], max(x.abs().max().item() for x in exact[:2])
    for result, expected in zip(got, want, strict=True):
        assert result.dtype == dtype
        assert_near(result.cpu(), expected, tolerance, name, size=max(size, expected.abs().max().item()))
    assert mine.keys() == gradients.keys()
    for key, gradient in gradients.items():
        what = f"{name}: {key}"
        assert_near(mine[key].cpu(), gradient, tolerance, what, size=max(size, gradient.abs().max().item()))


@compiled
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", FUNCTIONS)
@settings(max_examples=40)
@given(st.data())
def test_kernels_compute_what_the_formulas_say(
    name: str, dtype: torch.dtype, kernels: Kernels, data: st.DataObject
) -> None:
    check(kernels, name, dtype, *data.draw(cases()))


@pytest.mark.parametrize("kernels", [INTERPRETED])
@pytest.mark.parametrize("name", FUNCTIONS)
@settings(max_examples=5)
@given(st.data())
def test_the_interpreter_computes_what_the_formulas_say(name: str, kernels: Kernels, data: st.DataObject) -> None:
    check(kernels, name, torch.float64, *data.draw(cases((1, 3))))


@compiled
@pytest.mark.parametrize("shape", [(301,), (40, 37), (9, 11, 13)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_many_tokens_and_channels(name: str, shape: tuple[int, ...], kernels: Kernels) -> None:
    """Many programs, whose sums meet, and more channels than one works through at a time."""
    sizes = {"batch": 2, "heads": 3, "count": 997, "points": 9, "channels": 150}
    check(kernels, name, torch.float32, *case(shape, **sizes, holes=True, seed=2))


@pytest.mark.parametrize("kernels", [INTERPRETED])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_slices_of_channels(name: str, kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    from spatial_grouping_attention.backends.triton.points import passes

    monkeypatch.setattr(passes, "MOST_CHANNELS", 4)
    sizes = {"batch": 1, "heads": 2, "count": 5, "points": 2, "channels": 11}
    check(kernels, name, torch.float64, *case((3, 4), **sizes, holes=True, seed=2))


@compiled
@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_of_gradients_are_those_of_the_formulas(name: str, kernels: Kernels) -> None:
    by, device = kernels
    made = case((3, 4), batch=1, heads=2, count=4, points=3, channels=3, holes=False, seed=3)
    grid, operands = on(*made, device)

    def slopes(by: Engine) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in operands]
        # Shares follow from places in a layer, among others.
        rows, of_tokens, places, numbers = leaves
        got = FUNCTIONS[name](by, grid, rows, of_tokens, places, numbers * places.sum(-1).cos())
        first = torch.autograd.grad([x.sin().sum() for x in got], leaves, create_graph=True, allow_unused=True)
        norm = sum(x.square().sum() for x in first if x is not None)
        second = torch.autograd.grad(norm, leaves, allow_unused=True)
        return [x for x in (*first, *second) if x is not None]

    mine, theirs = slopes(by), slopes(plain)
    assert len(mine) == len(theirs) > 3
    for got, want in zip(mine, theirs, strict=True):
        assert_near(got.cpu(), want.cpu(), 1e-9)


@compiled
def test_one_tensor_may_be_several_operands(kernels: Kernels) -> None:
    by, device = kernels
    made = case((3, 4), batch=1, heads=2, count=12, points=3, channels=3, holes=False, seed=3)
    grid, (rows, _, places, _) = on(*made, device)

    def slopes(by: Engine) -> list[Tensor]:
        x, where = rows.detach().requires_grad_(), places.detach().requires_grad_()
        shares = by.products(x, x, where, grid).log_softmax(-1)
        total, masses, _ = by.relative_sums(shares, where, x, grid)
        first = torch.autograd.grad((total / masses[..., None]).sin().sum(), (x, where), create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), (x, where))]

    for got, want in zip(slopes(by), slopes(plain), strict=True):
        assert_near(got.cpu(), want.cpu(), 1e-9)


@compiled
@pytest.mark.parametrize("name", FUNCTIONS)
def test_batches_of_gradients(name: str, kernels: Kernels) -> None:
    """By both of torch's vmaps, over a graph that was made outside of them."""
    by, device = kernels
    made = case((3, 4), batch=1, heads=2, count=4, points=3, channels=3, holes=True, seed=8)
    grid, operands = on(*made, device)
    leaves = [x.detach().requires_grad_() for x in operands]
    got = FUNCTIONS[name](by, grid, *leaves)[0]
    arriving = torch.randn(3, *got.shape, generator=torch.Generator().manual_seed(0)).to(got)

    def gradients(arriving: Tensor, **options: bool) -> tuple[Tensor, ...]:
        found = torch.autograd.grad(got, leaves, arriving, retain_graph=True, allow_unused=True, **options)
        return tuple(x for x in found if x is not None)

    want = [torch.stack(each) for each in zip(*map(gradients, arriving), strict=True)]
    for batched in (gradients(arriving, is_grads_batched=True), torch.vmap(gradients)(arriving)):
        for mine, theirs in zip(batched, want, strict=True):
            assert_near(mine.cpu(), theirs.cpu(), 1e-12)


@compiled
@pytest.mark.parametrize("name", FUNCTIONS)
def test_operands_are_broadcast_or_refused(name: str, kernels: Kernels) -> None:
    """A kernel would read beyond their end."""
    by, device = kernels
    made = case((3, 4), batch=2, heads=2, count=4, points=3, channels=3, holes=True, seed=9)
    grid, operands = on(*made, device)
    for i in range(4):
        for axis in (0, 1):
            fewer = [x.narrow(axis, 0, 1) if i == j else x for j, x in enumerate(operands)]
            whole = [x.expand(2, 2, *x.shape[2:]).contiguous() for x in fewer]
            (got, mine), (want, theirs) = results(name, by, grid, fewer), results(name, by, grid, whole)
            assert all(same(x, y, by) for x, y in zip(got, want, strict=True))
            for key, gradient in theirs.items():
                assert_near(mine[key].cpu(), gradient.sum_to_size(mine[key].shape).cpu(), 1e-12)
    for i in USED[name]:
        changed = [x[:, :, :2] if i == j else x for j, x in enumerate(operands)]
        with pytest.raises(RuntimeError, match="must match"):
            FUNCTIONS[name](by, grid, *changed)


@pytest.mark.parametrize("kernels", [ON_CPU, INTERPRETED])
def test_constants_are_those_of_the_formulas(kernels: Kernels) -> None:
    corners = import_module(f"spatial_grouping_attention.backends.{kernels[0].name}.points.corners")
    assert corners.LEAST_WEIGHT == interpolation.LEAST_WEIGHT
    assert corners.LARGEST_EXPONENT == plain.LARGEST_EXPONENT


@everywhere
def test_places_that_are_not_numbers_reach_the_same_groups(kernels: Kernels) -> None:
    """Also where the first groups of a grid are not valid."""
    by, device = kernels
    grid, (rows, of_tokens, places, _) = case(
        (4, 4), batch=1, heads=1, count=3, points=2, channels=2, holes=False, seed=1
    )
    valid = torch.ones(4, 4, dtype=torch.bool)
    valid[:2], valid[:, :2] = False, False
    places[0, 0, 1, 0, 0] = torch.nan
    shares = torch.zeros(places.shape[:-1], dtype=torch.float64)
    grid = lattice((4, 4), valid.view(1, 16))
    want = plain.relative_sums(shares, places, of_tokens, grid)[:2]
    there, (rows, of_tokens, places, shares) = on(grid, [rows, of_tokens, places, shares], device)
    for got, expected in zip(by.relative_sums(shares, places, of_tokens, there)[:2], want, strict=True):
        assert torch.equal(got.cpu().isnan(), expected.isnan())
        assert_near(got.cpu().nan_to_num(), expected.nan_to_num(), 1e-12)


@everywhere
@pytest.mark.parametrize("channels", [8, 3])
def test_results_may_be_changed_in_place(channels: int, kernels: Kernels) -> None:
    by, device = kernels
    made = case((3, 4), batch=1, heads=1, count=4, points=1, channels=channels, holes=False, seed=4)
    grid, operands = on(*made, device)
    rows, of_tokens, places, numbers = (x.requires_grad_() for x in operands)
    for result in (
        by.averages(numbers, places, rows, grid),
        by.sums(numbers, places, of_tokens, grid),
        by.relative_sums(numbers, places, of_tokens, grid)[0],
    ):
        result.mul_(2.0).sum().backward()


@pytest.mark.parametrize("kernels", [INTERPRETED, ON_GPU])
def test_sums_without_an_order_are_left_to_the_formulas(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where determinism is asked for between forward and backward."""
    by, device = kernels
    made = case((3, 4), batch=1, heads=1, count=4, points=1, channels=3, holes=False, seed=4)
    grid, operands = on(*made, device)
    rows, of_tokens, places, _ = (x.requires_grad_() for x in operands)
    products = by.products(rows, of_tokens, places, grid)
    called = Mock()
    monkeypatch.setattr(by.passes(), "derivatives", called)
    torch.use_deterministic_algorithms(True)
    try:
        products.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert not called.called
    assert rows.grad is not None


@everywhere
@pytest.mark.parametrize("name", FUNCTIONS)
def test_only_gradients_that_are_wanted(name: str, kernels: Kernels) -> None:
    by, device = kernels
    made = case((3, 4), batch=2, heads=1, count=4, points=3, channels=3, holes=True, seed=4)
    grid, operands = on(*made, device)
    _, want = results(name, by, grid, operands)
    for i, key in enumerate(("rows", "tokens", "places", "numbers")):
        leaves = [x.detach().requires_grad_(i == j) for j, x in enumerate(operands)]
        got = FUNCTIONS[name](by, grid, *leaves)
        if key in want:
            (found,) = torch.autograd.grad(got, leaves[i], arriving_at(got))
            assert same(found, want[key], by)
        else:
            assert not got[0].requires_grad


@everywhere
@pytest.mark.parametrize("name", FUNCTIONS)
def test_any_order_of_memory(name: str, kernels: Kernels) -> None:
    by, device = kernels
    made = case((4, 3), batch=2, heads=3, count=6, points=2, channels=8, holes=True, seed=5)
    grid, operands = on(*made, device)
    moved = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in operands]
    backwards = [x.mT.contiguous().mT for x in operands]
    want, gradients = results(name, by, grid, operands)
    for other in (moved, backwards):
        got, found = results(name, by, grid, other)
        assert all(same(x, y, by) for x, y in zip(got, want, strict=True))
        assert all(same(found[key], gradient, by) for key, gradient in gradients.items())


@needs_numba
def test_any_number_of_threads_gives_the_same_numbers() -> None:
    """Sums over groups have one order, also where one sample and head is divided among threads."""
    grid, operands = case((6, 5), batch=1, heads=1, count=900, points=9, channels=16, holes=False, seed=6)
    operands = [x.float() for x in operands]
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 4):
            torch.set_num_threads(threads)
            found.append([results(name, NATIVE, grid, operands) for name in FUNCTIONS])
    finally:
        torch.set_num_threads(before)
    for (got, mine), (want, theirs) in zip(*found, strict=True):
        assert all(map(torch.equal, got, want))
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


@needs_numba
def test_threads_may_share_a_layer() -> None:
    layer, shape = make_layer("deformable").eval(), (6, 9)
    inputs = [tokens(shape, seed=seed) for seed in range(6)]
    want = [layer(x, 1.0, shape).x_out for x in inputs]
    got: dict[int, Tensor] = {}

    def work(index: int) -> None:
        got[index] = layer(inputs[index], 1.0, shape).x_out

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(got[index], expected) for index, expected in enumerate(want))


@compiled
@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_layers_are_the_same(ndim: int, dtype: torch.dtype, kernels: Kernels) -> None:
    by, device = kernels
    shape = {1: (13,), 2: (6, 9), 3: (4, 5, 3)}[ndim]
    found = []
    for backend in ("reference", by.name):
        layer = make_layer("deformable", ndim, backend=backend, compactness=1.0, relative_bias=True).to(device, dtype)
        x = tokens(shape).to(device, dtype).requires_grad_()
        valid = torch.ones(2, x.shape[1], dtype=torch.bool, device=device)
        valid[1, 5:] = False
        out = layer(x, 1.0, shape, valid=valid)
        (out.x_out.float() * torch.linspace(-1, 1, out.x_out.shape[-1], device=device)).sum().backward()
        up = out.assignment.upsample(out.x_out)
        gradients = [x.grad, *(p.grad for p in layer.parameters())]
        found.append([out.x_out, up, out.assignment.labels(), *(g for g in gradients if g is not None)])
    tolerance = {torch.float32: 2e-4, torch.float64: 1e-9}.get(dtype, 0.1)
    for got, want in zip(*found, strict=True):
        assert got.dtype == want.dtype
        assert_near(got.double().cpu(), want.double().cpu(), tolerance)


def test_what_they_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    grid, operands = case((2, 2), batch=1, heads=1, count=2, points=1, channels=2, holes=False, seed=0)
    rows, _, places, _ = operands
    monkeypatch.setattr(selection, "_INSTALLED", False)
    with pytest.raises(ValueError, match=r"native needs numba: pip install spatial-grouping-attention\[cpu\]"):
        selection.engine("native", places, grid, rows)
    monkeypatch.setattr(selection, "_INSTALLED", True)
    with pytest.raises(ValueError, match=r"native needs tensors on a cpu; got meta"):
        selection.engine("native", places.to("meta"), grid, rows.to("meta"))
    with pytest.raises(ValueError, match=r"native needs tensors on one device; got cpu, meta"):
        selection.engine("native", places, grid, rows.to("meta"))
    with pytest.raises(ValueError, match=r"triton needs tensors on cuda .* got meta"):
        selection.engine("triton", places.to("meta"), grid, rows.to("meta"))
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(ValueError, match="in any order, and algorithms are to be deterministic"):
            selection.engine("triton", places, grid, rows)
    finally:
        torch.use_deterministic_algorithms(False)
    named = "backend must be one of 'auto', 'reference', 'native', 'triton'; got 'tiled'"
    with pytest.raises(ValueError, match=named):
        DeformableSpatialGroupingAttention(8, 2, 3, 2, backend="tiled")
    with pytest.raises(ValueError, match=named):
        selection.engine("tiled", places, grid, rows)


@pytest.mark.parametrize("by", [NATIVE, TRITON], ids=lambda by: by.name)
def test_what_no_kernels_can_do(by: Compiled) -> None:
    grid, operands = case((2, 2), batch=1, heads=1, count=2, points=1, channels=2, holes=False, seed=0)
    rows, _, places, _ = operands
    ask = partial(selection.engine, by.name)
    with pytest.raises(ValueError, match="one of them at a time; got"):
        ask(places, grid, rows.float())
    with pytest.raises(ValueError, match="takes float32 or float64"):
        ask(places.half(), grid, rows.half())
    with pytest.raises(ValueError, match="up to 3 axes; got 4"):
        ask(places, lattice((1, 1, 1, 2)), rows)
    with pytest.raises(ValueError, match="are shown standard operators"), FlopCounterMode(display=False):
        ask(places, grid, rows)
    with pytest.raises(ValueError, match="go through standard operators"):
        torch.func.grad(lambda rows: ask(places, grid, rows))(rows)


def _checks(by: Compiled, check: Callable[[str, torch.device], None]) -> dict[str, dict[str, SelfCheck]]:
    """Other checks of kernels."""
    names = selection.CHECKS[by.name]
    return {
        by.name: {name: SelfCheck(f"the {by.name} kernels", partial(check, name), "plain PyTorch") for name in names}
    }


@compiled
def test_auto_takes_them_where_they_can_serve(kernels: Kernels) -> None:
    by, device = kernels
    made = case((2, 2), batch=1, heads=1, count=2, points=1, channels=2, holes=False, seed=0)
    grid, operands = on(*made, device)
    rows, of_tokens, places, _ = (x.float() for x in operands)
    assert selection.engine("auto", places, grid, rows, of_tokens) is by
    assert selection.engine("auto", places, grid, rows.double(), of_tokens) is plain
    assert selection.engine("auto", places[:, :, :0], grid, rows, of_tokens[:, :, :0]) is plain
    with FlopCounterMode(display=False):
        assert selection.engine("auto", places, grid, rows, of_tokens) is plain


@everywhere
def test_the_check_passes(kernels: Kernels) -> None:
    by, device = kernels
    selection._check(by, "backward", torch.device(device))  # and forward before


def test_a_failed_check_leaves_them_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, device: torch.device) -> None:
        raise ImportError("numba needs another numpy")

    monkeypatch.setattr(selection, "_INSTALLED", True)
    monkeypatch.setattr(selection, "CHECKS", _checks(NATIVE, broken))
    grid, operands = case((2, 2), batch=1, heads=1, count=2, points=1, channels=2, holes=False, seed=0)
    rows, _, places, _ = (x.float() for x in operands)
    with pytest.warns(RuntimeWarning, match="the native kernels failed .* plain PyTorch"):
        assert selection.engine("auto", places, grid, rows) is plain


def test_only_what_a_call_may_come_to_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check compiles: who takes no gradients waits for none of theirs."""
    asked: list[str] = []
    monkeypatch.setattr(selection, "_INSTALLED", True)
    monkeypatch.setattr(selection, "CHECKS", _checks(NATIVE, lambda name, device: asked.append(name)))
    grid, operands = case((2, 2), batch=1, heads=1, count=2, points=1, channels=2, holes=False, seed=0)
    rows, _, places, _ = (x.float() for x in operands)
    selection.engine("auto", places, grid, rows)
    assert asked == ["forward"]
    rows.requires_grad_()
    with torch.no_grad():
        selection.engine("auto", places, grid, rows)
    assert asked == ["forward"]
    selection.engine("auto", places, grid, rows)
    assert asked == ["forward", "backward"]


@compiled
def test_no_vector_is_kept_for_a_point(kernels: Kernels) -> None:
    """Of a call only its operands are: points by channels of them would be 64 times as much as the places."""
    saved: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    by, device = kernels
    made = case((4, 4), batch=1, heads=1, count=30, points=9, channels=64, holes=False, seed=7)
    grid, operands = on(*made, device)
    leaves: list[Any] = [x.requires_grad_() for x in operands]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        for function in FUNCTIONS.values():
            function(by, grid, *leaves)
    most = max(x.numel() for x in itertools.chain(operands))
    assert saved
    assert max(x.numel() for x in saved) <= most
