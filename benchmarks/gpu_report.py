"""What the GPU kernels are worth: correctness first, then every kernel against its bound and its peers.

    PYTHONPATH=packages/rotary-spatial-embeddings/src:packages/spatial-grouping-attention/src \
        python benchmarks/gpu_report.py [--json FILE] [--seconds 420]

Runs from a plain checkout with the torch and triton that are there; nothing is downloaded. Fails without a CUDA
device. Kernels that disagree with float64 are listed and not timed, and the report fails at its end. Peers that cannot
be imported or cannot run are named with the reason, never left out in silence. ``--seconds`` count from the end of
comparing and compiling, which several processes share; what does not fit into them is listed as skipped. The file is
written after every section, so that whatever happens, what was measured is there.

With TRITON_INTERPRET=1 and without a CUDA device the same runs from end to end in triton's interpreter on tiny grids:
its figures mean nothing, but a report that runs there will not be found broken where a GPU is.

A *bound* is the time in which the bytes that must move, every operand read once and every result written once, move
at the copy speed measured here. Times are medians of triton's ``do_bench`` (second-level cache flushed between
calls) and include what the host needs to launch; the column "graph" is the same call replayed from a CUDA graph, with
the same cold cache, which is the GPU's own share.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_report_cases as cases
import torch
import torch._functorch.config
from gpu_report_correctness import correctness, memory
from gpu_report_timing import DEVICE, Report, in_workers, said


def environment() -> dict[str, Any]:
    import triton

    folder = Path(__file__).parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=folder, check=False
    )
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "triton's interpreter",
        "capability": torch.cuda.get_device_capability() if DEVICE == "cuda" else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "commit": commit.stdout.strip() or None,
    }
    print(*(f"{key}: {value}" for key, value in found.items()), sep="\n")
    return found


def checked(report: Report) -> dict[str, Any]:
    """Correctness; what is wrong is not timed."""
    found = correctness()
    report.wrong |= set(found["wrong"])
    return found


def compiled_ahead() -> dict[str, Any]:
    """Seconds that each operator's kernels took to compile, in parallel."""
    tasks = [(title, name) for title in cases.grouping_cases() for name in ("grouping_attention", "assign")]
    seconds = in_workers(cases.compile_ahead, tasks, said)
    return {f"{name}, {title}": taken for (title, name), taken in zip(tasks, seconds, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--seconds", type=float, default=420.0, help="start no measurement this long after the checks")
    arguments = parser.parse_args()
    if (os.environ.get("TRITON_INTERPRET") == "1") == (DEVICE == "cuda"):
        sys.exit(
            "gpu_report.py measures GPU kernels: it needs a CUDA device without TRITON_INTERPRET, or no CUDA device "
            "and TRITON_INTERPRET=1 to go through it with tiny sizes. Nothing was run."
        )
    torch.manual_seed(0)
    # Backward passes are repeated on one graph, which buffers that compiled code gives away do not survive.
    torch._functorch.config.donated_buffer = False
    report = Report(arguments.seconds, arguments.json)
    parts: dict[str, Any] = {
        "environment": environment,
        "first_call_seconds": cases.first_calls,
        "correctness": functools.partial(checked, report),
        "compiled_ahead_seconds": compiled_ahead,
        "bytes_beyond_operands": memory,
    }
    for name, part in parts.items():
        report.guarded(name, part)
    report.start_clock()
    report.guarded("rates", functools.partial(cases.machine_rates, report))
    report.guarded("rotation", functools.partial(cases.rotation, report))
    for title in cases.grouping_cases():
        report.guarded(title, functools.partial(cases.grouping, report, title))
    report.guarded("dense grouping", functools.partial(cases.dense_grouping, report))
    failed = [name for name, value in report.result.items() if isinstance(value, dict) and "failed" in value]
    if report.wrong or failed:
        sys.exit(f"disagree with float64: {sorted(report.wrong) or 'none'}; failed: {failed or 'none'}")


if __name__ == "__main__":
    main()
