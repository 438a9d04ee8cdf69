"""How long rotation takes, beside a plain copy and beside other libraries.

``pytest benchmarks/bench_rotation.py``: float32, 16384 tokens, 12 heads of 64 channels.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from entries import BACKWARD, DEVICE, Bound, Case, Entry, of_leaves, random_leaves, yardstick
from harness import run
from other_libraries import beside_torchvision, compiled, library, needs_gpu
from RoSE import RotarySpatialEmbedding
from RoSE.functional import cos_sin, rotate
from RoSE.rotation import rotate_eager
from torch import Tensor

Turn = Callable[[Tensor], Tensor]


def sizes(small: bool) -> tuple[int, int, int]:
    """Tokens, heads, channels of a head."""
    return (60, 3, 8) if small else (16384, 12, 64)


def angles_for(small: bool, per_head: bool) -> Tensor:
    """(N, H or 1, planes) in float64."""
    tokens, heads, size = sizes(small)
    torch.manual_seed(2)
    return torch.randn(tokens, heads if per_head else 1, size // 2, dtype=torch.float64)


def operands(small: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    tokens, heads, size = sizes(small)
    return random_leaves(dtype, x=(1, tokens, heads, size))


def naive_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The textbook expression for the half layout, with tables as wide as a head."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def naive_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The textbook expression for neighbouring channels, with tables as wide as a head."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cos + torch.stack((-second, first), dim=-1).flatten(-2) * sin


def naive_narrow(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The half layout again, with a cosine for each plane."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


def complex_oracle(angles: Tensor, interleaved: bool) -> Turn:
    """The rotation in complex float64."""

    def turn(x: Tensor) -> Tensor:
        pairs = x.unflatten(-1, (-1, 2)) if interleaved else x.unflatten(-1, (2, -1)).transpose(-1, -2)
        turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)
        out = torch.view_as_real(turned)
        return (out if interleaved else out.transpose(-1, -2)).flatten(-2)

    return turn


def entry(name: str, make: Callable[[Tensor], Turn], interleaved: bool, per_head: bool, **options: Any) -> Entry:
    """A rotation by angles (N, H or 1, planes), from which ``make`` prepares what it is given."""

    def bind(small: bool) -> Bound:
        x = operands(small, torch.float32)
        return of_leaves(make(angles_for(small, per_head).to(x["x"].device)), x)

    def oracle(small: bool) -> Bound:
        x = operands(small, torch.float64)
        return of_leaves(complex_oracle(angles_for(small, per_head).to(x["x"].device), interleaved), x)

    return Entry(name, bind, oracle, **options)


def wide(angles: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    cos, sin = cos_sin(angles)
    if interleaved:
        return cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
    return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)


def ours(form: Callable[..., Tensor], interleaved: bool, compile_it: bool = False) -> Callable[[Tensor], Turn]:
    def make(angles: Tensor) -> Turn:
        cos, sin = cos_sin(angles)
        turn = compiled(form, fullgraph=True) if compile_it else form
        return lambda x: turn(x, cos, sin, interleaved=interleaved)

    return make


def kernels(interleaved: bool) -> Callable[[Tensor], Turn]:
    def make(angles: Tensor) -> Turn:
        needs_gpu("RoSE.kernels")
        return ours(rotate, interleaved)(angles)

    return make


def naive(interleaved: bool, compile_it: bool = False) -> Callable[[Tensor], Turn]:
    form = naive_interleaved if interleaved else naive_half

    def make(angles: Tensor) -> Turn:
        tables = wide(angles, interleaved)
        turn = compiled(form, fullgraph=True) if compile_it else form
        return lambda x: turn(x, *tables)

    return make


def timm(interleaved: bool) -> Callable[[Tensor], Turn]:
    def make(angles: Tensor) -> Turn:
        layers = beside_torchvision("timm.layers")
        cos, sin = wide(angles, interleaved)
        table = torch.cat((sin, cos), -1)
        return lambda x: layers.apply_rot_embed_cat(x, table, half=not interleaved)

    return make


def rotary_embedding_torch(angles: Tensor) -> Turn:
    """Takes angles and makes their cosines itself, at every call."""
    peer = library("rotary_embedding_torch")
    table = angles.float().repeat_interleave(2, -1)
    return lambda x: peer.apply_rotary_emb(table, x)


def x_transformers(angles: Tensor) -> Turn:
    """Likewise; it wants heads before tokens."""
    peer = beside_torchvision("x_transformers.x_transformers")
    table = angles.float().repeat_interleave(2, -1).transpose(0, 1)
    return lambda x: peer.apply_rotary_pos_emb(x.transpose(1, 2), table).transpose(1, 2)


def liger(angles: Tensor) -> Turn:
    """Turns queries and keys in place, in the half layout; half the heads are queries here."""
    needs_gpu("Liger")
    peer = library("liger_kernel.transformers.rope")
    cos, sin = (t.transpose(0, 1) for t in wide(angles, interleaved=False))

    def turn(x: Tensor) -> Tensor:
        q, k = x.transpose(1, 2).clone().chunk(2, dim=1)
        return torch.cat(peer.liger_rotary_pos_emb(q, k, cos, sin), dim=1).transpose(1, 2)

    return turn


def copy_of_x(small: bool) -> Bound:
    return of_leaves(lambda x: x.clone(), operands(small, torch.float32))


def copy_into_fresh_pages(small: bool) -> Bound:
    """What a first use of memory costs, which other figures leave out."""
    leaves = operands(small, torch.float32)

    def call(x: Tensor) -> Tensor:
        return torch.frombuffer(mmap.mmap(-1, x.nbytes), dtype=x.dtype).view_as(x).copy_(x)

    return of_leaves(call, leaves)


def given(per_head: bool) -> Case:
    """Cosines are given, one for each head or the same for all."""
    layouts = {"interleaved": True, "half": False}
    entries = [yardstick("copy of x", copy_of_x)]
    if per_head and DEVICE == "cpu":
        entries.append(yardstick("copy of x into fresh pages", copy_into_fresh_pages))
    for layout, flag in layouts.items():
        makers: dict[str, Callable[[Tensor], Turn]] = {
            f"RoSE, {layout}": ours(rotate_eager, flag),
            f"RoSE, {layout}, torch.compile": ours(rotate, flag, compile_it=True),
            f"RoSE, {layout}, kernels": kernels(flag),
            f"naive, {layout}": naive(flag),
            f"naive, {layout}, torch.compile": naive(flag, compile_it=True),
            f"timm, {layout}": timm(flag),
        }
        entries += [
            entry(name, make, flag, per_head, counted="torch.compile" not in name) for name, make in makers.items()
        ]
    made = "makes cosines at every call"
    entries.append(entry("rotary-embedding-torch, interleaved", rotary_embedding_torch, True, per_head, note=made))
    if not per_head:
        entries.append(entry("x-transformers, interleaved", x_transformers, True, per_head, note=made))
        entries.append(entry("Liger, half", liger, False, per_head))
    whose = "cosines of every head given" if per_head else "cosines given, the same for all heads"
    return Case(f"rotation, {whose}", entries, "copy of x")


def learned() -> Case:
    """Gradients reach cosines too."""

    def leaves(small: bool, dtype: torch.dtype) -> dict[str, Tensor]:
        tables = dict(zip(("cos", "sin"), cos_sin(angles_for(small, per_head=True)), strict=True))
        x = operands(small, dtype)
        return x | {name: t.to(x["x"].device, dtype).requires_grad_() for name, t in tables.items()}

    def of(form: Callable[..., Tensor], oracle: Callable[..., Tensor], name: str) -> Entry:
        return Entry(
            name,
            lambda small: of_leaves(form, leaves(small, torch.float32)),
            lambda small: of_leaves(oracle, leaves(small, torch.float64)),
            counted="torch.compile" not in name,
        )

    def interleaved_oracle(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        halves = torch.cat(x.unflatten(-1, (-1, 2)).unbind(-1), -1)
        return torch.stack(naive_narrow(halves, cos, sin).chunk(2, -1), -1).flatten(-2)

    def half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate(x, cos, sin, interleaved=False)

    entries = [
        yardstick("copy of x", copy_of_x),
        of(rotate, interleaved_oracle, "RoSE, interleaved"),
        of(half, naive_narrow, "RoSE, half"),
        of(compiled(rotate, fullgraph=True), interleaved_oracle, "RoSE, interleaved, torch.compile"),
        of(compiled(half, fullgraph=True), naive_narrow, "RoSE, half, torch.compile"),
        of(naive_narrow, naive_narrow, "naive, half"),
        of(compiled(naive_narrow, fullgraph=True), naive_narrow, "naive, half, torch.compile"),
    ]
    return Case("rotation, gradients to x and to cosines", entries, "copy of x", ways=(BACKWARD,))


def from_positions() -> Case:
    """A whole module: positions to angles to cosines to channels; frequencies learned."""

    def module(small: bool, dtype: torch.dtype) -> tuple[RotarySpatialEmbedding, tuple[int, int]]:
        _, heads, size = sizes(small)
        torch.manual_seed(0)
        made = RotarySpatialEmbedding(heads * size, heads, 2).to(dtype)
        return made, (10, 6) if small else (128, 128)

    def bind(small: bool) -> Bound:
        x = operands(small, torch.float32)
        rope, grid = module(small, torch.float32)
        rope.to(x["x"].device)
        leaves = x | {"freqs": rope.freqs}
        return Bound(lambda: rope(x["x"], 1.0, grid, layout="bnhd"), leaves)

    def plain(dtype: torch.dtype) -> Callable[[bool], Bound]:
        def made(small: bool) -> Bound:
            x = operands(small, dtype)
            rope, (rows, columns) = module(small, torch.float32)
            freqs = rope.freqs.detach().to(x["x"].device, dtype).requires_grad_()
            axes = (torch.arange(n, dtype=dtype, device=freqs.device) for n in (rows, columns))
            positions = torch.cartesian_prod(*axes)

            def turn(x: Tensor, freqs: Tensor) -> Tensor:
                angles = torch.einsum("na,hpa->nhp", positions, freqs)
                halves = torch.cat(x.unflatten(-1, (-1, 2)).unbind(-1), -1)
                turned = naive_narrow(halves, angles.cos(), angles.sin())
                return torch.stack(turned.chunk(2, -1), -1).flatten(-2)

            return of_leaves(turn, x | {"freqs": freqs})

        return made

    entries = [
        yardstick("copy of x", copy_of_x),
        Entry("RoSE, the module", bind, plain(torch.float64)),
        Entry("naive, positions to channels", plain(torch.float32), plain(torch.float64)),
    ]
    return Case("rotation from positions, 128 x 128", entries, "copy of x")


CASES = (given(per_head=True), given(per_head=False), learned(), from_positions())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_rotation(case: Case, recorder: Any) -> None:
    run(case, recorder)
