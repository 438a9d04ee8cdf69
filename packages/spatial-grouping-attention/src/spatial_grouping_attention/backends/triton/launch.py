"""How a pass reaches the device: operands described for the kernels, a plan chosen, programs launched."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable
from typing import Any

import torch
import triton
import triton.language as tl
from RoSE.kernels.sealed import seal
from torch import Tensor

from ...geometry import remembered
from ..operands import Operands
from .bundles import Form, Inputs, Rows, Sizes
from .layout import Layout, Triple, layout_of
from .plan import CELLS, INTERPRETED, SMALLEST_PRODUCT, Plan, choose, group_plans, table_plan, token_plans

# What products are computed in. The interpreter has no bfloat16 arithmetic, so there everything is widened.
_PRODUCT = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# Three products of halves of the mantissa: float32's accuracy on tensor cores. Plain float32 has none, and blocks of
# these sizes would spill most of their registers.
_PRECISION = "ieee" if INTERPRETED else "tf32x3"

# Offsets within one sample and head fit 32 bits below this.
_NARROW = 2**31

# Axes of a tensor of rows: samples, heads, rows, channels.
_ROW_AXES = 4

# Elements that strides of aligned rows count.
_ALIGNED_UNIT = 16

# Rows per program of a kernel that treats every group on its own.
_ROW_PLAN = Plan((1, 1, 1), 64, 4, 1)

# What a kernel reads and writes beside :class:`~.bundles.Inputs`, by its arguments' names; None for what a call
# leaves out.
Tensors = dict[str, Tensor | None]


def token_pass(kernel: Any, x: Operands, tensors: Tensors, **constants: bool) -> None:
    """Launch a kernel whose programs are tiles of tokens.

    Args:
        kernel: what to launch.
        x: operands; a kernel gets their values where ``tensors`` name them.
        tensors: the kernel's other tensors.
        constants: what else it is compiled for.
    """
    _launch(kernel, x, tensors, constants, Layout.token_programs, token_plans)


def group_pass(kernel: Any, x: Operands, tensors: Tensors, **constants: bool) -> Tensor | None:
    """Launch a kernel whose programs are tiles of groups, with arguments as above.

    Returns:
        The gradient of the compactness (H,), float32, if there is one and the kernel has a ``dcompactness`` for its
        programs' shares.
    """
    shares = _launch(kernel, x, tensors, constants, Layout.group_programs, group_plans)
    return None if shares is None else shares.sum(0)


def table_pass(kernel: Any, x: Operands, tensors: Tensors) -> Tensor | None:
    """Launch a kernel whose programs are runs of cells.

    Returns:
        The gradient of the bias table (H, entries), float32, if there is one.
    """
    if x.bias is None:
        return None
    layout = _layout(x)
    batch, heads, number, head_size = x.q.shape
    plan = table_plan(layout)
    runs = triton.cdiv(number, CELLS)
    shares = x.q.new_empty(batch * runs, heads, layout.window, dtype=torch.float32)
    others = {name: as_rows(tensor) for name, tensor in tensors.items()}
    form = _form(layout, plan, head_size, x.values.shape[3], x.q.dtype, _wide(x, tensors))
    grid = (batch * runs * triton.cdiv(layout.window, plan.block) * heads,)
    with torch.cuda.device_of(x.q):  # type: ignore[no-untyped-call]
        sizes = _sizes(layout, x, (1, 1, 1))
        constants = {"CELLS": CELLS, "TOKENS": SMALLEST_PRODUCT}
        kernel[grid](x=_inputs(x), **others, dbias=shares, sizes=sizes, **constants, FORM=form, **plan.options)
    return shares.sum(0)


def row_pass(kernel: Any, x: Operands, tensors: Tensors) -> None:
    """Launch a kernel that treats every group on its own."""
    batch, heads, number = x.q.shape[:3]
    others = {name: as_rows(tensor) for name, tensor in tensors.items()}
    form = _form(_layout(x), _ROW_PLAN, x.q.shape[3], x.values.shape[3], x.q.dtype, _wide(x, tensors))
    with torch.cuda.device_of(x.q):  # type: ignore[no-untyped-call]
        grid = (batch * heads * triton.cdiv(number, _ROW_PLAN.block),)
        kernel[grid](**others, heads=heads, number=number, FORM=form)


def _launch(
    kernel: Any,
    x: Operands,
    tensors: Tensors,
    constants: dict[str, bool],
    programs_of: Callable[[Layout, Triple], Triple],
    candidates: Callable[[Layout, int], list[Plan]],
) -> Tensor | None:
    """Launch with the plan of this class of calls; the programs' shares of the compactness's gradient, if any."""
    layout, wide = _layout(x), _wide(x, tensors)
    batch, heads, _, head_size = x.q.shape
    channels = x.values.shape[3]
    inputs = _inputs(x)
    others: dict[str, Any] = {name: as_rows(tensor) for name, tensor in tensors.items()}

    def run(plan: Plan) -> Tensor | None:
        programs = programs_of(layout, plan.tile)
        number = batch * math.prod(programs)
        shares = None
        if "dcompactness" in kernel.arg_names:
            if x.compactness is not None:
                shares = x.q.new_empty(number, heads, dtype=torch.float32)
            others["dcompactness"] = shares
        form = _form(layout, plan, head_size, channels, x.q.dtype, wide)
        sizes = _sizes(layout, x, programs)
        kernel[(number * heads,)](x=inputs, **others, sizes=sizes, **constants, FORM=form, **plan.options)
        return shares

    row_bytes = _padded(max(head_size, channels)) * x.q.dtype.itemsize
    # Triton launches on the current device, wherever the operands are.
    with torch.cuda.device_of(x.q):  # type: ignore[no-untyped-call]
        return choose(_class(kernel, layout, x, tensors, constants), lambda: candidates(layout, row_bytes), run)


def _class(kernel: Any, layout: Layout, x: Operands, tensors: Tensors, constants: dict[str, bool]) -> Hashable:
    """What moves the optimum: all that the kernel is compiled for, and the amount of work."""
    batch, heads, _, head_size = x.q.shape
    return (
        kernel.__name__,
        *(layout.ndim, layout.stride, layout.radius, layout.reach, layout.dilation),
        *(_padded(head_size), _padded(x.values.shape[3]), x.q.dtype, x.k.stride(1) < x.k.stride(2)),
        *(x.bias is None, x.compactness is None, x.valid is None, x.valid_groups is None),
        *(name for name, tensor in tensors.items() if tensor is None),
        *(*constants.items(), (batch * heads * x.k.shape[2]).bit_length(), x.q.device),
    )


@remembered(1024)
def _form(layout: Layout, plan: Plan, head_size: int, channels: int, dtype: torch.dtype, wide: bool) -> Form:
    """What the kernels of a plan are compiled for."""
    box = layout.box(plan.tile)
    return Form(
        stride=layout.stride,
        radius=layout.radius,
        reach=layout.reach,
        dilation=layout.dilation,
        axes=layout.ndim,
        window=layout.window,
        window_padded=triton.next_power_of_2(layout.window),
        tile=plan.tile,
        tile_rows=math.prod(plan.tile),
        box=box,
        box_rows=math.prod(box),
        block=plan.block,
        qk=head_size,
        qk_padded=_padded(head_size),
        uv=channels,
        uv_padded=_padded(channels),
        product=tl.float32 if INTERPRETED else _PRODUCT[dtype],
        precision=_PRECISION,
        wide=wide,
    )


def _layout(x: Operands) -> Layout:
    return layout_of(x.neighbourhood)  # type: ignore[arg-type]  # windowed engines always get one


def _inputs(x: Operands) -> Inputs:
    bias = None if x.bias is None else x.bias.flatten(1).contiguous()
    compactness = None if x.compactness is None else x.compactness.float().contiguous()
    return Inputs(as_rows(x.q), as_rows(x.k), bias, compactness, as_rows(x.valid), as_rows(x.valid_groups))


def _sizes(layout: Layout, x: Operands, programs: Triple) -> Sizes:
    return Sizes(x.scale, seal(x.q.shape[1]), *_sealed(layout, programs))


@remembered(1024)
def _sealed(layout: Layout, programs: Triple) -> tuple[tuple[int, ...], ...]:
    triples = programs, layout.size, layout.groups, layout.offset, layout.lead, layout.length, layout.centre
    return tuple(seal(triple) for triple in triples)


def as_rows(x: Tensor | None) -> Rows | None:
    """A tensor as kernels take rows of vectors, or one number per row."""
    return None if x is None else Rows(x, *_strides_as_given(x.stride()))


# Asked again and again of the same few, and as much work as a launch.
@functools.lru_cache(1024)
def _strides_as_given(strides: tuple[int, ...]) -> tuple[tuple[int, ...], int, int]:
    """What :class:`Rows` say of strides."""
    *others, step = strides
    # Rows alone are read in vectors; of numbers and masks a thread reads one.
    aligned = len(strides) == _ROW_AXES and all(stride % _ALIGNED_UNIT == 0 for stride in others)
    # Triton compiles for a number that is 1, or is a multiple of 16.
    unit = _ALIGNED_UNIT if aligned else 1
    return seal(tuple(stride // unit for stride in others)), unit, step


def _padded(channels: int) -> int:
    # Triton's own next_power_of_2 is made for kernels, and slow outside of them.
    return max(SMALLEST_PRODUCT, 1 << max(channels - 1, 0).bit_length())


def _wide(x: Operands, tensors: Tensors) -> bool:
    every = (x.q, x.k, *tensors.values())
    return any(_extent(tensor.shape, tensor.stride()) >= _NARROW for tensor in every if tensor is not None)


@functools.lru_cache(1024)
def _extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Distance in elements from the first to the last of one sample and head."""
    return sum((n - 1) * s for n, s in zip(shape[2:], strides[2:], strict=True))
