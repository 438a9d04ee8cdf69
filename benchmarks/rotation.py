"""How fast rotation is, beside a plain copy and beside other libraries.

    python benchmarks/rotation.py [--json FILE] [--threads N] [--rounds N]

Every contender rotates one float32 tensor (batch 1, 16384 tokens, 12 heads of 64 channels) by cosines and sines it is
given in its own form. First each must agree with a float64 oracle. Then they run in turn, in one process, each sample
at least 100 ms long; a round's times are divided by that round's time of copying the tensor, so whatever slows the
machine down slows both. The table gives the median ratio with its quartiles, and the most memory held at one time
beyond the arguments, in multiples of the tensor.

timm and rotary-embedding-torch take part when they are installed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from RoSE import __version__
from RoSE.functional import cos_sin, rotate
from torch import Tensor

SHAPE = (1, 16384, 12, 64)
TARGETS = {
    "RoSE, interleaved": 1.3,
    "RoSE, half": 2.0,
    "RoSE, interleaved, torch.compile": 1.3,
    "RoSE, half, torch.compile": 1.3,
}


def naive_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The textbook expression for the half layout, with tables as wide as x."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def naive_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The textbook expression for neighbouring channels, with tables as wide as x."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack((-second, first), dim=-1).flatten(-2) * sin


def optional(name: str) -> ModuleType | None:
    """A peer library, or None."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError:
            return None


def contenders(x: Tensor, angles: Tensor) -> dict[str, tuple[Callable[[], Tensor], bool]]:
    """Name, call and layout (interleaved or not) of everything that takes part."""
    cos, sin = cos_sin(angles)
    wide_half = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    wide_next = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
    compiled_rotate = torch.compile(rotate, fullgraph=True)
    compiled_half = torch.compile(naive_half, fullgraph=True)
    compiled_next = torch.compile(naive_interleaved, fullgraph=True)
    calls: dict[str, tuple[Callable[[], Tensor], bool]] = {
        "RoSE, interleaved": (lambda: rotate(x, cos, sin), True),
        "RoSE, half": (lambda: rotate(x, cos, sin, interleaved=False), False),
        "RoSE, interleaved, torch.compile": (lambda: compiled_rotate(x, cos, sin), True),
        "RoSE, half, torch.compile": (lambda: compiled_rotate(x, cos, sin, interleaved=False), False),
        "naive, interleaved": (lambda: naive_interleaved(x, *wide_next), True),
        "naive, half": (lambda: naive_half(x, *wide_half), False),
        "naive, interleaved, torch.compile": (lambda: compiled_next(x, *wide_next), True),
        "naive, half, torch.compile": (lambda: compiled_half(x, *wide_half), False),
    }
    if timm := timm_layers():
        table_next, table_half = (torch.cat((w[1], w[0]), -1) for w in (wide_next, wide_half))
        calls["timm, interleaved"] = (lambda: timm.apply_rot_embed_cat(x, table_next), True)
        calls["timm, half"] = (lambda: timm.apply_rot_embed_cat(x, table_half, half=True), False)
    if library := optional("rotary_embedding_torch"):
        # Takes angles and makes their cosines itself, at every call.
        wide_angles = angles.float().repeat_interleave(2, -1)
        calls["rotary-embedding-torch, interleaved"] = (lambda: library.apply_rotary_emb(wide_angles, x), True)
    return calls


def timm_layers() -> ModuleType | None:
    """``timm.layers``; beside a CPU-only torch, with the operator schemas that its import looks for."""
    try:
        importlib.import_module("torchvision.extension")
    except ImportError:
        return None
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        KEPT.append(library)
    return optional("timm.layers")


KEPT: list[torch.library.Library] = []  # a schema lives as long as its library object


def oracle(x: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """The rotation in complex float64."""
    pairs = x.double().unflatten(-1, (-1, 2)) if interleaved else x.double().unflatten(-1, (2, -1)).transpose(-1, -2)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)
    out = torch.view_as_real(turned)
    return (out if interleaved else out.transpose(-1, -2)).flatten(-2)


def peak(call: Callable[[], Tensor]) -> int:
    """Most bytes held at one time by one call."""
    with torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profile:
        call()
    held = highest = 0
    moves = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(moves, key=lambda e: e.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Time of one call, averaged over a sample."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def measure(x: Tensor, calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Ratios to a copy, round by round."""
    everything = {"copy": x.clone} | calls
    repeats = {}
    for name, call in everything.items():
        call()
        repeats[name] = max(1, round(0.12 / min(seconds(call, 1) for _ in range(3))))
    ratios: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            # A copy right before and right after, so that a change of the machine's pace shows in both.
            before = seconds(x.clone, repeats["copy"])
            taken = seconds(call, repeats[name])
            after = seconds(x.clone, repeats["copy"])
            ratios[name].append(taken / ((before + after) / 2))
    return ratios


def training(x: Tensor, angles: Tensor) -> dict[str, Callable[[], object]]:
    """Forward and backward, with the gradient for x alone and for the angles too."""
    cos, sin = cos_sin(angles)
    weight = torch.randn_like(x)
    wide = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)

    def step(turn: Callable[..., Tensor], tables: tuple[Tensor, Tensor], learn: bool) -> object:
        leaf = x.detach().requires_grad_()
        given = [t.detach().requires_grad_(learn) for t in tables]
        return torch.autograd.grad(turn(leaf, *given), [leaf, *(given if learn else [])], weight)

    return {
        "RoSE, interleaved, forward + backward to x": lambda: step(rotate, (cos, sin), False),
        "RoSE, interleaved, forward + backward to x and angles": lambda: step(rotate, (cos, sin), True),
        "naive, half, forward + backward to x": lambda: step(naive_half, wide, False),
        "naive, half, forward + backward to x and angles": lambda: step(naive_half, wide, True),
    }


def main() -> None:
    """Check, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    x, angles = torch.randn(SHAPE), torch.randn(SHAPE[1], SHAPE[2], SHAPE[3] // 2, dtype=torch.float64)

    calls = contenders(x, angles)
    exact = {interleaved: oracle(x, angles, interleaved) for interleaved in (True, False)}
    for name, (call, interleaved) in calls.items():
        torch.testing.assert_close(
            call().double(), exact[interleaved], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    print(f"all {len(calls)} agree with the float64 oracle; threads: {options.threads}\n")
    del exact

    timed = {name: call for name, (call, _) in calls.items()} | training(x, angles)
    memory = {name: peak(call) / x.nbytes for name, call in timed.items()}
    ratios = measure(x, timed, options.rounds)
    rows = []
    for name, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4)
        rows.append(
            {"name": name, "ratio": middle, "q1": low, "q3": high, "memory": memory[name], "target": TARGETS.get(name)}
        )
    print(f"{'':56}{'time / copy':>12}{'quartiles':>16}{'memory / x':>12}{'target':>8}")
    for row in rows:
        quartiles = f"{row['q1']:.2f}-{row['q3']:.2f}"
        target = f"{row['target']:.1f}" if row["target"] else ""
        print(f"{row['name']:56}{row['ratio']:12.2f}{quartiles:>16}{row['memory']:12.2f}{target:>8}")
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, **surroundings(options.threads)}, indent=1) + "\n")


def surroundings(threads: int) -> dict[str, object]:
    """What the figures depend on."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "shape": SHAPE,
        "threads": threads,
        "machine": platform.machine(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rose": __version__,
        "commit": commit,
    }


if __name__ == "__main__":
    main()
