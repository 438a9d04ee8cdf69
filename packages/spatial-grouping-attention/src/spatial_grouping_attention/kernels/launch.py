"""The passes as functions of tensors: allocate results, describe operands, launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import backward, forward
from .layout import Layout, Triple, layout_of
from .plan import INTERPRETED, SMALLEST_PRODUCT, Plan, choose, group_plans, token_plans

# What products are computed in. The interpreter has no bfloat16 arithmetic, so there everything is widened.
_PRODUCT = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# Three products of halves of the mantissa: float32's accuracy on tensor cores. Plain float32 has none, and blocks of
# these sizes would spill most of their registers.
_PRECISION = "ieee" if INTERPRETED else "tf32x3"

# Offsets within one sample and head fit 32 bits below this.
_NARROW = 2**31

# Groups per program where each is a row on its own.
_ROWS = 64


class Call:
    """The operands that all passes of a call share, and the arguments made of them."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        values: Tensor,
        bias: Tensor | None,
        valid: Tensor | None,
        geometry: list[int],
        scale: float,
    ) -> None:
        """Operands as in :mod:`..functional.reference`; ``geometry`` is ``Neighbourhood.integers()``."""
        self.layout = layout_of(tuple(geometry))
        self.batch, self.heads, self.num_groups, self.head_size = q.shape
        self.num_tokens, self.value_size = k.shape[2], values.shape[3]
        self.dtype, self.device, self.scale = q.dtype, q.device, scale
        table = None if bias is None else bias.flatten(1).contiguous()
        self.shared = {"q": q, "k": k, "bias": table, "valid": valid}

    def per_token(self) -> Tensor:
        """Uninitialised float32 per token."""
        return torch.empty(self.batch, self.heads, self.num_tokens, device=self.device, dtype=torch.float32)

    def per_group(self) -> Tensor:
        """Uninitialised float32 per group."""
        return torch.empty(self.batch, self.heads, self.num_groups, device=self.device, dtype=torch.float32)

    def token_pass(self, kernel: Any, tensors: dict[str, Tensor | None], **constants: Any) -> None:
        """Launch a kernel whose programs are tiles of tokens."""

        def run(plan: Plan) -> None:
            box = self.layout.box(plan.tile)
            self._launch(kernel, plan, self.layout.token_programs(plan.tile), tensors, BOX=box, **constants)

        self._choose(kernel, tensors, constants, token_plans, run)

    def group_pass(self, kernel: Any, tensors: dict[str, Tensor | None], **constants: Any) -> Tensor | None:
        """Launch a kernel whose programs are tiles of groups; the gradient of the bias table, if it makes one."""
        shares: list[Tensor] = []
        with_bias = "dbias" in kernel.arg_names and self.shared["bias"] is not None

        def run(plan: Plan) -> None:
            programs = self.layout.group_programs(plan.tile)
            more: dict[str, Any] = {"length": self.layout.length}
            if "dbias" in kernel.arg_names:
                more["BLOCK_W"] = triton.next_power_of_2(self.layout.window) if with_bias else 1
                more["dbias"] = self._shares(programs) if with_bias else None
                shares[:] = [more["dbias"]]
            self._launch(kernel, plan, programs, tensors, **more, **constants)

        self._choose(kernel, tensors, constants, group_plans, run)
        return shares[0].sum((0, 1)) if with_bias else None

    def _choose(
        self,
        kernel: Any,
        tensors: dict[str, Tensor | None],
        constants: dict[str, Any],
        candidates: Callable[[Layout, int], list[Plan]],
        run: Callable[[Plan], None],
    ) -> None:
        row_bytes = _padded(max(self.head_size, self.value_size)) * self.dtype.itemsize
        # Triton launches on the current device, wherever the operands are.
        with torch.cuda.device_of(self.shared["q"]):  # type: ignore[no-untyped-call]
            choose(self._class(kernel, tensors, constants), lambda: candidates(self.layout, row_bytes), run)

    def _shares(self, programs: Triple) -> Tensor:
        """Room for what every program adds to the gradient of its head's table."""
        number = programs[0] * programs[1] * programs[2]
        shape = (self.batch, number, self.heads, self.layout.window)
        return torch.empty(shape, device=self.device, dtype=torch.float32)

    def _launch(
        self, kernel: Any, plan: Plan, programs: Triple, tensors: dict[str, Tensor | None], **constants: Any
    ) -> None:
        layout = self.layout
        operands = self.shared | tensors
        strides = {
            f"{name}_strides": None if tensor is None else tensor.stride()
            for name, tensor in operands.items()
            if f"{name}_strides" in kernel.arg_names
        }
        grid = (self.heads * programs[0] * programs[1] * programs[2], self.batch)
        kernel[grid](
            **operands,
            **strides,
            scale=self.scale,
            heads=self.heads,
            programs=programs,
            size=layout.size,
            groups=layout.groups,
            offset=layout.offset,
            lead=layout.lead,
            STRIDE=layout.stride,
            RADIUS=layout.radius,
            REACH=layout.reach,
            DILATION=layout.dilation,
            AXES=layout.ndim,
            TILE=plan.tile,
            BLOCK=plan.block,
            D=self.head_size,
            C=self.value_size,
            BLOCK_D=_padded(self.head_size),
            BLOCK_C=_padded(self.value_size),
            WINDOW=layout.window,
            PRODUCT=tl.float32 if INTERPRETED else _PRODUCT[self.dtype],
            PRECISION=_PRECISION,
            WIDE=any(_extent(x) >= _NARROW for x in operands.values() if x is not None),
            **constants,
            **plan.options,
        )

    def _class(self, kernel: Any, tensors: dict[str, Tensor | None], constants: dict[str, Any]) -> Any:
        """What moves the optimum: all that the kernel is compiled for, and the amount of work."""
        layout = self.layout
        work = self.batch * self.heads * self.num_tokens
        present = tuple(name for name, x in (self.shared | tensors).items() if x is not None)
        token_major = self.shared["k"].stride(1) < self.shared["k"].stride(2)  # type: ignore[union-attr]
        return (
            kernel.__name__,
            *(layout.ndim, layout.stride, layout.radius, layout.reach, layout.dilation),
            *(_padded(self.head_size), _padded(self.value_size), self.dtype, token_major),
            *(present, *constants.items(), work.bit_length(), self.device),
        )


