"""What gpu_report.py times: our kernels, beside what a user would take instead."""

from __future__ import annotations

import contextlib
import functools
import time
import warnings
from collections.abc import Callable, Hashable, Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from gpu_report_timing import (
    DEVICE,
    TINY,
    Contender,
    Report,
    backward_of,
    forward_of,
    leaves_of,
    measure,
    size_of,
    synchronize,
)
from RoSE import functional as rose
from RoSE.rotation import rotate_eager, rotate_plain
from torch import Tensor

# Without a GPU it matters that calls can be made, not what a compiler makes of them.
compiled: Callable[..., Any] = functools.partial(torch.compile, backend="eager" if TINY else "inductor")

WAYS = {"forward": forward_of, "backward": backward_of}


def machine_rates(report: Report) -> dict[str, float]:
    """Bytes per second of a copy (read plus written) and operations per second of a bfloat16 product."""
    source = torch.empty(2**12 if TINY else 2**29, dtype=torch.bfloat16, device=DEVICE)
    target = torch.empty_like(source)
    copy = measure(lambda: lambda: target.copy_(source))
    report.bandwidth = 2 * source.numel() * source.element_size() / copy["median"]
    width = 16 if TINY else 8192
    a = torch.randn(width, width, dtype=torch.bfloat16, device=DEVICE)
    product = measure(lambda: lambda: a @ a)
    rates = {"copy_bytes_per_second": report.bandwidth, "matmul_flops": 2 * width**3 / product["median"]}
    print(f"copy {report.bandwidth / 1e12:.2f} TB/s, bf16 product {rates['matmul_flops'] / 1e12:.0f} TFLOP/s")
    return rates


