"""The public operators: check the arguments, bundle them, pass them on."""

from __future__ import annotations

import math

import torch
from RoSE.validation import require_boolean, require_floating, require_real, require_sizes
from torch import Tensor

from .. import backends
from ..backends import Operands, Selection
from ..backends.operands import problem_of
from ..geometry import Neighbourhood

# Logits are float32 at least, and so is what they are scaled by.
_LARGEST_SCALE = torch.finfo(torch.float32).max


def grouping_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    neighbourhood: Neighbourhood | None = None,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    pair_bias: Tensor | None = None,
    compactness: Tensor | None = None,
    valid: Tensor | None = None,
    valid_groups: Tensor | None = None,
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
        bias: added to the logits: a table (H, *window) over the neighbourhood's window, read at
            ``(group - cell(token))/dilation + radius`` per axis; or, in any other shape, as ``pair_bias``.
        pair_bias: added to the logits: one value for every pair, (B, H, N_in, N_out), where any size may be 1; the
            form that no table is mistaken for.
        compactness: (H,), meant to be 0 or more, which is not checked: logits get ``- compactness * |p_i - p_j|^2``,
            positions in units of the group spacing along every axis, which the neighbourhood knows: a group sits at
            fine index ``j*stride + (kernel_size - 1)/2 - padding``. The weight of place beside content in SLIC
            superpixels (Achanta et al. 2012, doi:10.1109/TPAMI.2012.120, section 3). Differentiable.
        valid: (B, N_in) boolean; false tokens belong to no group, whatever they hold.
        valid_groups: (B, N_out) boolean; false groups are seen by no token, whatever they hold.
        backend: ``"auto"``, ``"reference"``, ``"fused"``, ``"tiled"``, ``"native"``, ``"triton"`` or
            ``"natten"``.

    Returns:
        ``out`` (B, H, N_out, Dv) in v's dtype, 0 for groups that no token sees; and ``lse`` (B, H, N_in),
        ``logsumexp_j s_ij`` in float32 at least, +inf for tokens that belong to no group. Both are differentiable.

    Raises:
        TypeError: a tensor is not floating, or dtypes differ.
        ValueError: shapes disagree with each other or the neighbourhood, or the backend cannot serve.
    """
    operands = _bundle(q, k, "v", v, "N_in", neighbourhood, scale, bias, pair_bias, compactness, valid, valid_groups)
    pooled = backends.group(operands, backend)
    return pooled.out, pooled.lse


def assign(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    neighbourhood: Neighbourhood | None = None,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    pair_bias: Tensor | None = None,
    compactness: Tensor | None = None,
    valid: Tensor | None = None,
    valid_groups: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Carry values of the groups to the fine tokens: ordinary attention from tokens to groups.

    Args:
        q: group queries (B, H, N_out, D).
        k: fine keys (B, H, N_in, D).
        u: values of the groups (B, H, N_out, Du).
        neighbourhood: see :func:`grouping_attention`, as for all further arguments.
        scale: factor of the products.
        bias: added to the logits.
        pair_bias: likewise.
        compactness: how much the logits of far groups are lowered.
        valid: tokens that take part.
        valid_groups: groups that take part.
        backend: what computes.

    Returns:
        ``sum_j A_ij u_j`` (B, H, N_in, Du) in u's dtype, 0 for tokens that belong to no group; and ``lse`` as there.

    Raises:
        TypeError: see :func:`grouping_attention`.
        ValueError: see :func:`grouping_attention`.
    """
    operands = _bundle(q, k, "u", u, "N_out", neighbourhood, scale, bias, pair_bias, compactness, valid, valid_groups)
    return backends.assign(operands, backend)


