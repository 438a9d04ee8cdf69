"""Peak memory of the two largest examples that users know, forward and backward, each in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from seed_examples import MEASURED, PROMISES

PROGRAM = """
import json, resource, sys
import torch
from seed_examples import PROMISES, run_block

def peak():
    if sys.platform == "linux":
        # Not ru_maxrss, which a process on Linux inherits from the one that started it.
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

torch.set_num_threads(1)
title = sys.argv[1]
before = peak()
names = run_block(title)
(output,) = (names[name] for name in PROMISES[title][1])
output.x_out.square().sum().backward()
layer = next(value for value in names.values() if isinstance(value, torch.nn.Module))
assert layer.q_proj.weight.grad.isfinite().all()
print(json.dumps({"bytes": peak() - before}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("title", MEASURED)
def test_peak_memory(title: str) -> None:
    paths = [str(Path(__file__).parent), *sys.path]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, title],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *printed, measured = done.stdout.splitlines()
    assert printed == PROMISES[title][0]
    gigabytes = json.loads(measured)["bytes"] / 1e9
    # The tokens and their keys alone are larger than a tenth of this: less would mean that nothing was measured.
    assert 0.05 < gigabytes < MEASURED[title], f"{gigabytes:.2f} GB of extra memory"