def first_calls() -> dict[str, float]:
    """Seconds of the very first call of a class, which compiles and times its candidates."""
    from RoSE import kernels
    from spatial_grouping_attention import Neighbourhood, functional

    n = 8 if TINY else 96
    relation = Neighbourhood((n, n), (n // 2, n // 2), 2, 3, 1, 3)
    shapes = [(1, 2, rows, 16) for rows in (relation.num_groups, relation.num_inputs, relation.num_inputs)]
    q, k, v = leaves_of(shapes, torch.float16)
    times = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        synchronize()
        times[name] = time.perf_counter() - start
        return result

    out = timed("grouping, forward", lambda: functional.grouping_attention(q, k, v, relation, backend="triton")[0])
    timed("grouping, backward", lambda: torch.autograd.grad(out.sum(), (q, k, v)))
    positions, freqs = torch.rand(relation.num_groups, 2, device=DEVICE), torch.rand(2, 7, 2, device=DEVICE)
    timed("rotation, forward", lambda: kernels.rotate_positions(q, None, positions, freqs))
    print("first calls:", *(f"{name} {seconds:.1f} s" for name, seconds in times.items()))
    return times


def rotation(report: Report) -> None:
    """q and k of 16384 tokens, 32 heads of 64 channels, bf16, token-major as projections leave them."""
    from RoSE import kernels

    side, heads = (4, 2) if TINY else (128, 32)
    q, k = (token_major(1, heads, side**2, 64) for _ in range(2))
    axis = torch.arange(float(side), device=DEVICE)
    coordinates = torch.cartesian_prod(axis, axis)
    freqs = torch.randn(heads, 32, 2, device=DEVICE).requires_grad_()

    def fused(interleaved: bool) -> Callable[..., Any]:
        return lambda q, k, freqs: kernels.rotate_positions(q, k, coordinates, freqs, interleaved=interleaved)

    def plain(turn: Callable[..., Tensor], q: Tensor, k: Tensor, freqs: Tensor) -> Any:
        cos, sin = rose.cos_sin(rose.phases(coordinates, freqs))
        cos, sin = cos.transpose(0, 1), sin.transpose(0, 1)
        return turn(q, cos, sin, True), turn(k, cos, sin, True)

    forms: dict[str, tuple[Callable[[], Callable[..., Any]], str | None]] = {
        "kernel, interleaved": (lambda: fused(True), "rotation"),
        "kernel, half": (lambda: fused(False), "rotation"),
        "plain, torch.compile": (lambda: compiled(functools.partial(plain, rotate_plain), fullgraph=True), None),
        "plain": (lambda: functools.partial(plain, rotate_eager), None),
    }
    for way, make in WAYS.items():
        learned = f"{way}, frequencies learned" if way == "backward" else way
        report.section(
            f"rotation of q and k, {learned}",
            (3 if way == "backward" else 2) * size_of(q, k),
            {name: _contender(make, form, [q, k, freqs], engine) for name, (form, engine) in forms.items()},
        )
    _given_rotation(report, q, k, coordinates, freqs)


def _given_rotation(report: Report, q: Tensor, k: Tensor, coordinates: Tensor, freqs: Tensor) -> None:
    """The same by tables of cosines and sines."""
    from RoSE import kernels

    with torch.no_grad():
        cos, sin = (x.transpose(0, 1).contiguous() for x in rose.cos_sin(rose.phases(coordinates, freqs)))

    def given(rotate: Callable[..., Tensor], *layout: bool) -> Callable[..., Any]:
        return lambda q, k: (rotate(q, cos, sin, *layout), rotate(k, cos, sin, *layout))

    def timm_form() -> Callable[..., Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from timm.layers import apply_rot_embed_cat
        table = torch.cat((sin[0].repeat_interleave(2, -1), cos[0].repeat_interleave(2, -1)), -1).to(torch.bfloat16)
        return lambda q, k: (apply_rot_embed_cat(q, table), apply_rot_embed_cat(k, table))

    forms: dict[str, tuple[Callable[[], Callable[..., Any]], str | None]] = {
        "kernel": (lambda: given(kernels.rotate), "rotation"),
        "plain, torch.compile": (lambda: compiled(given(rotate_plain, True), fullgraph=True), None),
        "plain": (lambda: given(rotate_eager, True), None),
        "timm, one table for all heads": (timm_form, None),
        "timm, torch.compile": (lambda: compiled(timm_form()), None),
    }
    for way, make in WAYS.items():
        contenders = {name: _contender(make, form, [q, k], engine) for name, (form, engine) in forms.items()}
        # The bound is that of cosines and sines of every head; timm's one table for all of them may beat it.
        moved = 2 * size_of(q, k) + size_of(cos, sin)
        report.section(f"rotation of q and k by given cosines, {way}", moved, contenders)


def _contender(
    make: Callable[..., Any], form: Callable[[], Callable[..., Any]], leaves: list[Tensor], engine: str | None = None
) -> Contender:
    """A form of an operation, forward or backward."""
    return Contender(lambda: make(form(), leaves), engine)


def flex_form(relation: Any) -> Callable[..., Any]:
    """Grouping composed of two FlexAttention calls: tokens to groups for the normalisers, groups to tokens for the
    averages."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    _, width = relation.input_shape
    height_out, width_out = relation.output_shape
    row, column = relation.axes

    def sees(token: Tensor, group: Tensor) -> Tensor:
        cell_row = ((token // width - row.offset) // row.stride).clamp(0, height_out - 1)
        cell_column = ((token % width - column.offset) // column.stride).clamp(0, width_out - 1)
        near_row = (cell_row - group // width_out).abs() <= row.reach
        return near_row & ((cell_column - group % width_out).abs() <= column.reach)

    sizes = relation.num_inputs, relation.num_groups
    mask = compiled(create_block_mask)
    up = mask(lambda b, h, i, j: sees(i, j), None, None, *sizes, device=DEVICE)
    down = mask(lambda b, h, j, i: sees(i, j), None, None, *sizes[::-1], device=DEVICE)
    attend = compiled(flex_attention)

    def group(q: Tensor, k: Tensor, v: Tensor) -> Any:
        _, lse = attend(k, q, q, block_mask=up, return_lse=True)

        def share(score: Tensor, b: Tensor, h: Tensor, j: Tensor, i: Tensor) -> Tensor:
            return score - lse[b, h, i]

        return (attend(q, k, v, score_mod=share, block_mask=down),)

    return group


def form(name: str, relation: Any, backend: str, **options: Tensor) -> Callable[..., Any]:
    """A public operator by a backend, as a function of its tensors."""
    from spatial_grouping_attention import functional

    operator = getattr(functional, name)
    return lambda q, k, v: operator(q, k, v, relation, backend=backend, **options)


def token_major(*shape: int) -> Tensor:
    """Random (B, H, rows, channels) in bf16 that lie as projections leave them."""
    batch, heads, rows, channels = shape
    x = torch.randn(batch, rows, heads, channels, device=DEVICE, dtype=torch.bfloat16)
    return x.transpose(1, 2).requires_grad_()


def grouping_cases() -> dict[str, tuple[Any, int]]:
    """Geometries and head sizes."""
    from spatial_grouping_attention import Neighbourhood

    if TINY:
        return {"6x8 -> 3x4, heads of 8": (Neighbourhood((6, 8), (3, 4), 2, 3, 1, 3), 8)}
    return {
        "512x512 -> 256x256, heads of 32": (Neighbourhood((512, 512), (256, 256), 2, 3, 1, 3), 32),
        "128x128 -> 64x64, heads of 32": (Neighbourhood((128, 128), (64, 64), 2, 3, 1, 3), 32),
        "256x256 -> 64x64, stride 4, heads of 64": (Neighbourhood((256, 256), (64, 64), 4, 7, 3, 3), 64),
        "64x64x64 -> 32x32x32, heads of 32": (Neighbourhood((64,) * 3, (32,) * 3, 2, 3, 1, 3), 32),
    }


class Grouping:
    """Operands of one geometry, 8 heads in bf16, and our forms of either operator."""

    def __init__(self, title: str) -> None:
        self.relation, size = grouping_cases()[title]
        self.heads = 2 if TINY else 8
        q, u = (token_major(1, self.heads, self.relation.num_groups, size) for _ in range(2))
        k, v = (token_major(1, self.heads, self.relation.num_inputs, size) for _ in range(2))
        self.leaves = {"grouping_attention": [q, k, v], "assign": [q, k, u]}
        self.results = {"grouping_attention": q, "assign": k}
        # What the options cost is asked once: every form is compiled on its own.
        self.extras: dict[str, Tensor] = {}
        if title == next(iter(grouping_cases())):
            self.extras["compactness"] = torch.rand(self.heads, device=DEVICE).requires_grad_()
            self.extras["bias"] = torch.randn(self.heads, *self.relation.window, device=DEVICE).requires_grad_()

    def kernels(self, name: str) -> dict[str, Callable[[], Callable[..., Any]]]:
        """The operator by our kernels, without options and with each."""
        plain = functools.partial(form, name, self.relation, "triton")
        extras = self.extras if name == "grouping_attention" else {}
        with_extras = {f"kernels, {extra}": functools.partial(plain, **{extra: x}) for extra, x in extras.items()}
        return {"kernels": plain, **with_extras}


@contextlib.contextmanager
def launching_every_plan() -> Iterator[None]:
    """Within, whatever kernels are launched is launched with every plan, so that they all are in triton's cache.

    For other processes than the one that measures, which then finds compiled what it times and chooses from.
    """
    from spatial_grouping_attention.backends.triton import launch

    def every(key: Hashable, candidates: Callable[[], list[Any]], run: Callable[[Any], Any]) -> Any:
        plans = candidates()
        for plan in plans[1:]:
            # Whether a plan can be launched is for the choice to find out.
            with contextlib.suppress(Exception):
                run(plan)
        return run(plans[0])

    with patch.object(launch, "choose", every):
        yield


def compile_ahead(task: tuple[str, str]) -> float:
    """Launch every plan of an operator's passes in one geometry; seconds."""
    title, name = task
    start = time.perf_counter()
    with launching_every_plan():
        case = Grouping(title)
        for made in case.kernels(name).values():
            backward_of(made(), case.leaves[name])()
        synchronize()
    return time.perf_counter() - start


def grouping(report: Report, title: str) -> None:
    """Windowed grouping and its transpose in one geometry."""
    case = Grouping(title)
    normalisers = 4 * case.heads * case.relation.num_inputs
    for name, leaves in case.leaves.items():
        forms: dict[str, tuple[Callable[[], Callable[..., Any]], str | None]] = {
            key: (made, "triton") for key, made in case.kernels(name).items()
        }
        forms["tiled"] = functools.partial(form, name, case.relation, "tiled"), None
        if name == "grouping_attention":
            forms |= _grouping_peers(case.relation)
        for way, make in WAYS.items():
            # The backward pass reads operands, result, its gradient and the normalisers, and writes gradients.
            moved = (size_of(*leaves) + size_of(case.results[name])) * (2 if way == "backward" else 1) + normalisers
            contenders = {key: _contender(make, made, leaves, engine) for key, (made, engine) in forms.items()}
            report.section(f"{name}, {title}, {way}", moved, contenders)


def _grouping_peers(relation: Any) -> dict[str, tuple[Callable[[], Callable[..., Any]], None]]:
    def by(backend: str) -> Callable[..., Any]:
        return form("grouping_attention", relation, backend)

    peers: dict[str, tuple[Callable[[], Callable[..., Any]], None]] = {"NATTEN": (lambda: by("natten"), None)}
    if relation.ndim == 2:
        peers["FlexAttention"] = lambda: flex_form(relation), None
    if relation.num_inputs * relation.num_groups <= 2**27:
        peers["masked matrix"] = lambda: by("reference"), None
        peers["masked matrix, torch.compile"] = lambda: compiled(by("reference")), None
    return peers


def dense_grouping(report: Report) -> None:
    """Every token sees every group; 8 heads in bf16."""
    heads, groups, tokens = (2, 8, 32) if TINY else (8, 2048, 16384)
    q = token_major(1, heads, groups, 64)
    k, v = (token_major(1, heads, tokens, 64) for _ in range(2))

    def two_flash_calls(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return F.scaled_dot_product_attention(k, q, q), F.scaled_dot_product_attention(q, k, v)

    for way, make in WAYS.items():
        report.section(
            f"dense grouping, {tokens} tokens, {groups} groups, heads of 64, {way}",
            size_of(q, k, v, q) * (1 if way == "forward" else 2),
            {
                "fused": _contender(make, lambda: form("grouping_attention", None, "fused"), [q, k, v], "fused"),
                "two bare flash calls": _contender(make, lambda: two_flash_calls, [q, k, v]),
                "matrix": _contender(make, lambda: form("grouping_attention", None, "reference"), [q, k, v]),
            },
        )
