"""What a layer costs besides arithmetic: Python calls in our own code, and how often the same is worked out."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import RoSE
import spatial_grouping_attention
import torch
from spatial_grouping_attention import SparseSpatialGroupingAttention
from spatial_grouping_attention.backends import selection
from spatial_grouping_attention.backends.tiled import tables
from spatial_grouping_attention.geometry import neighbourhood

SOURCES = tuple(str(Path(package.__file__).parent) for package in (RoSE, spatial_grouping_attention))


def calls(function: Callable[[], object]) -> Counter[str]:
    """Calls of Python functions defined in our sources, by name; comprehensions count where Python calls them."""
    counted: Counter[str] = Counter()

    def count(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(SOURCES):
            counted[f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(before)
    return counted


def layer(backend: str) -> SparseSpatialGroupingAttention:
    return SparseSpatialGroupingAttention(128, 2, 3, 8, stride=2, iters=3, backend=backend)


def test_a_forward_pass_is_little_python() -> None:
    module, x = layer("tiled"), torch.randn(1, 64 * 64, 128)
    with torch.no_grad():
        module(x, 1.0, (64, 64))
        counted = calls(lambda: module(x, 1.0, (64, 64)))
    assert counted.total() < 600, counted.most_common(20)


def test_a_grid_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Relations are checked, backends chosen and tables built for the first of three rounds, and not again."""
    monkeypatch.setattr(selection, "NATIVE_DEVICES", ())  # "auto" as it is without numba
    for remembered in (tables.runs_of, tables.tiling_of, neighbourhood._rebuild):
        remembered.forget()
    selection._automatic.forget()
    module, x = layer("auto"), torch.randn(1, 24 * 24, 128)
    once = ("tables.py:runs_of", "tables.py:tiling_of", "neighbourhood.py:__post_init__", "selection.py:_automatic")
    first, again = (calls(lambda: module(x, 1.0, (24, 24))) for _ in range(2))
    assert {name: first[name] for name in once} == dict.fromkeys(once, 1)
    assert not any(again[name] for name in once)