def pool(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    neighbourhood: Neighbourhood | None = None,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    pair_bias: Tensor | None = None,
    compactness: Tensor | None = None,
    valid: Tensor | None = None,
    valid_groups: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Average over the members of every group, with the tokens' normalisers given.

    Args:
        q: group queries (B, H, N_out, D).
        k: fine keys (B, H, N_in, D).
        v: values of the fine tokens (B, H, N_in, Dv).
        lse: (B, H, N_in) normalisers, those of :func:`assign` for memberships that compete over groups.
        neighbourhood: see :func:`grouping_attention`, as for all further arguments.
        scale: factor of the products.
        bias: added to the logits.
        pair_bias: likewise.
        compactness: how much the logits of far groups are lowered.
        valid: tokens that take part.
        valid_groups: groups that take part.
        backend: what computes.

    Returns:
        ``softmax_i (s_ij - lse_i) v`` (B, H, N_out, Dv) in v's dtype, 0 for groups without members.

    Raises:
        TypeError: see :func:`grouping_attention`.
        ValueError: see :func:`grouping_attention`.
    """
    operands = _bundle(q, k, "v", v, "N_in", neighbourhood, scale, bias, pair_bias, compactness, valid, valid_groups)
    require_floating("lse", lse)
    require_sizes("lse", lse, "B H N_in", B=k.shape[0], H=k.shape[1], N_in=k.shape[2])
    return backends.pool(operands, lse.to(torch.promote_types(q.dtype, torch.float32)), backend).out


def select(
    q: Tensor,
    neighbourhood: Neighbourhood | None = None,
    *,
    bias: Tensor | None = None,
    pair_bias: Tensor | None = None,
    compactness: Tensor | None = None,
    backend: str = "auto",
) -> Selection:
    """Tell which backend serves a call with these arguments, and why; ``print`` it for the whole decision.

    Args:
        q: group queries (B, H, N_out, D).
        neighbourhood: see :func:`grouping_attention`, as for all further arguments.
        bias: added to the logits.
        pair_bias: likewise.
        compactness: how much the logits of far groups are lowered.
        backend: what is asked for.

    Raises:
        TypeError: q is not floating.
        ValueError: q has another shape, the name is unknown, or the requested backend cannot serve.
    """
    require_floating("q", q)
    _require_queries(q)
    if bias is not None and not _is_table(bias, q, neighbourhood):
        bias, pair_bias = None, bias
    return backends.select(problem_of(q, neighbourhood, bias, pair_bias, compactness), backend)


def _bundle(
    q: Tensor,
    k: Tensor,
    values_name: str,
    values: Tensor,
    values_axis: str,
    neighbourhood: Neighbourhood | None,
    scale: float | None,
    bias: Tensor | None,
    pair_bias: Tensor | None,
    compactness: Tensor | None,
    valid: Tensor | None,
    valid_groups: Tensor | None,
) -> Operands:
    """Check the arguments of any of the operators and bundle them."""
    for name, tensor in (("q", q), ("k", k), (values_name, values)):
        require_floating(name, tensor)
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise TypeError(
                f"q, k and {values_name} must share dtype and device; "
                f"got q {q.dtype} on {q.device} and {name} {tensor.dtype} on {tensor.device}"
            )
    _require_queries(q)
    batch, heads, num_groups, head_size = q.shape
    require_sizes("k", k, "B H N_in D", B=batch, H=heads, D=head_size)
    sizes = {"N_out": num_groups, "N_in": k.shape[2]}
    pinned = {"B": batch, "H": heads, values_axis: sizes[values_axis]}
    require_sizes(values_name, values, f"B H {values_axis} C", **pinned)
    if neighbourhood is not None:
        _require_fitting(neighbourhood, k.shape[2], num_groups)
    pairs = (batch, heads, k.shape[2], num_groups)
    if bias is not None:
        _require_bias(bias, q, neighbourhood, pairs)
        if not _is_table(bias, q, neighbourhood):
            if pair_bias is not None:
                raise ValueError(
                    "pair_bias must be the only bias with one value for every pair; got such a bias as well"
                )
            bias, pair_bias = None, bias
    if pair_bias is not None:
        _require_pairs(pair_bias, q, pairs)
    if compactness is not None:
        compactness = _require_compactness(compactness, q, neighbourhood)
    for name, mask, axis in (("valid", valid, "N_in"), ("valid_groups", valid_groups, "N_out")):
        if mask is not None:
            require_boolean(name, mask)
            require_sizes(name, mask, f"B {axis}", B=batch, **{axis: sizes[axis]})
    if scale is None:
        scale = 1.0 / math.sqrt(head_size)
    elif require_real("scale", scale, minimum=-_LARGEST_SCALE, maximum=_LARGEST_SCALE) == 0.0:
        raise ValueError("scale must not be 0, or all logits would be equal, whatever q and k; got 0")
    return Operands(q, k, values, neighbourhood, float(scale), bias, valid, valid_groups, pair_bias, compactness)


def _require_fitting(neighbourhood: Neighbourhood, num_tokens: int, num_groups: int) -> None:
    if not isinstance(neighbourhood, Neighbourhood):
        raise TypeError(f"neighbourhood must be a Neighbourhood or None; got {type(neighbourhood).__name__}")
    if (neighbourhood.num_inputs, neighbourhood.num_groups) != (num_tokens, num_groups):
        raise ValueError(
            f"neighbourhood must relate the {num_tokens} tokens of k and the {num_groups} groups of q; got grids "
            f"{neighbourhood.input_shape} ({neighbourhood.num_inputs}) and "
            f"{neighbourhood.output_shape} ({neighbourhood.num_groups})"
        )


def _require_queries(q: Tensor) -> None:
    require_sizes("q", q, "B H N_out D")
    if q.shape[-1] == 0:
        raise ValueError(f"q must have a head size D of at least 1; got {tuple(q.shape)}")


def _require_bias(
    bias: Tensor, q: Tensor, neighbourhood: Neighbourhood | None, pairs: tuple[int, int, int, int]
) -> None:
    """A table, or else what could be nothing but one value for every pair."""
    _require_numbers_beside(q, "bias", bias)
    if _is_table(bias, q, neighbourhood) or _fits_pairs(bias, pairs):
        return
    windows = () if neighbourhood is None else tuple(axis.window for axis in neighbourhood.axes)
    table = f"(H, *window) = {(pairs[1], *windows)} or " if windows else ""
    raise ValueError(f"bias must have shape {table}(B, H, N_in, N_out) = {pairs}; got {tuple(bias.shape)}")


def _require_pairs(pair_bias: Tensor, q: Tensor, pairs: tuple[int, int, int, int]) -> None:
    _require_numbers_beside(q, "pair_bias", pair_bias)
    if not _fits_pairs(pair_bias, pairs):
        raise ValueError(
            f"pair_bias must have shape (B, H, N_in, N_out) = {pairs}, where any size may be 1; "
            f"got {tuple(pair_bias.shape)}"
        )


def _require_compactness(compactness: Tensor, q: Tensor, neighbourhood: Neighbourhood | None) -> Tensor:
    """In float32 at least: squared distances are large numbers."""
    if neighbourhood is None:
        raise ValueError("compactness needs a neighbourhood, which says where tokens and groups lie; got None")
    _require_numbers_beside(q, "compactness", compactness)
    require_sizes("compactness", compactness, "H", H=q.shape[1])
    return compactness.to(torch.promote_types(q.dtype, torch.float32))


def _is_table(bias: Tensor, q: Tensor, neighbourhood: Neighbourhood | None) -> bool:
    """Whether a bias has the shape of a table over the window."""
    if neighbourhood is None:
        return False
    return tuple(bias.shape) == (q.shape[1], *(axis.window for axis in neighbourhood.axes))


def _fits_pairs(bias: Tensor, pairs: tuple[int, int, int, int]) -> bool:
    return bias.ndim == 4 and all(n in (1, size) for n, size in zip(bias.shape, pairs, strict=True))


def _require_numbers_beside(q: Tensor, name: str, bias: Tensor) -> None:
    require_floating(name, bias)
    if bias.device != q.device:
        raise TypeError(f"{name} must be on q's device {q.device}; got {bias.device}")
