"""What the compiler makes of the Triton kernels, read from PTX for a GPU that is not there."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.triton

# The pass over tokens is compiled with and without values, the one for tables for either operator.
TWICE = {"token_forward", "table_backward"}


def compiled(what: str) -> dict[str, Any]:
    """An answer of compile_kernels.py, from a process in which kernels are not interpreted."""
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(script), what]
    return json.loads(subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout)


def test_sizes_of_grids_batches_and_heads_compile_nothing_again() -> None:
    """Multiples of 16, ones and others, in either order of memory: a kernel per head size and operator, no more."""
    head_sizes = 2
    for kernel, times in compiled("sizes").items():
        assert times == head_sizes * (1 + (kernel in TWICE)), kernel


def test_more_samples_than_the_second_axis_of_a_launch_may_have() -> None:
    for kernel, grids in compiled("large_batch").items():
        for grid in grids:
            assert grid[0] >= 70_000, kernel
            assert all(extent <= 65_535 for extent in grid[1:]), kernel


def test_wide_loads_are_of_aligned_rows_alone() -> None:
    """The first 8 of 9 channels are 16 bytes in half types, but begin anywhere."""
    loads = compiled("loads")
    assert loads["aligned"] > 0
    assert loads["cut"] == 0


def test_compactness_costs_nothing_where_there_is_none() -> None:
    """Places are whole numbers in float32, which nothing else that belongs to pairs is."""
    for kernel, (without, with_it) in ((k, tuple(found.values())) for k, found in compiled("compactness").items()):
        assert without[1] <= 2, kernel
        if kernel != "group_deltas":
            assert with_it[1] > without[1], kernel
            # Of all instructions, in kernels whose tiles are the smallest: what belongs to tiles weighs most there.
            assert with_it[0] < 1.2 * without[0], kernel
