"""What is read off a call besides its result: seconds, bytes, operations; and the machine's own rates."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from entries import DEVICE
from torch.utils.flop_counter import FlopCounterMode

# A sample shorter than this says more about the scheduler than about the code; a GPU has none.
SAMPLE_SECONDS = 0.1 if DEVICE == "cpu" else 0.03

# More than the caches of a CPU or a GPU hold; a product that is bound by arithmetic.
COPIED_BYTES = 2**26 if DEVICE == "cpu" else 2**30
PRODUCT_WIDTH = 768 if DEVICE == "cpu" else 8192

PAGES_KEPT = False  # until keep_pages has said otherwise

LIBRARIES = (
    "torch", "numpy", "numba", "triton", "natten", "timm", "monai", "rotary-embedding-torch", "x-transformers",
    "liger-kernel", "rotary-spatial-embeddings", "spatial-grouping-attention", "pytest-benchmark",
)  # fmt: skip


def clock() -> float:
    """Seconds.

    One thread of a CPU is measured in processor time, which leaves out what a machine does for others.
    """
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class Call:
    """A call of this process."""

    slow = False
    """Whether a single call is known to make a sample."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.run = run

    def sample(self, repeats: int) -> float:
        """Seconds that so many calls take."""
        start = clock()
        for _ in range(repeats):
            self.run()
        return clock() - start

    def peak_bytes(self) -> int:
        """Most bytes held at one time beyond what is held before."""
        return _peak_on_cuda(self.run) if DEVICE == "cuda" else _peak_on_cpu(self.run)

    def flops(self) -> int:
        """Floating-point operations of products that torch's counter knows."""
        counter = FlopCounterMode(display=False)
        # Which module an operation belongs to is not asked; finding out takes hooks that autograd.grad refuses.
        counter.mod_tracker = _NoModules()  # type: ignore[assignment]
        with counter:
            self.run()
        return int(counter.get_total_flops())


class _NoModules(contextlib.nullcontext[None]):
    parents = ("Global",)


def _peak_on_cuda(run: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_on_cpu(run: Callable[[], Any]) -> int:
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile:
        run()
    held = highest = 0
    moves = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(moves, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def keep_pages() -> bool:
    """Have glibc keep the memory that is freed; whether it does.

    It gives blocks of 32 MB and more back at once, and the system then maps them anew, page by page. On a virtual
    machine that takes several times as long as the arithmetic that is to be measured, and not the same from one minute
    to the next.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    wanted = ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**26))
    return all(mallopt(option, value) == 1 for option, value in wanted)


def repeats_for(call: Call) -> int:
    """How often a call is repeated in a sample; the call has run before."""
    if call.slow:
        return 1
    return max(1, round(SAMPLE_SECONDS / max(call.sample(1), 1e-7)))


class Rates:
    """Copy speed and speed of float32 products, measured in turn with the entries they set bounds for."""

    def __init__(self) -> None:
        source = torch.zeros(COPIED_BYTES // 4, device=DEVICE)
        target = torch.zeros_like(source)
        a, out = torch.randn(2, PRODUCT_WIDTH, PRODUCT_WIDTH, device=DEVICE)
        self.calls = {
            "copy": Call(lambda: target.copy_(source)),
            "product": Call(lambda: torch.mm(a, a, out=out)),
        }
        for call in self.calls.values():
            call.slow = True  # one call a round: a bound needs no more digits

    @staticmethod
    def per_second(copy_seconds: float, product_seconds: float) -> dict[str, float]:
        """Bytes, read plus written, and operations."""
        return {
            "copied_bytes_per_second": 2 * COPIED_BYTES / copy_seconds,
            "product_flops_per_second": 2 * PRODUCT_WIDTH**3 / product_seconds,
        }


def machine() -> dict[str, Any]:
    """What figures depend on; nothing that names the machine."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    import RoSE
    import spatial_grouping_attention

    versions |= {
        "rotary-spatial-embeddings": RoSE.__version__,
        "spatial-grouping-attention": spatial_grouping_attention.__version__,
    }
    return {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "pages kept": PAGES_KEPT,
        "python": platform.python_version(),
        "system": platform.system(),
        "versions": versions,
    }


def _processor() -> str:
    """The processor's own name, where the system tells it."""
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else 'CPU'}, {platform.machine()}"
