"""The public operators: check the arguments, choose a backend, call it."""

from __future__ import annotations

import math
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .. import validation
from ..geometry import Neighbourhood
from . import backends, fused, natten_backend, reference, tiled, triton_backend
from .backends import Backend, Selection
from .once import as_given
from .reference import is_table

_MODULES: dict[Backend, ModuleType] = {
    Backend.REFERENCE: reference,
    Backend.FUSED: fused,
    Backend.TILED: tiled,
    Backend.TRITON: triton_backend,
    Backend.NATTEN: natten_backend,
}


class Grouped(NamedTuple):
    """What grouping yields, with the masses that averages over heads need."""

    out: Tensor
    lse: Tensor
    log_mass: Tensor


def grouping_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    neighbourhood: Neighbourhood | None = None,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    valid: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Average the fine tokens of every group, with memberships that compete over groups.

    With logits ``s_ij = scale * <k_i, q_j> + bias``, every token spreads one over the groups it sees,
    ``A_ij = softmax_j s_ij``, and every group averages its members, ``out_j = sum_i A_ij v_i / sum_i A_ij``
    (the grouping layer of Native Segmentation Vision Transformers, arXiv:2505.16993, section 3).

    Args:
        q: group queries (B, H, N_out, D).
        k: fine keys (B, H, N_in, D).
        v: fine values (B, H, N_in, Dv).
        neighbourhood: which groups a token sees; ``None`` for all of them.
        scale: factor of the products, not 0; ``None`` for 1/sqrt(D).
        bias: added to the logits: a table (H, *window) read at ``(group - cell(token))/dilation + radius``
            per axis, or one value for every pair, broadcastable to (B, H, N_in, N_out).
        valid: (B, N_in) boolean; false tokens belong to no group, whatever they hold.
        backend: ``"auto"``, ``"reference"``, ``"fused"``, ``"tiled"``, ``"triton"`` or ``"natten"``.

    Returns:
        ``out`` (B, H, N_out, Dv) in v's dtype, 0 for groups that no token sees; and ``lse`` (B, H, N_in),
        ``logsumexp_j s_ij`` in float32 at least, +inf for tokens that are not valid. Both are differentiable.

    Raises:
        TypeError: a tensor is not floating, or dtypes differ.
        ValueError: shapes disagree with each other or the neighbourhood, or the backend cannot serve.
    """
    grouped = group(q, k, v, neighbourhood, scale=scale, bias=bias, valid=valid, backend=backend)
    return grouped.out, grouped.lse


def group(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    neighbourhood: Neighbourhood | None = None,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    valid: Tensor | None = None,
    backend: str = "auto",
) -> Grouped:
    """:func:`grouping_attention`, with the logarithm of every group's mass ``sum_i A_ij`` (B, H, N_out)."""
    scale = _check(q, k, "v", v, "N_in", neighbourhood, scale, bias, valid)
    module = _MODULES[select(q, neighbourhood, bias=bias, backend=backend).backend]
    k, v = _blank(valid, k, v)
    with as_given(q):
        return Grouped(*module.grouping_attention(q, k, v, neighbourhood, scale, bias, valid))


