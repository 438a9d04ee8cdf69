"""The first part of gpu_report.py: every kernel against float64, in several processes.

Most of the time goes into compiling, so work is shared among processes, and every class of calls gets one plan, picked
by a hash of its key: over all classes each candidate is met.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from gpu_report_timing import DEVICE, TINY, in_workers, leaves_of, said
from RoSE import functional as rose
from RoSE.rotation import rotate_plain
from torch import Tensor

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


class Check(NamedTuple):
    """One comparison, in words that travel between processes."""

    engine: str
    operator: str
    title: str
    size: int
    dtype: torch.dtype

    def __str__(self) -> str:
        """What is printed where it fails."""
        return f"{self.engine}, {self.operator}, {self.title}, size {self.size}, {self.dtype}"


def relations() -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Geometries, and the head sizes they are met with."""
    from spatial_grouping_attention import Neighbourhood

    if TINY:
        return {"2-D": (Neighbourhood((5, 7), (3, 4), 2, 3, 1, 3), (8,))}
    return {
        "1-D dilated": (Neighbourhood((301,), (75,), 4, 7, 1, 5, 2), (40,)),
        "2-D": (Neighbourhood((29, 37), (15, 19), 2, 3, 1, 3), (32, 128)),
        "3-D": (Neighbourhood((9, 10, 11), (5, 5, 6), 2, 3, 1, 3), (32,)),
    }


def every_check() -> list[Check]:
    checks = []
    for dtype in TOLERANCE:
        for operator in ("group", "assign"):
            for title, (_, sizes) in relations().items():
                checks += [Check("triton", operator, title, size, dtype) for size in sizes]
            checks += [Check("fused", operator, "dense", size, dtype) for size in (64, 40)]
        for layout in ("interleaved", "half"):
            checks += [Check("rotation", layout, origin, 64, dtype) for origin in ("0", "1e5")]
    return checks


def run(check: Check) -> tuple[float, float]:
    """Largest error and what is allowed."""
    if check.engine == "rotation":
        return check_rotation(check)
    return check_grouping(check)


def by_hash(key: Hashable, candidates: Callable[[], list[Any]], run: Callable[[Any], Any]) -> Any:
    """Stands in for the timing of plans."""
    plans = candidates()
    return run(plans[zlib.crc32(repr(key).encode()) % len(plans)])


def guarded(check: Check) -> tuple[float, float, str]:
    """The same, and what it failed with; in a worker or here."""
    from spatial_grouping_attention.backends.triton import launch

    try:
        with patch.object(launch, "choose", by_hash):
            return *run(check), ""
    except Exception as error:
        return math.inf, 0.0, said(error)


def correctness() -> dict[str, Any]:
    """Errors of every comparison, and the engines that must not be trusted."""
    checks = every_check()
    found = in_workers(guarded, checks, lambda error: (math.inf, 0.0, said(error)))
    errors = {str(check): result for check, result in zip(checks, found, strict=True)}
    wrong = {check.engine for check, (error, allowed, _) in zip(checks, found, strict=True) if not error <= allowed}
    for name, (error, allowed, failure) in errors.items():
        if not error <= allowed:
            print(f"  {name}: {failure or f'off by {error:.2e}, allowed {allowed:.0e}'}")
    print(f"correctness: {len(checks)} cases, wrong: {', '.join(sorted(wrong)) or 'none'}")
    return {"errors": errors, "wrong": sorted(wrong)}


def relative(got: Tensor, want: Tensor) -> float:
    """Largest difference, relative to the largest wanted value; infinities must agree."""
    got, want = got.detach().double(), want.detach().double()
    if not torch.equal(got.isinf(), want.isinf()) or bool(got.isnan().any()):
        return math.inf
    difference = (got - want).masked_fill(want.isinf(), 0.0).abs().max()
    return float(difference / want.masked_fill(want.isinf(), 0.0).abs().max().clamp(min=1e-3))


def both_ways(function: Callable[..., Any], leaves: list[Tensor]) -> list[Tensor]:
    """Results, and gradients of a fixed weighting of the finite ones."""
    results = [x for x in function(*leaves) if x is not None]
    generator = torch.Generator(device=DEVICE).manual_seed(1)
    total = torch.zeros((), device=DEVICE, dtype=torch.float64)
    for x in results:
        weight = torch.randn(x.shape, generator=generator, device=DEVICE)
        total = total + (x.masked_fill(x.isinf(), 0.0).double() * weight).sum()
    return [*results, *torch.autograd.grad(total, leaves)]


