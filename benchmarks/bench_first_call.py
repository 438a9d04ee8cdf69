"""What a process pays before its first result, by "auto": the engines' checks, and so compilation, are in it.

``pytest benchmarks/bench_first_call.py``: with and without kernels that an earlier process kept on disk.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from entries import DEVICE
from harness import Recorder

FIRST = """
import time, torch
torch.set_num_threads(1)
from spatial_grouping_attention import Neighbourhood
from spatial_grouping_attention.functional import grouping_attention
q, k = (torch.randn(1, 1, n, 8, requires_grad={gradients}) for n in (4, 8))
start, worked = time.perf_counter(), time.process_time()
out = grouping_attention(q, k, k, Neighbourhood((8,), (4,), 2, 3, 1, 3))[0]
if {gradients}:
    out.sum().backward()
print(time.perf_counter() - start, time.process_time() - worked)
"""


@pytest.mark.skipif(DEVICE == "cuda", reason="about kernels for a CPU")
@pytest.mark.parametrize("gradients", [False, True])
def test_first_call(gradients: bool, recorder: Recorder, tmp_path: Path) -> None:
    way = "forward + backward" if gradients else "forward"
    for kept in ("no kernels kept",) if recorder.quick else ("no kernels kept", "kernels kept"):
        command = [sys.executable, "-c", FIRST.format(gradients=gradients)]
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        wall, worked = map(float, done.stdout.split())
        if not recorder.quick:
            info = {"way": way, "wall_seconds": wall, "yardstick": True, "note": ""}
            recorder.keep(f"first call, {way}", f"{way}, {kept}", [worked], 1, info)
