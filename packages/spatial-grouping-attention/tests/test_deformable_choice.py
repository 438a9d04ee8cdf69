"""Which engine computes at points, and what is said where it cannot."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from points_cases import Kernels, case, compiled, mostly_everywhere, on
from RoSE.kernels.selfcheck import SelfCheck
from spatial_grouping_attention import DeformableSpatialGroupingAttention
from spatial_grouping_attention.backends.deformable import lattice, plain, selection
from spatial_grouping_attention.backends.deformable.compiled import Compiled
from spatial_grouping_attention.backends.deformable.selection import NATIVE, TRITON
from torch.utils.flop_counter import FlopCounterMode


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


@mostly_everywhere
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