def assign(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    neighbourhood: Neighbourhood | None = None,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    valid: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Carry values of the groups to the fine tokens: ordinary attention from tokens to groups.

    Args:
        q: group queries (B, H, N_out, D).
        k: fine keys (B, H, N_in, D).
        u: values of the groups (B, H, N_out, Du).
        neighbourhood, scale, bias, valid, backend: see :func:`grouping_attention`.

    Returns:
        ``sum_j A_ij u_j`` (B, H, N_in, Du) in u's dtype, 0 for tokens that are not valid; and ``lse`` as there.

    Raises:
        TypeError, ValueError: see :func:`grouping_attention`.
    """
    scale = _check(q, k, "u", u, "N_out", neighbourhood, scale, bias, valid)
    module = _MODULES[select(q, neighbourhood, bias=bias, backend=backend).backend]
    (k,) = _blank(valid, k)
    with as_given(q):
        out, lse = module.assign(q, k, u, neighbourhood, scale, bias, valid)
    return out, lse


def pool(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    neighbourhood: Neighbourhood | None = None,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    valid: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Average over the members of every group, with the tokens' normalisers given.

    Args:
        q: group queries (B, H, N_out, D).
        k: fine keys (B, H, N_in, D).
        v: values of the fine tokens (B, H, N_in, Dv).
        lse: (B, H, N_in) normalisers, those of :func:`assign` for memberships that compete over groups.
        neighbourhood, scale, bias, valid, backend: see :func:`grouping_attention`.

    Returns:
        ``softmax_i (s_ij - lse_i) v`` (B, H, N_out, Dv) in v's dtype, 0 for groups without members.

    Raises:
        TypeError, ValueError: see :func:`grouping_attention`.
    """
    scale = _check(q, k, "v", v, "N_in", neighbourhood, scale, bias, valid)
    validation.floating("lse", lse)
    validation.shaped("lse", lse, "B H N_in", B=k.shape[0], H=k.shape[1], N_in=k.shape[2])
    module = _MODULES[select(q, neighbourhood, bias=bias, backend=backend).backend]
    lse = lse.to(torch.promote_types(q.dtype, torch.float32))
    k, v, lse = _blank(valid, k, v, lse)
    with as_given(q):
        out: Tensor = module.pool(q, k, v, lse, neighbourhood, scale, bias, valid)[0]
    return out


def select(
    q: Tensor,
    neighbourhood: Neighbourhood | None = None,
    *,
    bias: Tensor | None = None,
    backend: str = "auto",
) -> Selection:
    """Tell which backend serves a call with these arguments, and why; ``print`` it for the whole decision.

    Raises:
        TypeError: q is not floating.
        ValueError: q has another shape, or see :func:`.backends.select`.
    """
    validation.floating("q", q)
    validation.shaped("q", q, "B H N_out D")
    return backends.select(backends.Problem.of(q, neighbourhood, bias), backend)


def _blank(valid: Tensor | None, *of_tokens: Tensor) -> tuple[Tensor, ...]:
    """Zero what excluded tokens hold: padding may be NaN, and 0 times NaN is NaN."""
    if valid is None:
        return of_tokens
    excluded = ~valid[:, None, :]
    # A clone keeps the order in memory, which masked_fill on its own does not.
    return tuple(x.clone().masked_fill_(excluded if x.ndim == 3 else excluded[..., None], 0.0) for x in of_tokens)


def _check(
    q: Tensor,
    k: Tensor,
    values_name: str,
    values: Tensor,
    values_axis: str,
    neighbourhood: Neighbourhood | None,
    scale: float | None,
    bias: Tensor | None,
    valid: Tensor | None,
) -> float:
    """Check the operands of any of the operators; the scale they use."""
    for name, tensor in (("q", q), ("k", k), (values_name, values)):
        validation.floating(name, tensor)
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise TypeError(
                f"q, k and {values_name} must share dtype and device, "
                f"got q {q.dtype} on {q.device} and {name} {tensor.dtype} on {tensor.device}"
            )
    validation.shaped("q", q, "B H N_out D")
    batch, heads, num_groups, head_size = q.shape
    validation.shaped("k", k, "B H N_in D", B=batch, H=heads, D=head_size)
    sizes = {"N_out": num_groups, "N_in": k.shape[2]}
    pinned = {"B": batch, "H": heads, values_axis: sizes[values_axis]}
    validation.shaped(values_name, values, f"B H {values_axis} C", **pinned)
    if neighbourhood is not None:
        if not isinstance(neighbourhood, Neighbourhood):
            raise TypeError(f"neighbourhood must be a Neighbourhood or None, got {type(neighbourhood).__name__}")
        if (neighbourhood.num_inputs, neighbourhood.num_groups) != (k.shape[2], num_groups):
            raise ValueError(
                f"k has {k.shape[2]} tokens and q {num_groups} groups, but the neighbourhood relates grids "
                f"{neighbourhood.input_shape} ({neighbourhood.num_inputs}) and "
                f"{neighbourhood.output_shape} ({neighbourhood.num_groups})"
            )
    if bias is not None:
        _check_bias(bias, q, neighbourhood, (batch, heads, k.shape[2], num_groups))
    if valid is not None:
        validation.boolean("valid", valid)
        validation.shaped("valid", valid, "B N_in", B=batch, N_in=k.shape[2])
    if scale is None:
        return 1.0 / math.sqrt(head_size)
    if validation.finite_number("scale", scale) == 0.0:
        raise ValueError("scale must not be 0: all logits would be equal, whatever q and k")
    return float(scale)


def _check_bias(bias: Tensor, q: Tensor, neighbourhood: Neighbourhood | None, pairs: tuple[int, int, int, int]) -> None:
    validation.floating("bias", bias)
    if bias.device != q.device:
        raise TypeError(f"bias must be on q's device, got {bias.device} and q on {q.device}")
    if is_table(bias, pairs[1], neighbourhood):
        return
    table = () if neighbourhood is None else (pairs[1], *(axis.window for axis in neighbourhood.axes))
    broadcasts = bias.ndim <= 4 and bias.shape[-2:] == torch.Size(pairs[2:])
    if not broadcasts or any(n not in (1, m) for n, m in zip(bias.shape[::-1], pairs[::-1], strict=False)):
        offered = f"(H, *window) = {table} or " if table else ""
        raise ValueError(f"bias must have shape {offered}(B, H, N_in, N_out) = {pairs}, got {tuple(bias.shape)}")
