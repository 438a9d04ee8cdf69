"""What the compiler makes of the rotation kernels, for a GPU that is not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.triton


def test_tokens_samples_heads_and_strides_compile_nothing_again() -> None:
    """Multiples of 16, ones and others, in either order of memory: a kernel per head size and source of angles."""
    script = Path(__file__).with_name("compile_rotations.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, check=True)
    found = json.loads(run.stdout)
    head_sizes, sources = 2, 2
    assert found["times"] == dict.fromkeys(("rotate_forward", "rotate_backward"), head_sizes * sources)
    for kernel, wide in found["wide"].items():
        assert wide > 0, f"{kernel} moves aligned rows in narrow pieces"
