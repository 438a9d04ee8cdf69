"""How gpu_report.py measures: one side stream, every contender on its own, results written as they come."""

from __future__ import annotations

import functools
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Call = Callable[[], Any]

# Where everything runs; the interpreter takes a CPU's tensors, and sizes that it can work through.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TINY = DEVICE == "cpu"

# More than any second-level cache holds.
FLUSHED_BYTES = 2**28

GRAPH_REPLAYS = 40

# Processes that compile: each has a context of its own on the GPU.
MOST_WORKERS = 14

T = TypeVar("T")


class Contender(NamedTuple):
    """Something to time."""

    make: Callable[[], Call]
    """Makes the call; may fail, as may the call."""
    engine: str | None = None
    """Whose results must have agreed with float64; None for what is not ours."""


class Report:
    """Measurements as they come in, the clock they run against, and the file they are kept in."""

    def __init__(self, seconds: float, path: Path | None) -> None:
        self.seconds = seconds
        self.path = path
        self.deadline = math.inf
        self.bandwidth = math.nan
        self.wrong: set[str] = set()
        self.result: dict[str, Any] = {"measurements": {}}

    def start_clock(self) -> None:
        """From here on the time counts: what comes before must be done however long it takes."""
        self.deadline = time.monotonic() + self.seconds

    def keep(self, name: str, value: Any) -> None:
        """One more part of the result, on disk at once."""
        self.result[name] = value
        self.save()

    def save(self) -> None:
        """Write what there is; whoever reads meanwhile sees the last state or this one."""
        if self.path is not None:
            draft = self.path.with_suffix(".part")
            draft.write_text(json.dumps(self.result, indent=1, default=str) + "\n")
            draft.replace(self.path)

    def guarded(self, name: str, part: Callable[[], Any]) -> None:
        """Run a part whose failure must not take the others with it; what it returns is kept under its name."""
        try:
            value = part()
        except Exception as error:
            value = {"failed": said(error)}
            print(f"\n{name} failed: {said(error)}")
        if value is not None:
            self.keep(name, value)

    def section(self, title: str, moved_bytes: int | None, contenders: dict[str, Contender]) -> dict[str, Any]:
        """Time contenders and return their rows; ``moved_bytes`` sets the bound, None for none."""
        bound = None if moved_bytes is None else moved_bytes / self.bandwidth
        rows: dict[str, Any] = {} if bound is None else {"bound": {"median": bound}}
        self.result["measurements"][title] = rows
        print(f"\n{title}" + ("" if bound is None else f"   (bound {1e3 * bound:.3f} ms)"))
        for name, contender in contenders.items():
            rows[name] = self._row(contender)
            print(f"  {name:44s} {_line(rows[name], bound)}", flush=True)
        self.save()
        return rows

    def _row(self, contender: Contender) -> dict[str, Any]:
        if time.monotonic() > self.deadline:
            return {"skipped": "out of time"}
        if contender.engine in self.wrong:
            return {"skipped": "its results disagree with float64"}
        # A compiler that has met one shape would take another for a reason to look for a general form.
        torch._dynamo.reset()
        try:
            return measure(contender.make)
        except Exception as error:
            return {"skipped": said(error)}
        finally:
            if DEVICE == "cuda":
                torch.cuda.empty_cache()


def in_workers(function: Callable[[Any], T], tasks: list[Any], failed: Callable[[Exception], T]) -> list[T]:
    """Results of a module's function in several processes; one that dies costs what it had to do, not the report."""
    if TINY:
        return [_attempted(functools.partial(function, task), failed) for task in tasks]
    workers = max(1, min(MOST_WORKERS, (os.cpu_count() or 1) - 1))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(function, task) for task in tasks]
        return [_attempted(future.result, failed) for future in futures]


def _attempted(call: Callable[[], T], failed: Callable[[Exception], T]) -> T:
    try:
        return call()
    except Exception as error:
        return failed(error)


def said(error: Exception) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _line(row: dict[str, Any], bound: float | None) -> str:
    if "skipped" in row:
        return str(row["skipped"])
    graph = f"{1e3 * row['graph']:9.3f}" if isinstance(row["graph"], float) else "        -"
    times = f"{1e3 * row['median']:9.3f} ms {graph} graph"
    return times if bound is None else f"{times}  {row['median'] / bound:7.2f} x bound"


def measure(make: Callable[[], Call]) -> dict[str, Any]:
    """Seconds per call: median and quartiles as launched from Python, and replayed from a CUDA graph.

    Making, warming and capturing share a stream: a backward pass runs on the stream of its forward pass, and a
    capture that meets another stream fails.
    """
    if DEVICE == "cpu":
        return _once(make())
    from triton import testing

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call = make()
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        low, median, high = testing.do_bench(call, warmup=20, rep=120, quantiles=[0.25, 0.5, 0.75])
        row = {"median": 1e-3 * median, "q1": 1e-3 * low, "q3": 1e-3 * high, "graph": None}
        try:
            row["graph"] = _replayed(call, stream)
        except Exception as error:  # the other figures stand
            row["not_captured"] = said(error)
    torch.cuda.synchronize()
    return row


def _once(call: Call) -> dict[str, Any]:
    """Without a GPU: that the call can be made, twice."""
    call()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    return {"median": seconds, "q1": seconds, "q3": seconds, "graph": None}


def _replayed(call: Call, stream: torch.cuda.Stream) -> float:
    """Median seconds of a call replayed from a graph, with a cold second-level cache."""
    # What synchronises cannot be captured. Found out before: a failed capture leaves the allocator in a bad state.
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(GRAPH_REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Long enough for the host to have everything else queued before it ends.
        flushed.zero_()
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e-3 * start.elapsed_time(end))
    return statistics.median(times)


def size_of(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def backward_of(function: Callable[..., Any], leaves: list[Tensor]) -> Call:
    """The backward pass alone, of a forward pass that is run once."""
    results = [x for x in function(*leaves) if x.requires_grad]
    grads = [torch.randn_like(x) for x in results]
    return lambda: torch.autograd.grad(results, leaves, grads, retain_graph=True)


def forward_of(function: Callable[..., Any], leaves: list[Tensor]) -> Call:
    detached = [x.detach() for x in leaves]

    def call() -> Any:
        with torch.no_grad():
            return function(*detached)

    return call


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def leaves_of(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    """Random leaves, the same every time."""
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    return [torch.randn(s, generator=generator, device=DEVICE).to(dtype).requires_grad_() for s in shapes]
