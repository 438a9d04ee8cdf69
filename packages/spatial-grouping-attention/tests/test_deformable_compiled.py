"""The kernels for points: what is particular to compiled code.

The laws of points hold for all engines, see test_deformable.py. What is marked needs numba, triton or a GPU and runs in
the sessions tests-optional and tests-gpu.
"""

import itertools
import threading
from importlib import import_module
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from grouping_cases import assert_near
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import make_layer, slow, tokens
from points_cases import (
    FUNCTIONS,
    INTERPRETED,
    ON_CPU,
    ON_GPU,
    USED,
    Engine,
    Kernels,
    arriving_at,
    case,
    cases,
    compiled,
    everywhere,
    mostly_everywhere,
    needs_numba,
    on,
    results,
    same,
)
from spatial_grouping_attention.backends.deformable import interpolation, lattice, plain
from spatial_grouping_attention.backends.deformable.selection import NATIVE
from spatial_grouping_attention.geometry.lattice import Lattice
from torch import Tensor


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
@pytest.mark.parametrize("name", ["products", "averages", *slow("sums", "relative sums")])
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


@mostly_everywhere
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


@mostly_everywhere
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
