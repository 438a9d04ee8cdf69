"""What a step of training costs on a GPU: whole networks beside their twins, Swin-T and SwinUNETR.

    PYTHONPATH=packages/rotary-spatial-embeddings/src:packages/spatial-grouping-attention/src \
        python benchmarks/gpu_networks.py [--json FILE] [--seconds 240]

Forward pass, and gradients to all parameters: in float32, where matrix products are not rounded to TF32, and with
autocast to bfloat16; from Python, and replayed from a CUDA graph, which is the GPU's own share; and which kernels take
most of it. Several processes compile first. ``--seconds`` count from then on; what does not fit into them is listed as
skipped. What a network computes is held to float64 by ``bench_backbones.py``; here its logits by autocast are compared
with those in float32. Without a GPU all of it runs on tiny images, and figures mean nothing.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_backbones import CLASSES, result_of, swin_tiny, swin_unetr
from gpu_report import environment
from gpu_report_cases import launching_every_plan
from gpu_report_timing import DEVICE, TINY, Call, Contender, Report, in_workers, said, synchronize
from spatial_grouping_attention.models import grouping_vit_nano, grouping_vit_tiny
from torch import Tensor, nn

LARGEST = 20
"""Kernels that are kept by name."""

PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}


class Networks(NamedTuple):
    """What is trained on images of one size."""

    size: tuple[int, ...]
    """Channels, and pixels along every axis."""
    batches: tuple[int, ...]
    """Images of a step: few, and as many as make the GPU work."""
    made: dict[str, Callable[[], nn.Module]]
    """Networks by name, with random weights."""


def cases() -> dict[str, Networks]:
    def segmenting(ndim: int) -> dict[str, Callable[[], nn.Module]]:
        return {
            "grouping_vit_nano": lambda: grouping_vit_nano(ndim, 1, CLASSES),
            "its twin": lambda: grouping_vit_nano(ndim, 1, CLASSES, downsample="conv"),
            "MONAI SwinUNETR, 24 channels": lambda: swin_unetr(ndim, 24),
        }

    if TINY:
        return {"segmentation, 64 x 64": Networks((1, 64, 64), (1,), segmenting(2))}
    backbones = {
        "grouping_vit_tiny": grouping_vit_tiny,
        "its twin": lambda: grouping_vit_tiny(downsample="conv"),
        "timm Swin-T": swin_tiny,
    }
    return {
        "backbones, 224 x 224": Networks((3, 224, 224), (1, 32), backbones),
        "segmentation, 256 x 256": Networks((1, 256, 256), (2, 16), segmenting(2)),
        "segmentation, 96 x 96 x 64": Networks((1, 96, 96, 64), (1, 2), segmenting(3)),
    }


def step(case: Networks, name: str, batch: int, precision: str) -> Call:
    """A step of training without its optimiser."""
    torch.manual_seed(0)
    network = case.made[name]().eval().to(DEVICE)  # without dropout, so that calls can be compared
    image = torch.randn(batch, *case.size, device=DEVICE)
    leaves = list(network.parameters())
    with torch.no_grad():
        gradient = torch.randn_like(logits_of(network, image, precision))

    def call() -> Any:
        logits = logits_of(network, image, precision)
        return torch.autograd.grad(logits, leaves, gradient, allow_unused=True)

    return call


def logits_of(network: nn.Module, image: Tensor, precision: str) -> Tensor:
    # Weights that autocast has converted are kept until it ends: not beyond a capture.
    with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
        return result_of(network, image)


def compile_ahead(task: tuple[str, str, str]) -> str | None:
    """Have all that a step launches in triton's cache; for other processes than the one that measures."""
    title, name, precision = task
    case = cases()[title]
    with launching_every_plan():
        step(case, name, case.batches[0], precision)()
        synchronize()
    return None


def facts_of(make: Callable[[], Call]) -> dict[str, Any]:
    """Bytes that a step takes beyond weights and image, its launches, and the kernels that take most of its time."""
    call = make()
    call()
    synchronize()
    if DEVICE == "cpu":
        return {}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        synchronize()
    launched = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    spent: Counter[str] = Counter()
    for event in launched:
        spent[event.name] += event.device_time  # in microseconds
    largest = {name: 1e-6 * time for name, time in spent.most_common(LARGEST)}
    return {"peak_bytes": peak, "launches": len(launched), "kernel_seconds": 1e-6 * spent.total(), "largest": largest}


def differences(case: Networks) -> dict[str, Any]:
    """Of the logits by autocast from those in float32, relative to these, in the Euclidean norm."""
    found: dict[str, Any] = {}
    for name, make in case.made.items():
        try:
            torch.manual_seed(0)
            network, image = make().eval().to(DEVICE), torch.randn(case.batches[0], *case.size, device=DEVICE)
            with torch.no_grad():
                exact, rounded = (logits_of(network, image, precision).float() for precision in PRECISIONS)
            found[name] = float((rounded - exact).norm() / exact.norm())
        except Exception as error:
            found[name] = said(error)
    return found


def measure_case(report: Report, title: str) -> None:
    """Every network, batch and precision of a case."""
    case = cases()[title]
    report.keep(f"autocast from float32, {title}", differences(case))
    for batch, precision in itertools.product(case.batches, PRECISIONS):
        makes = {name: functools.partial(step, case, name, batch, precision) for name in case.made}
        contenders = {name: Contender(make) for name, make in makes.items()}
        rows = report.section(f"{title}, {batch} images, {precision}", None, contenders)
        for name, row in rows.items():
            if "median" in row:
                row |= facts_of(makes[name])
    report.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--seconds", type=float, default=240.0, help="start no measurement this long after compiling")
    arguments = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False
    report = Report(arguments.seconds, arguments.json)
    report.guarded("environment", environment)
    tasks = [(title, name, p) for title, case in cases().items() for name in case.made for p in PRECISIONS]
    failed = dict(zip(map(str, tasks), in_workers(compile_ahead, tasks, said), strict=True))
    report.keep("failed to compile ahead", {task: reason for task, reason in failed.items() if reason})
    report.start_clock()
    for title in cases():
        report.guarded(title, functools.partial(measure_case, report, title))


if __name__ == "__main__":
    main()