def operate(check: Check, backend: str, x: Any, leaves: list[Tensor]) -> Any:
    """An operator by a backend, of the operands ``x`` with other tensors."""
    from spatial_grouping_attention import backends

    q, k, values, *rest = leaves
    names = ("bias", "compactness")[: len(rest)]
    x = x._replace(q=q, k=k, values=values, **dict(zip(names, rest, strict=True)))
    return getattr(backends, check.operator)(x, backend)[:3]


def check_grouping(check: Check) -> tuple[float, float]:
    """An operator and its gradients against the matrix form in float64: windowed with everything, or dense."""
    from spatial_grouping_attention.backends import Operands

    relation = None if check.title == "dense" else relations()[check.title][0]
    number, inputs = (70, 500) if relation is None else (relation.num_groups, relation.num_inputs)
    groups, tokens = (2, 2, number, check.size), (2, 2, inputs, check.size)
    shapes: list[tuple[int, ...]] = [groups, tokens, tokens if check.operator == "group" else groups]
    leaves = leaves_of(shapes, check.dtype)
    masks = {}
    if relation is not None:
        bias, compactness = leaves_of([(2, *relation.window), (2,)], torch.float32)
        leaves += [bias, compactness.detach().abs().requires_grad_()]
        generator = torch.Generator(device=DEVICE).manual_seed(2)
        for name, size in (("valid", inputs), ("valid_groups", number)):
            masks[name] = torch.rand(2, size, device=DEVICE, generator=generator) < 0.8
    x = Operands(*leaves[:3], relation, check.size**-0.5, **masks)  # type: ignore[call-arg]
    wide = [tensor.detach().double().requires_grad_() for tensor in leaves]
    got = both_ways(lambda *given: operate(check, check.engine, x, list(given)), leaves)
    want = both_ways(lambda *given: operate(check, "reference", x, list(given)), wide)
    return max(relative(a, b) for a, b in zip(got, want, strict=True)), TOLERANCE[check.dtype]


def check_rotation(check: Check) -> tuple[float, float]:
    """Rotation by positions near and far from zero, all gradients, against float64."""
    from RoSE import kernels

    def turn(interleaved: bool, q: Tensor, k: Tensor, coordinates: Tensor, freqs: Tensor) -> Any:
        return kernels.rotate_positions(q, k, coordinates, freqs, num_prefix_tokens=3, interleaved=interleaved)

    def plain(interleaved: bool, q: Tensor, k: Tensor, coordinates: Tensor, freqs: Tensor) -> Any:
        cos, sin = rose.cos_sin(rose.phases(F.pad(coordinates, (0, 0, 3, 0)), freqs), torch.float64)
        cos, sin = cos.transpose(1, 2), sin.transpose(1, 2)
        return [rotate_plain(x, cos, sin, interleaved) for x in (q, k)]

    tokens, origin = 13 if TINY else 330, float(check.title)
    shape = (2, 4, tokens + 3, check.size)
    q, k = leaves_of([shape, shape], check.dtype)
    (freqs,) = leaves_of([(4, 24, 3)], torch.float32)
    coordinates = torch.rand(2, tokens, 3, device=DEVICE, dtype=torch.float64) * 50 + origin
    leaves = [q, k, coordinates.requires_grad_(), freqs]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    got = both_ways(functools.partial(turn, check.operator == "interleaved"), leaves)
    want = both_ways(functools.partial(plain, check.operator == "interleaved"), wide)
    # Angles of 1e5 radians are promised to 1e-4.
    allowed = max(TOLERANCE[check.dtype], 1e-4 if origin else 0.0)
    return max(relative(a, b) for a, b in zip(got, want, strict=True)), allowed


def memory() -> dict[str, Any] | None:
    """Bytes beyond the operands: nothing of tokens times groups may appear in dense or windowed grouping."""
    from spatial_grouping_attention import Neighbourhood
    from spatial_grouping_attention.functional import grouping_attention

    if DEVICE == "cpu":
        return None
    used: dict[str, Any] = {}
    relation = Neighbourhood((128, 128), (64, 64), 2, 3, 1, 3)
    leaves = leaves_of([(1, 8, 4096, 32), (1, 8, 16384, 32), (1, 8, 16384, 32)], torch.bfloat16)
    for backend, neighbourhood in (("fused", None), ("triton", relation)):
        for _ in range(2):  # the first call of a class tries its candidates
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            out, _ = grouping_attention(*leaves, neighbourhood, backend=backend)  # type: ignore[call-arg]
            torch.autograd.grad(out.sum(), leaves)
            used[backend] = torch.cuda.max_memory_allocated() - before
    matrix = 8 * 4096 * 16384 * 2
    used["as large as a matrix"] = [name for name, size in used.items() if size > matrix // 4]
    return used