def assign(call: Call, u: Tensor, out: Tensor) -> Tensor:
    """Mix the groups' values into ``out``; the normalisers."""
    lse = call.per_token()
    call.token_pass(forward.token_forward, {"u": u, "lse": lse, "out": out})
    return lse


def normalisers(call: Call) -> Tensor:
    """logsumexp_j s_ij."""
    lse = call.per_token()
    call.token_pass(forward.token_forward, {"u": None, "lse": lse, "out": None})
    return lse


def pool(call: Call, v: Tensor, lse: Tensor, out: Tensor) -> Tensor:
    """Average the members of every group into ``out``; the logarithms of the masses."""
    log_mass = call.per_group()
    call.group_pass(forward.group_forward, {"v": v, "lse": lse, "log_mass": log_mass, "out": out})
    return log_mass


def pool_backward(
    call: Call,
    v: Tensor,
    lse: Tensor,
    log_mass: Tensor,
    out: Tensor,
    grad_out: Tensor,
    grad_mass: Tensor,
    grad_lse: Tensor | None,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor | None, Tensor]:
    """Fill the gradients of (q, k, v); those of (bias, lse).

    ``grad_lse`` given means that lse is the logits' own normaliser: then what reaches it goes on into the logits.
    """
    dq, dk, dv = gradients
    delta, dlse = call.per_group(), call.per_token()
    _group_products(call, grad_out, out, grad_mass, delta)
    constants = {"POOL": True, "OWN_LSE": grad_lse is not None}
    both = {"x": v, "y": grad_out, "lse": lse, "log_mass": log_mass, "delta": delta, "per_token": dlse}
    unused: dict[str, Tensor | None] = {"out": None}
    call.token_pass(backward.token_backward, {**both, **unused, "grad_lse": grad_lse, "dk": dk, "dx": dv}, **constants)
    dbias = call.group_pass(backward.group_backward, {**both, "dq": dq, "dy": None}, **constants)
    return dbias, dlse


def assign_backward(
    call: Call,
    u: Tensor,
    lse: Tensor,
    out: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> Tensor | None:
    """Fill the gradients of (q, k, u); that of the bias table."""
    dq, dk, du = gradients
    constants = {"POOL": False, "OWN_LSE": False}
    both = {"x": grad_out, "y": u, "lse": lse, "log_mass": None, "delta": None, "per_token": call.per_token()}
    call.token_pass(
        backward.token_backward, {**both, "out": out, "grad_lse": grad_lse, "dk": dk, "dx": None}, **constants
    )
    return call.group_pass(backward.group_backward, {**both, "dq": dq, "dy": du}, **constants)


def _group_products(call: Call, grad_out: Tensor, out: Tensor, grad_mass: Tensor, delta: Tensor) -> None:
    grid = (call.heads * triton.cdiv(call.num_groups, _ROWS), call.batch)
    tensors = (grad_out, out, grad_mass, delta)
    with torch.cuda.device_of(grad_out):  # type: ignore[no-untyped-call]
        backward.group_products[grid](
            *tensors,
            *(x.stride() for x in tensors),
            call.heads,
            call.num_groups,
            C=call.value_size,
            BLOCK_C=_padded(call.value_size),
            BLOCK=_ROWS,
            WIDE=any(_extent(x) >= _NARROW for x in (grad_out, out)),
        )


def _padded(channels: int) -> int:
    return max(SMALLEST_PRODUCT, int(triton.next_power_of_2(channels)))


def _extent(x: Tensor) -> int:
    """Distance in elements from the first to the last of one sample and head."""
    return sum((n - 1) * s for n, s in zip(x.shape[2:], x.stride()[2:], strict=True))
