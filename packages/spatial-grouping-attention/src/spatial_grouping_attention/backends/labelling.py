"""The most likely group of every fine token, without a matrix of all pairs.

Registered with ``torch.library`` as the operators are, so that a compiler takes it as it is and any batch fits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..geometry import Neighbourhood
from .autograd import as_given, shown, without_autocast
from .engines import Backend, engine
from .operands import Operands
from .semantics import blanked, logits, memberships, most_likely

# Elements of the block of logits that is held at a time where every token sees every group.
BLOCK_ELEMENTS = 2**24


@torch.no_grad()
def labels(x: Operands, *, per_head: bool = False) -> Tensor:
    """argmax_j of the memberships averaged over heads, or of every head's; ``values`` are not looked at.

    Args:
        x: checked operands, whose bias is a table if there is one.
        per_head: whether every head has labels of its own.

    Returns:
        (B, N_in) int64, or (B, H, N_in) per head; ties go to the group that comes first; -1 for tokens that belong to
        no group, or of which nobody can tell, because they are NaN.
    """
    if torch.onnx.is_in_onnx_export():
        # Which has standard operators only; a graph for a runtime needs no blocks.
        with as_given(x.q):
            return _of_heads(memberships(logits(blanked(x, "groups"))), per_head)
    geometry = [] if x.neighbourhood is None else x.neighbourhood.integers()
    find = shown(_labels, _find_labels, x.q, x.k)
    found: Tensor = find(x.q, x.k, x.bias, x.compactness, x.valid, x.valid_groups, geometry, x.scale, per_head)
    return found


@without_autocast
def _find_labels(
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    compactness: Tensor | None,
    valid: Tensor | None,
    valid_groups: Tensor | None,
    geometry: list[int],
    scale: float,
    per_head: bool,
) -> Tensor:
    if 0 in (*q.shape, *k.shape):
        return k.new_full(k.shape[:3] if per_head else k.shape[::2][:2], -1, dtype=torch.long)
    neighbourhood = Neighbourhood.from_integers(geometry) if geometry else None
    # The values' channels would only make for smaller chunks.
    masks = {"valid": valid, "valid_groups": valid_groups}
    x = blanked(Operands(q, k, q, neighbourhood, scale, bias, compactness=compactness, **masks), "groups")
    if not per_head:
        return _averaged(x)
    return torch.cat([_averaged(_head(x, h)).unsqueeze(1) for h in range(q.shape[1])], 1)


_labels = torch.library.custom_op("spatial_grouping_attention::labels", _find_labels, mutates_args=())


@_labels.register_fake
def _(q, k, bias, compactness, valid, valid_groups, geometry, scale, per_head):  # type: ignore[no-untyped-def]
    batch, heads, tokens = k.shape[:3]
    return k.new_empty((batch, heads, tokens) if per_head else (batch, tokens), dtype=torch.long)


def one_by_one(operator: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, int]]:
    """The rule by which ``torch.vmap`` maps an operator that makes labels, which are cheap beside groups."""

    def mapped(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        def call(i: int) -> Tensor:
            each = zip(args, in_dims, strict=True)
            return operator(*(x.select(dim, i) if isinstance(x, Tensor) and dim is not None else x for x, dim in each))

        return torch.stack([call(i) for i in range(info.batch_size)]), 0

    return mapped


_labels.register_vmap(one_by_one(_labels))


def _head(x: Operands, head: int) -> Operands:
    """The operands of one head alone."""
    q, k = x.q[:, [head]], x.k[:, [head]]
    bias, compactness = (None if table is None else table[[head]] for table in (x.bias, x.compactness))
    return x._replace(q=q, k=k, values=q, bias=bias, compactness=compactness)


def _averaged(x: Operands) -> Tensor:
    """Labels of the mean over heads."""
    if x.neighbourhood is None or (x.neighbourhood.covers_all and x.bias is None):
        return _dense(x)
    found: Tensor = engine(Backend.TILED.value).labels(x)
    return found


def _dense(x: Operands) -> Tensor:
    rows = max(1, BLOCK_ELEMENTS // (x.q.shape[0] * x.q.shape[1] * x.q.shape[2]))
    blocks = []
    for first in range(0, x.k.shape[2], rows):
        block = slice(first, first + rows)
        valid = None if x.valid is None else x.valid[:, block]
        part = x._replace(k=x.k[:, :, block], valid=valid, neighbourhood=None, compactness=None)
        if x.compactness is not None and x.neighbourhood is not None:
            squares = x.neighbourhood.squared_distances(x.q.device, x.compactness.dtype, block)
            part = part._replace(pair_bias=-x.compactness[None, :, None, None] * squares)
        blocks.append(_of_heads(memberships(logits(part)), per_head=False))
    return torch.cat(blocks, dim=1)


def _of_heads(shares: Tensor, per_head: bool) -> Tensor:
    """Memberships of every head (B, H, N, M) -> (B, H, N) labels per head, or (B, N) of their mean."""
    shares = shares.masked_fill(shares.isnan(), 0.0)
    return most_likely(shares if per_head else shares.mean(1))
