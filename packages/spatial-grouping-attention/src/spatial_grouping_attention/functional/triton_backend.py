"""Windowed operators in Triton kernels, for CUDA and for the interpreter that runs kernels on a CPU.

The signatures are those of :mod:`.reference`; the passes are described in :mod:`..kernels`. They are registered as
operators, so that ``torch.compile`` and ``torch.export`` take them as they are. Importing this module does not
import triton; the first call does.
"""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from ..geometry import Neighbourhood
from .registration import register_gradients

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_CHANNELS = 128
MOST_AXES = 3

# Compute capability of the oldest GPUs whose tensor cores take bfloat16.
OLDEST_GPU = (8, 0)

_INSTALLED = importlib.util.find_spec("triton") is not None
# Triton decides this when a kernel is defined, so it must not change once kernels have been imported.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def refusals(
    device: torch.device, dtype: torch.dtype, head_size: int, neighbourhood: Neighbourhood | None, bias: str | None
) -> list[str]:
    """Reasons why the kernels cannot serve a call; empty where they can.

    Args:
        device: of all operands.
        dtype: of q, k and the values.
        head_size: channels of q and k. Values may have any number: they are worked through in slices.
        neighbourhood: which groups a token sees.
        bias: ``None``, ``"table"`` or ``"full"``.
    """
    reasons = []
    if not _INSTALLED:
        reasons.append("triton is not installed")
    if device.type not in (("cpu", "cuda") if _INTERPRETED else ("cuda",)):
        reasons.append(f"triton needs tensors on cuda (or TRITON_INTERPRET=1 for tests on a cpu), got {device.type}")
    elif device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST_GPU:
        oldest = ".".join(map(str, OLDEST_GPU))
        reasons.append(f"triton needs a GPU of compute capability {oldest} or newer")
    if dtype not in DTYPES:
        reasons.append(f"triton takes float32, bfloat16 and float16, got {dtype}")
    if head_size > MOST_CHANNELS:
        reasons.append(f"triton takes head sizes up to {MOST_CHANNELS}, got {head_size}")
    if neighbourhood is None:
        reasons.append("triton is windowed: it needs a neighbourhood")
    elif neighbourhood.ndim > MOST_AXES:
        reasons.append(f"triton takes up to {MOST_AXES} axes, got {neighbourhood.ndim}")
    if bias == "full":
        reasons.append("triton takes a bias per window offset only, got one for every pair")
    return reasons


