"""What the GPU kernels are worth: correctness first, then every kernel against its bound and its peers.

    PYTHONPATH=packages/rotary-spatial-embeddings/src:packages/spatial-grouping-attention/src \
        python benchmarks/gpu_report.py [--json FILE] [--seconds 420]

Runs from a plain checkout with the torch and triton that are there; nothing is downloaded. Fails without a CUDA
device, and stops with every disagreement listed, before any timing, where a kernel is wrong. With TRITON_INTERPRET=1
and without a CUDA device it only does the comparisons, in triton's interpreter and on tiny grids. Peers that cannot be
imported or cannot run are named with the reason, never left out in silence; what does not fit into ``--seconds`` is
listed as skipped.

A *bound* is the time in which the bytes that must move, every operand read once and every result written once, move
at the copy speed measured here. Times are medians of triton's ``do_bench`` (second-level cache flushed between
calls) and include what the host needs to launch; the column "graph" is the same call replayed from a CUDA graph,
which is the GPU's own share.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
import torch.nn.functional as F
from RoSE import functional as rose
from RoSE.rotation import rotate_eager, rotate_plain
from torch import Tensor

Call = Callable[[], Any]

# Where everything runs; the interpreter takes a CPU's tensors.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Report:
    """Measurements as they come in, and the clock they run against."""

    def __init__(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds
        self.sections: dict[str, dict[str, Any]] = {}
        self.bandwidth = math.nan

    def section(self, title: str, moved_bytes: int, contenders: dict[str, Callable[[], Call]]) -> None:
        """Time contenders, each made by a function that may fail; ``moved_bytes`` sets the bound."""
        bound = moved_bytes / self.bandwidth
        rows: dict[str, Any] = {"bound": {"median": bound}}
        for name, make in contenders.items():
            if time.monotonic() > self.deadline:
                rows[name] = {"skipped": "out of time"}
                continue
            try:
                rows[name] = measure(make())
            except Exception as error:
                rows[name] = {"skipped": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
            torch.cuda.empty_cache()
        self.sections[title] = rows
        print(f"\n{title}   (bound {1e3 * bound:.3f} ms)")
        for name, row in rows.items():
            if "skipped" in row:
                print(f"  {name:44s} {row['skipped']}")
            elif name != "bound":
                graph = f"{1e3 * row['graph']:9.3f}" if row["graph"] is not None else "        -"
                print(f"  {name:44s} {1e3 * row['median']:9.3f} ms {graph} graph  {row['median'] / bound:7.2f} x bound")
        sys.stdout.flush()


def measure(call: Call) -> dict[str, Any]:
    """Seconds per call: median and quartiles as launched from Python, and replayed from a CUDA graph."""
    from triton import testing

    call()
    torch.cuda.synchronize()
    low, median, high = testing.do_bench(call, warmup=20, rep=120, quantiles=[0.25, 0.5, 0.75])
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            graph = 1e-3 * float(testing.do_bench_cudagraph(call, rep=40))
    except Exception:  # what synchronises or allocates on the host cannot be captured; the other figures stand
        torch.cuda.synchronize()
        graph = None
    return {"median": 1e-3 * median, "q1": 1e-3 * low, "q3": 1e-3 * high, "graph": graph}


def relative(got: Tensor, want: Tensor) -> float:
    """Largest difference, relative to the largest wanted value; infinities must agree."""
    got, want = got.detach().double(), want.detach().double()
    if not torch.equal(got.isinf(), want.isinf()) or bool(got.isnan().any()):
        return math.inf
    difference = (got - want).masked_fill(want.isinf(), 0.0).abs().max()
    return float(difference / want.masked_fill(want.isinf(), 0.0).abs().max().clamp(min=1e-3))


# --- correctness ---------------------------------------------------------------------------------------------------

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def both_ways(function: Callable[..., Any], leaves: list[Tensor]) -> list[Tensor]:
    """Results, and gradients of a fixed weighting of the finite ones."""
    results = [x for x in function(*leaves) if x is not None]
    generator = torch.Generator(device=DEVICE).manual_seed(1)
    total = torch.zeros((), device=DEVICE, dtype=torch.float64)
    for x in results:
        weight = torch.randn(x.shape, generator=generator, device=DEVICE)
        total = total + (x.masked_fill(x.isinf(), 0.0).double() * weight).sum()
    return [*results, *torch.autograd.grad(total, leaves)]


def leaves_of(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    return [torch.randn(s, generator=generator, device=DEVICE).to(dtype).requires_grad_() for s in shapes]


# Errors by what was compared, each with what is allowed.
Errors = dict[str, tuple[float, float]]


def operate(name: str, backend: str, x: Any, leaves: list[Tensor]) -> Any:
    """An operator by a backend, of the operands ``x`` with other tensors."""
    from spatial_grouping_attention import backends

    q, k, values, *bias = leaves
    return getattr(backends, name)(x._replace(q=q, k=k, values=values, bias=bias[0] if bias else None), backend)


def check_operator(errors: Errors, title: str, name: str, backend: str, x: Any, dtype: torch.dtype) -> None:
    """One operator and its gradients by one backend against the matrix form in float64."""
    tensors = [tensor for tensor in (x.q, x.k, x.values, x.bias) if tensor is not None]
    leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    wide = [tensor.detach().double().requires_grad_() for tensor in leaves]
    got = both_ways(lambda *leaves: operate(name, backend, x, list(leaves)), leaves)
    want = both_ways(lambda *leaves: operate(name, "reference", x, list(leaves)), wide)
    worst = max(relative(a, b) for a, b in zip(got, want, strict=True))
    errors[f"{backend}, {name}, {title}, {dtype}"] = worst, TOLERANCE[dtype]


def check_grouping(errors: Errors, dtype: torch.dtype) -> None:
    """Every operator in one to three dimensions, with bias and masks, and dense, against the matrix form."""
    from spatial_grouping_attention import Neighbourhood
    from spatial_grouping_attention.backends import Operands

    relations = {
        "1-D dilated": Neighbourhood((301,), (75,), 4, 7, 1, 5, 2),
        "2-D": Neighbourhood((29, 37), (15, 19), 2, 3, 1, 3),
        "3-D": Neighbourhood((9, 10, 11), (5, 5, 6), 2, 3, 1, 3),
    }
    sizes: tuple[int, ...] = (32, 40, 128)
    if DEVICE == "cpu":
        relations = {"2-D": Neighbourhood((5, 7), (3, 4), 2, 3, 1, 3)}
        sizes = (8,)
    for title, relation in relations.items():
        for size in sizes:
            groups, tokens = (2, 2, relation.num_groups, size), (2, 2, relation.num_inputs, size)
            valid = torch.rand(2, relation.num_inputs, device=DEVICE) < 0.8
            valid_groups = torch.rand(2, relation.num_groups, device=DEVICE) < 0.8
            for name, value_shape in (("group", tokens), ("assign", groups)):
                q, k, values, bias = leaves_of([groups, tokens, value_shape, (2, *relation.window)], torch.float32)
                x = Operands(q, k, values, relation, size**-0.5, bias, valid, valid_groups)
                check_operator(errors, f"{title}, head size {size}", name, "triton", x, dtype)
    groups, tokens = (2, 2, 70, 64), (2, 2, 500, 64)
    for name, value_shape in (("group", tokens), ("assign", groups)):
        q, k, values = leaves_of([groups, tokens, value_shape], torch.float32)
        check_operator(errors, "dense", name, "fused", Operands(q, k, values, None, 0.125), dtype)


def check_rotation(errors: Errors, dtype: torch.dtype) -> None:
    """Rotation by positions near and far from zero, both layouts, all gradients, against float64."""
    from RoSE import kernels

    def turn(interleaved: bool, q: Tensor, k: Tensor, coordinates: Tensor, freqs: Tensor) -> Any:
        return kernels.rotate_positions(q, k, coordinates, freqs, num_prefix_tokens=3, interleaved=interleaved)

    def plain(interleaved: bool, q: Tensor, k: Tensor, coordinates: Tensor, freqs: Tensor) -> Any:
        cos, sin = rose.cos_sin(rose.phases(F.pad(coordinates, (0, 0, 3, 0)), freqs), torch.float64)
        cos, sin = cos.transpose(1, 2), sin.transpose(1, 2)
        return [rotate_plain(x, cos, sin, interleaved) for x in (q, k)]

    tokens = 330 if DEVICE == "cuda" else 13
    for interleaved in (True, False):
        for origin in (0.0, 1e5):
            shape = (2, 4, tokens + 3, 64)
            q, k = leaves_of([shape, shape], dtype)
            (freqs,) = leaves_of([(4, 24, 3)], torch.float32)
            coordinates = torch.rand(2, tokens, 3, device=DEVICE, dtype=torch.float64) * 50 + origin
            leaves = [q, k, coordinates.requires_grad_(), freqs]
            wide = [x.detach().double().requires_grad_() for x in leaves]
            got = both_ways(functools.partial(turn, interleaved), leaves)
            want = both_ways(functools.partial(plain, interleaved), wide)
            # Angles of 1e5 radians are promised to 1e-4.
            allowed = max(TOLERANCE[dtype], 1e-4 if origin else 0.0)
            name = f"rotation, interleaved={interleaved}, origin {origin:g}, {dtype}"
            errors[name] = max(relative(a, b) for a, b in zip(got, want, strict=True)), allowed


def check_memory() -> dict[str, int]:
    """Bytes beyond the operands: nothing of tokens times groups may appear in dense or windowed grouping."""
    from spatial_grouping_attention import Neighbourhood
    from spatial_grouping_attention.functional import grouping_attention

    used = {}
    relation = Neighbourhood((128, 128), (64, 64), 2, 3, 1, 3)
    leaves = leaves_of([(1, 8, 4096, 32), (1, 8, 16384, 32), (1, 8, 16384, 32)], torch.bfloat16)
    for backend, neighbourhood in (("fused", None), ("triton", relation)):
        for _ in range(2):  # the first call of a class tries its candidates
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            out, _ = grouping_attention(*leaves, neighbourhood, backend=backend)
            torch.autograd.grad(out.sum(), leaves)
            used[backend] = torch.cuda.max_memory_allocated() - before
    return used


def correctness() -> dict[str, Any]:
    """Everything that is timed below agrees with float64, or the report ends here."""
    errors: Errors = {}
    for dtype in TOLERANCE:
        check_grouping(errors, dtype)
        check_rotation(errors, dtype)
    wrong = [f"{name}: off by {e:.2e}, allowed {a:.0e}" for name, (e, a) in errors.items() if not e <= a]
    memory = check_memory() if DEVICE == "cuda" else {}
    matrix = 8 * 4096 * 16384 * 2
    wrong += [f"{name}: {used / 2**20:.0f} MiB allocated" for name, used in memory.items() if used > matrix // 4]
    if wrong:
        sys.exit("The kernels disagree with the reference; nothing was timed.\n  " + "\n  ".join(wrong))
    print(f"correctness: {len(errors)} cases agree with float64")
    return {"errors": errors, "bytes_beyond_operands": memory}


# --- measurements --------------------------------------------------------------------------------------------------


def machine_rates(report: Report) -> dict[str, float]:
    """Bytes per second of a copy (read plus written) and operations per second of a bfloat16 product."""
    source = torch.empty(2**29, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source))
    report.bandwidth = 2 * source.numel() * source.element_size() / copy["median"]
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    product = measure(lambda: a @ a)
    rates = {"copy_bytes_per_second": report.bandwidth, "matmul_flops": 2 * 8192**3 / product["median"]}
    print(f"copy {report.bandwidth / 1e12:.2f} TB/s, bf16 product {rates['matmul_flops'] / 1e12:.0f} TFLOP/s")
    return rates


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


def rotation(report: Report) -> None:
    """q and k of 16384 tokens, 32 heads of 64 channels, bf16, token-major as projections leave them."""
    from RoSE import kernels

    shape = (1, 16384, 32, 64)
    q, k = (x.detach().transpose(1, 2).requires_grad_() for x in leaves_of([shape, shape], torch.bfloat16))
    axis = torch.arange(128.0, device="cuda")
    coordinates = torch.cartesian_prod(axis, axis)
    freqs = torch.randn(32, 32, 2, device="cuda").requires_grad_()

    def fused(interleaved: bool) -> Callable[..., Any]:
        return lambda q, k, freqs: kernels.rotate_positions(q, k, coordinates, freqs, interleaved=interleaved)

    def plain(turn: Callable[..., Tensor], q: Tensor, k: Tensor, freqs: Tensor) -> Any:
        cos, sin = rose.cos_sin(rose.phases(coordinates, freqs))
        cos, sin = cos.transpose(0, 1), sin.transpose(0, 1)
        return turn(q, cos, sin, True), turn(k, cos, sin, True)

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

    both = size_of(q, k)
    eager = functools.partial(plain, rotate_eager)
    compiled = torch.compile(functools.partial(plain, rotate_plain), fullgraph=True)
    for way, make, factor in (("forward", forward_of, 2), ("backward, frequencies learned", backward_of, 3)):
        report.section(
            f"rotation of q and k, {way}",
            factor * both,
            {
                "kernel, interleaved": lambda make=make: make(fused(True), [q, k, freqs]),
                "kernel, half": lambda make=make: make(fused(False), [q, k, freqs]),
                "plain, torch.compile": lambda make=make: make(compiled, [q, k, freqs]),
                "plain": lambda make=make: make(eager, [q, k, freqs]),
            },
        )
    for way, make in (("forward", forward_of), ("backward", backward_of)):
        report.section(
            f"rotation of q and k by given cosines, {way}",
            2 * both,
            {
                "kernel": lambda make=make: make(given(kernels.rotate), [q, k]),
                "plain, torch.compile": lambda make=make: make(
                    torch.compile(given(rotate_plain, True), fullgraph=True), [q, k]
                ),
                "plain": lambda make=make: make(given(rotate_eager, True), [q, k]),
                "timm, one table for all heads": lambda make=make: make(timm_form(), [q, k]),
                "timm, torch.compile": lambda make=make: make(torch.compile(timm_form()), [q, k]),
            },
        )


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
    mask = torch.compile(create_block_mask)
    up = mask(lambda b, h, i, j: sees(i, j), None, None, *sizes, device="cuda")
    down = mask(lambda b, h, j, i: sees(i, j), None, None, *sizes[::-1], device="cuda")
    attend = torch.compile(flex_attention)

    def group(q: Tensor, k: Tensor, v: Tensor) -> Any:
        _, lse = attend(k, q, q, block_mask=up, return_lse=True)

        def share(score: Tensor, b: Tensor, h: Tensor, j: Tensor, i: Tensor) -> Tensor:
            return score - lse[b, h, i]

        return (attend(q, k, v, score_mod=share, block_mask=down),)

    return group


def form(name: str, relation: Any, backend: str) -> Callable[..., Any]:
    """A public operator by a backend, as a function of its tensors."""
    from spatial_grouping_attention import functional

    operator = getattr(functional, name)
    return lambda q, k, v: operator(q, k, v, relation, backend=backend)


def token_major(*shape: int) -> Tensor:
    """Random (B, H, rows, channels) in bf16 that lie as projections leave them."""
    batch, heads, rows, channels = shape
    x = torch.randn(batch, rows, heads, channels, device="cuda", dtype=torch.bfloat16)
    return x.transpose(1, 2).requires_grad_()


def grouping(report: Report) -> None:
    """Windowed grouping and its transpose; 8 heads in bf16."""
    from spatial_grouping_attention import Neighbourhood

    cases = {
        "512x512 -> 256x256, heads of 32": (Neighbourhood((512, 512), (256, 256), 2, 3, 1, 3), 32),
        "128x128 -> 64x64, heads of 32": (Neighbourhood((128, 128), (64, 64), 2, 3, 1, 3), 32),
        "256x256 -> 64x64, stride 4, heads of 64": (Neighbourhood((256, 256), (64, 64), 4, 7, 3, 3), 64),
        "64x64x64 -> 32x32x32, heads of 32": (Neighbourhood((64,) * 3, (32,) * 3, 2, 3, 1, 3), 32),
    }
    for title, (relation, size) in cases.items():
        q, u = (token_major(1, 8, relation.num_groups, size) for _ in range(2))
        k, v = (token_major(1, 8, relation.num_inputs, size) for _ in range(2))
        normalisers = 4 * 8 * relation.num_inputs
        small = relation.num_inputs * relation.num_groups <= 2**27
        for name, leaves, reads in (
            ("grouping_attention", [q, k, v], size_of(q, k, v)),
            ("assign", [q, k, u], size_of(q, k, u)),
        ):
            out = size_of(q) if name == "grouping_attention" else size_of(k)
            for way, make, moved in (
                ("forward", forward_of, reads + out + normalisers),
                # The backward pass reads operands, result, its gradient and the normalisers, and writes gradients.
                ("backward", backward_of, 2 * reads + 2 * out + normalisers),
            ):
                contenders = {
                    "kernels": lambda n=name, x=leaves, m=make, r=relation: m(form(n, r, "triton"), x),
                    "tiled": lambda n=name, x=leaves, m=make, r=relation: m(form(n, r, "tiled"), x),
                }
                if name == "grouping_attention":
                    contenders["NATTEN"] = lambda x=leaves, m=make, r=relation: m(
                        form("grouping_attention", r, "natten"), x
                    )
                    if relation.ndim == 2:
                        contenders["FlexAttention"] = lambda x=leaves, m=make, r=relation: m(flex_form(r), x)
                    if small:
                        contenders["masked matrix"] = lambda x=leaves, m=make, r=relation: m(
                            form("grouping_attention", r, "reference"), x
                        )
                        contenders["masked matrix, torch.compile"] = lambda x=leaves, m=make, r=relation: m(
                            torch.compile(form("grouping_attention", r, "reference")), x
                        )
                report.section(f"{name}, {title}, {way}", moved, contenders)


def dense_grouping(report: Report) -> None:
    """Every token sees every group; 8 heads in bf16."""
    q = token_major(1, 8, 2048, 64)
    k, v = (token_major(1, 8, 16384, 64) for _ in range(2))

    def two_flash_calls(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return F.scaled_dot_product_attention(k, q, q), F.scaled_dot_product_attention(q, k, v)

    for way, make in (("forward", forward_of), ("backward", backward_of)):
        report.section(
            f"dense grouping, 16384 tokens, 2048 groups, heads of 64, {way}",
            size_of(q, k, v, q) * (1 if way == "forward" else 2),
            {
                "fused": lambda make=make: make(form("grouping_attention", None, "fused"), [q, k, v]),
                "two bare flash calls": lambda make=make: make(two_flash_calls, [q, k, v]),
                "matrix": lambda make=make: make(form("grouping_attention", None, "reference"), [q, k, v]),
            },
        )


def first_calls() -> dict[str, float]:
    """Seconds of the very first call of a class, which compiles and times its candidates."""
    from RoSE import kernels
    from spatial_grouping_attention import Neighbourhood, functional

    relation = Neighbourhood((96, 96), (48, 48), 2, 3, 1, 3)
    q, k, v = leaves_of([(1, 2, 2304, 16), (1, 2, 9216, 16), (1, 2, 9216, 16)], torch.float16)
    times = {}
    start = time.perf_counter()
    out, _ = functional.grouping_attention(q, k, v, relation, backend="triton")
    torch.cuda.synchronize()
    times["grouping, forward"] = time.perf_counter() - start
    start = time.perf_counter()
    torch.autograd.grad(out.sum(), (q, k, v))
    torch.cuda.synchronize()
    times["grouping, backward"] = time.perf_counter() - start
    start = time.perf_counter()
    kernels.rotate_positions(q, None, torch.rand(2304, 2, device="cuda"), torch.rand(2, 7, 2, device="cuda"))
    torch.cuda.synchronize()
    times["rotation, forward"] = time.perf_counter() - start
    return times


def environment() -> dict[str, Any]:
    import triton

    folder = Path(__file__).parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=folder, check=False
    )
    return {
        "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "commit": commit.stdout.strip() or None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--seconds", type=float, default=420.0, help="start no measurement after this long")
    arguments = parser.parse_args()
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted == (DEVICE == "cuda"):
        sys.exit(
            "gpu_report.py measures GPU kernels: it needs a CUDA device without TRITON_INTERPRET, or no CUDA device "
            "and TRITON_INTERPRET=1 to compare the kernels' results only. Nothing was run."
        )
    torch.manual_seed(0)
    if interpreted:
        correctness()
        return
    # Backward passes are repeated on one graph, which buffers that compiled code gives away do not survive.
    torch._functorch.config.donated_buffer = False
    report = Report(arguments.seconds)
    result: dict[str, Any] = {"environment": environment()}
    print(*(f"{key}: {value}" for key, value in result["environment"].items()), sep="\n")
    result["first_call_seconds"] = first_calls()
    print("first calls:", *(f"{name} {seconds:.1f} s" for name, seconds in result["first_call_seconds"].items()))
    result["correctness"] = correctness()
    result["rates"] = machine_rates(report)
    rotation(report)
    grouping(report)
    dense_grouping(report)
    result["measurements"] = report.sections
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1, default=str) + "\n")
        print(f"\nwritten to {arguments.json}")


if __name__ == "__main__":
    main()