def assign(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    neighbourhood: Neighbourhood,
    scale: float,
    bias: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`.reference.assign`."""
    geometry = neighbourhood.integers()
    results = [_assign(q, k, part, bias, valid, geometry, scale) for part in _slices(u)]
    return _join([out for out, _ in results]), results[0][1]


def pool(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    neighbourhood: Neighbourhood,
    scale: float,
    bias: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`.reference.pool`."""
    geometry = neighbourhood.integers()
    results = [_pool(q, k, part, lse, bias, valid, geometry, scale) for part in _slices(v)]
    return _join([out for out, _, _ in results]), results[0][1]


def grouping_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    neighbourhood: Neighbourhood,
    scale: float,
    bias: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`.reference.grouping_attention`; a pass over the tokens, then one over the groups."""
    geometry = neighbourhood.integers()
    first, *rest = _slices(v)
    out, log_mass, lse = _pool(q, k, first, None, bias, valid, geometry, scale)
    more = [_pool(q, k, part, lse, bias, valid, geometry, scale)[0] for part in rest]
    return _join([out, *more]), lse, log_mass


def _slices(values: Tensor) -> list[Tensor]:
    return [values[..., i : i + MOST_CHANNELS] for i in range(0, max(values.shape[-1], 1), MOST_CHANNELS)]


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _launch() -> ModuleType:
    from ..kernels import launch

    return launch


def _token_major(like: Tensor, rows: int, channels: int) -> Tensor:
    """Uninitialised (B, H, rows, channels) with the order of heads and rows that ``like`` has in memory."""
    batch, heads = like.shape[:2]
    if like.stride(1) < like.stride(2):
        return like.new_empty(batch, rows, heads, channels).transpose(1, 2)
    return like.new_empty(batch, heads, rows, channels)


def _scalars(like: Tensor) -> Tensor:
    """Uninitialised float32 (B, H, N)."""
    return torch.empty(like.shape[:3], device=like.device, dtype=torch.float32)


def _table(bias: Tensor | None, like: Tensor) -> Tensor:
    """Uninitialised gradient of the bias table; empty where there is none."""
    shape = (0,) if bias is None else bias.shape
    return torch.empty(shape, device=like.device, dtype=torch.float32)


_OP = "spatial_grouping_attention::triton_"


@torch.library.custom_op(_OP + "pool", mutates_args=())
def _pool(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    given_lse: Tensor | None,
    bias: Tensor | None,
    valid: Tensor | None,
    geometry: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, log_mass, lse); without ``given_lse`` the logits' own normaliser, else an empty tensor."""
    launch = _launch()
    call = launch.Call(q, k, v, bias, valid, geometry, scale)
    out = _token_major(v, q.shape[2], v.shape[3])
    lse = launch.normalisers(call) if given_lse is None else given_lse
    log_mass = launch.pool(call, v, lse, out)
    return out, log_mass, lse if given_lse is None else _table(None, q)


@torch.library.custom_op(_OP + "assign", mutates_args=())
def _assign(
    q: Tensor, k: Tensor, u: Tensor, bias: Tensor | None, valid: Tensor | None, geometry: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    launch = _launch()
    out = _token_major(u, k.shape[2], u.shape[3])
    lse = launch.assign(launch.Call(q, k, u, bias, valid, geometry, scale), u, out)
    return out, lse


@torch.library.custom_op(_OP + "pool_backward", mutates_args=())
def _pool_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    valid: Tensor | None,
    geometry: list[int],
    scale: float,
    out: Tensor,
    lse: Tensor,
    log_mass: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_mass: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to (q, k, v, bias, lse); ``grad_lse`` given means that lse is the logits' own normaliser.

    Then what reaches lse, from outside and through T, goes on into the logits, and the last result is unused.
    """
    launch = _launch()
    call = launch.Call(q, k, v, bias, valid, geometry, scale)
    gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    dbias, dlse = launch.pool_backward(call, v, lse, log_mass, out, grad_out, grad_mass, grad_lse, gradients)
    return *gradients, _table(None, q) if bias is None else dbias.view(bias.shape), dlse


@torch.library.custom_op(_OP + "assign_backward", mutates_args=())
def _assign_backward(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    bias: Tensor | None,
    valid: Tensor | None,
    geometry: list[int],
    scale: float,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    launch = _launch()
    call = launch.Call(q, k, u, bias, valid, geometry, scale)
    gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(u)
    dbias = launch.assign_backward(call, u, lse, out, grad_out, grad_lse, gradients)
    return *gradients, _table(None, q) if bias is None else dbias.view(bias.shape)


@_pool.register_fake
def _(q, k, v, given_lse, bias, valid, geometry, scale):  # type: ignore[no-untyped-def]
    lse = _scalars(k) if given_lse is None else _table(None, q)
    return _token_major(v, q.shape[2], v.shape[3]), _scalars(q), lse


@_assign.register_fake
def _(q, k, u, bias, valid, geometry, scale):  # type: ignore[no-untyped-def]
    return _token_major(u, k.shape[2], u.shape[3]), _scalars(k)


@_pool_backward.register_fake
def _(q, k, v, bias, *rest):  # type: ignore[no-untyped-def]
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), _table(bias, q), _scalars(k)


@_assign_backward.register_fake
def _(q, k, u, bias, *rest):  # type: ignore[no-untyped-def]
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(u), _table(bias, q)


register_gradients(_pool, _assign, _pool_backward, _assign_backward)
