"""Attention with positions: bare scores, the whole attention in linear memory, and attention with projections."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .embedding import RotarySpatialEmbedding
from .keywords import spell_out_rotary_keywords
from .masks import emptied, require_attn_mask
from .packed import is_nested
from .positions import Coordinates, Shape, Spacing, Where, valid_tokens, where_of_keys
from .softmax import attend
from .validation import (
    require_affordable,
    require_flag,
    require_floating,
    require_int,
    require_probability,
    require_real,
    require_sizes,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .keywords import RotaryKeywords

# A score matrix larger than this is refused unless the user raises the limit. A grid of 100 x 100 with 16
# heads (6.4 GB in float32) stays possible; what comes next, 200 x 200 (102 GB), is beyond ordinary machines.
MAX_SCORE_BYTES = 16 * 2**30


@spell_out_rotary_keywords
class RoSEMultiHeadCrossAttention(nn.Module):
    """Position-aware attention scores of queries against keys, without projections.

    Both sides are rotated by :class:`RoSE.RotarySpatialEmbedding` in one physical frame, so
    ``score(n, m) = scale * Re sum_c q[n, c] conj(k[m, c]) exp(i <p_n - p_m, w[c]>)`` for every head.

    Args:
        dim: Channels over all heads.
        num_heads: Attention heads.
        spatial_dims: Axes of a position.
        scale: Factor on all scores, greater than 0. The default 1 gives the bare inner products;
            ``head_size ** -0.5`` is usual before a softmax.
        max_score_bytes: Largest score matrix that :meth:`forward` will allocate.
        device: Where to put the parameters.
        dtype: Of the parameters.
        **rotary: Keywords of :class:`RoSE.RotarySpatialEmbedding`.

    Raises:
        TypeError: Arguments of the wrong type.
        ValueError: Arguments that break a rule.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        spatial_dims: int = 2,
        *,
        scale: float = 1.0,
        max_score_bytes: int = MAX_SCORE_BYTES,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **rotary: Unpack[RotaryKeywords],
    ) -> None:
        """Check the arguments and set up; see the class."""
        super().__init__()
        self.scale = require_real("scale", scale, above=0.0, minimum=0.0, maximum=torch.finfo(torch.float32).max)
        self.max_score_bytes = require_int("max_score_bytes", max_score_bytes, minimum=1)
        self.rotary = RotarySpatialEmbedding(dim, num_heads, spatial_dims, device=device, dtype=dtype, **rotary)
        # Its own, because an adapter may stand in the embedding's place, which can be called and nothing else.
        self.dim, self.num_heads = dim, num_heads

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        spacing: Spacing | None = None,
        grid_shape: Shape | None = None,
        k_spacing: Spacing | None = None,
        k_grid_shape: Shape | None = None,
        *,
        coordinates: Coordinates | None = None,
        k_coordinates: Coordinates | None = None,
        num_prefix_tokens: int = 0,
        k_num_prefix_tokens: int | None = None,
        valid: Tensor | None = None,
        k_valid: Tensor | None = None,
    ) -> Tensor:
        """Scores before the softmax.

        Args:
            q: Queries ``(batch, query tokens, dim)``.
            k: Keys ``(batch, key tokens, dim)``.
            spacing: See :meth:`RoSE.RotarySpatialEmbedding.rotate_pair`, as for all arguments named there.
            grid_shape: Shape of the grid.
            k_spacing: Spacing of the keys' grid.
            k_grid_shape: Shape of the keys' grid.
            coordinates: Positions instead of a grid.
            k_coordinates: Positions of the keys.
            num_prefix_tokens: Leading tokens without position.
            k_num_prefix_tokens: The same for k, when it differs.
            valid: Which queries are real, ``(batch, *grid)`` or ``(batch, query tokens)``, with or without the
                prefix tokens; also which keys, where those have no positions of their own.
            k_valid: Which keys are real. Scores of keys that are not are ``-inf``.

        Returns:
            ``(batch, heads, query tokens, key tokens)``, of q's dtype; 0 for queries that are not real, against
            keys that are.

        Raises:
            TypeError: As :meth:`RoSE.RotarySpatialEmbedding.rotate_pair`.
            ValueError: As there, and when the scores would take more than ``max_score_bytes``.
        """
        where = Where(spacing, grid_shape, coordinates, num_prefix_tokens)
        k_where = where_of_keys(where, Where(k_spacing, k_grid_shape, k_coordinates), k_num_prefix_tokens)
        _require_features(self.dim, q=q, k=k)
        _require_one_dtype(q=q, k=k)
        require_affordable(
            "the scores",
            q.shape[0] * self.num_heads * q.shape[1] * k.shape[1] * q.element_size(),
            "max_score_bytes",
            self.max_score_bytes,
            f"{q.shape[1]} queries and {k.shape[1]} keys",
            "call attend(q, k, v, ...), which never stores them",
        )
        valid, k_valid = _require_valid(q, k, where, k_where, valid, k_valid)
        q, k = rotated(self.rotary, emptied(q, valid), emptied(k, k_valid), where, k_where)
        q, k = (torch.unflatten(x, 2, (self.num_heads, -1)).transpose(1, 2) for x in (q, k))
        scores = (q * self.scale if self.scale != 1.0 else q) @ k.transpose(-2, -1)
        return scores if k_valid is None else scores.masked_fill(~k_valid[:, None, None], -torch.inf)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spacing: Spacing | None = None,
        grid_shape: Shape | None = None,
        k_spacing: Spacing | None = None,
        k_grid_shape: Shape | None = None,
        *,
        coordinates: Coordinates | None = None,
        k_coordinates: Coordinates | None = None,
        num_prefix_tokens: int = 0,
        k_num_prefix_tokens: int | None = None,
        valid: Tensor | None = None,
        k_valid: Tensor | None = None,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
    ) -> Tensor:
        """The whole attention, ``softmax(scores) v``, through torch's fused kernels in linear memory.

        Args:
            q: Queries ``(batch, query tokens, dim)``.
            k: Keys ``(batch, key tokens, dim)``.
            v: Values ``(batch, key tokens, value dim)``, heads dividing the value dim. Not rotated.
            spacing: As :meth:`forward`, with all arguments up to ``k_valid``.
            grid_shape: Shape of the grid.
            k_spacing: Spacing of the keys' grid.
            k_grid_shape: Shape of the keys' grid.
            coordinates: Positions instead of a grid.
            k_coordinates: Positions of the keys.
            num_prefix_tokens: Leading tokens without position.
            k_num_prefix_tokens: The same for k, when it differs.
            valid: Which queries are real, as :meth:`forward`.
            k_valid: Which keys are real; the others are hidden.
            attn_mask: Boolean (true where a query sees a key) or floating (added to scores): (queries, keys), or
                (batch, heads, queries, keys) in which any size may be 1. Two dimensions are refused where there are as
                many queries as samples.
            dropout_p: Probability of dropping an attention weight, in [0, 1).

        Returns:
            ``(batch, query tokens, value dim)``; 0 for queries that are not real or, where ``valid`` or ``k_valid`` is
            given, see no key.

        Raises:
            TypeError: As :meth:`forward`.
            ValueError: As :meth:`forward`, except for the limit on the scores, which are never stored.
        """
        where = Where(spacing, grid_shape, coordinates, num_prefix_tokens)
        k_where = where_of_keys(where, Where(k_spacing, k_grid_shape, k_coordinates), k_num_prefix_tokens)
        _require_features(self.dim, q=q, k=k)
        require_floating("v", v)
        _require_one_dtype(q=q, k=k, v=v)
        heads = self.num_heads
        if v.dim() != 3 or v.shape[:2] != k.shape[:2] or v.shape[2] % heads:
            raise ValueError(
                f"v must be (batch, key tokens, value dim), a value dim divisible by {heads} heads, and k's "
                f"batch and tokens; got v {tuple(v.shape)} for k {tuple(k.shape)}"
            )
        require_probability("dropout_p", dropout_p)
        require_attn_mask(attn_mask, q.shape[0], heads, q.shape[1], k.shape[1])
        valid, k_valid = _require_valid(q, k, where, k_where, valid, k_valid)
        v = emptied(v, k_valid)
        q, k = rotated(self.rotary, emptied(q, valid), emptied(k, k_valid), where, k_where)
        out = attend(q, k, v, heads, k_valid=k_valid, attn_mask=attn_mask, dropout_p=dropout_p, scale=self.scale)
        return emptied(out, valid)


@spell_out_rotary_keywords
class RoSEMultiHeadAttention(nn.Module):
    """Multi-head attention with projections and rotary positions, for self- and cross-attention.

    The softmax runs in ``torch.nn.functional.scaled_dot_product_attention``; choose its backend with
    ``torch.nn.attention.sdpa_kernel``.

    Args:
        dim: Channels of queries and output.
        num_heads: Attention heads.
        spatial_dims: Axes of a position.
        context_dim: Channels of the context; default ``dim``.
        qkv_bias: Whether the projections of q, k and v have a bias.
        attn_dropout: Probability of dropping an attention weight in training, in [0, 1).
        proj_dropout: Probability of dropping an output channel in training, in [0, 1).
        device: Where to put the parameters.
        dtype: Of the parameters.
        **rotary: Keywords of :class:`RoSE.RotarySpatialEmbedding`.

    Raises:
        TypeError: Arguments of the wrong type.
        ValueError: Arguments that break a rule.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        spatial_dims: int = 2,
        *,
        context_dim: int | None = None,
        qkv_bias: bool = True,
        attn_dropout: float = 0.0,
        proj_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **rotary: Unpack[RotaryKeywords],
    ) -> None:
        """Check the arguments and set up; see the class."""
        super().__init__()
        self.rotary = RotarySpatialEmbedding(dim, num_heads, spatial_dims, device=device, dtype=dtype, **rotary)
        # Its own, because an adapter may stand in the embedding's place, which can be called and nothing else.
        self.dim, self.num_heads = dim, num_heads
        self.context_dim = dim if context_dim is None else require_int("context_dim", context_dim, minimum=1)
        self.attn_dropout = require_probability("attn_dropout", attn_dropout)
        require_flag("qkv_bias", qkv_bias)
        self.q_proj = nn.Linear(dim, dim, bias=qkv_bias, device=device, dtype=dtype)
        self.kv_proj = nn.Linear(self.context_dim, 2 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(require_probability("proj_dropout", proj_dropout))

    def forward(
        self,
        x: Tensor,
        spacing: Spacing | None = None,
        grid_shape: Shape | None = None,
        k_spacing: Spacing | None = None,
        k_grid_shape: Shape | None = None,
        *,
        context: Tensor | None = None,
        coordinates: Coordinates | None = None,
        k_coordinates: Coordinates | None = None,
        num_prefix_tokens: int = 0,
        k_num_prefix_tokens: int | None = None,
        valid: Tensor | None = None,
        k_valid: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attend from x to itself, or to ``context``.

        Args:
            x: ``(batch, tokens, dim)``, or a jagged nested tensor with ``coordinates``.
            spacing: Positions of x: see :meth:`RoSE.RotarySpatialEmbedding.rotate_pair`, as for all arguments
                named there.
            grid_shape: Shape of x's grid.
            k_spacing: Spacing of the context's grid.
            k_grid_shape: Shape of the context's grid.
            context: ``(batch, context tokens, context_dim)``; default x.
            coordinates: Positions instead of a grid.
            k_coordinates: Positions of the context.
            num_prefix_tokens: Leading tokens without position.
            k_num_prefix_tokens: The same for the context, when it differs.
            valid: Which tokens of x are real, ``(batch, *grid)`` or ``(batch, tokens)``, with or without the prefix
                tokens; also which of the context, where that has no positions of its own. The others are seen by
                nobody and come out as 0.
            k_valid: Which tokens of the context are real.
            attn_mask: Boolean (true where a query sees a key) or floating (added to scores): (queries, keys), or
                (batch, heads, queries, keys) in which any size may be 1. Two dimensions are refused where there are as
                many queries as samples.
            is_causal: Let tokens see only tokens that are not behind them in the sequence.

        Returns:
            ``(batch, tokens, dim)``.

        Raises:
            TypeError: As :meth:`RoSE.RotarySpatialEmbedding.rotate_pair`.
            ValueError: As there.
        """
        where = Where(spacing, grid_shape, coordinates, num_prefix_tokens)
        k_where = where_of_keys(where, Where(k_spacing, k_grid_shape, k_coordinates), k_num_prefix_tokens)
        require_flag("is_causal", is_causal)
        context = x if context is None else context
        for name, tensor, channels in (("x", x, self.dim), ("context", context, self.context_dim)):
            require_floating(name, tensor)
            require_sizes(name, tensor, "batch tokens channels", channels=channels, batch=x.shape[0])
        if is_nested(x) or is_nested(context):
            _require_both_nested(x, context, attn_mask)
        else:
            require_attn_mask(attn_mask, x.shape[0], self.num_heads, x.shape[1], context.shape[1])
        valid, k_valid = _require_valid(x, context, where, k_where, valid, k_valid)
        q = self.q_proj(emptied(x, valid))
        k, v = self.kv_proj(emptied(context, k_valid)).chunk(2, dim=-1)
        q, k = rotated(self.rotary, q, k, where, k_where)
        dropout = self.attn_dropout if self.training else 0.0
        heads = self.num_heads
        out = attend(q, k, v, heads, k_valid=k_valid, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal)
        return emptied(self.proj_drop(self.proj(out)), valid)


def rotated(
    rotary: RotarySpatialEmbedding, q: Tensor, k: Tensor, where: Where, k_where: Where
) -> tuple[Tensor, Tensor]:
    """Both sides rotated in one call of the module, so that whatever hangs on the module sees them pass."""
    both: tuple[Tensor, Tensor] = rotary(
        q, where.spacing, where.grid_shape, coordinates=where.coordinates, num_prefix_tokens=where.num_prefix_tokens,
        k=k, k_where=None if k_where is where else k_where,
    )  # fmt: skip
    return both


def _require_features(dim: int, **features: Tensor) -> None:
    batch = None
    for name, tensor in features.items():
        require_floating(name, tensor)
        batch = tensor.shape[0] if batch is None and tensor.dim() else batch
        require_sizes(name, tensor, "batch tokens dim", dim=dim, **({} if batch is None else {"batch": batch}))


def _require_one_dtype(**features: Tensor) -> None:
    """Refuse features that meet in one product and have different types; autocast would make them one."""
    first, x = next(iter(features.items()))
    for name, tensor in features.items():
        if tensor.dtype == x.dtype:
            continue
        device = x.device.type  # of which torch 2.11 cannot ask the following while it traces: asked where it matters
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            return
        raise TypeError(f"{name} must have the dtype of {first}, {x.dtype}; got {tensor.dtype}")


def _require_both_nested(x: Tensor, context: Tensor, attn_mask: Tensor | None) -> None:
    if not (is_nested(x) and is_nested(context)):
        nested = "x" if is_nested(x) else "context"
        raise ValueError(f"x and context must both be nested, or neither; got only {nested}")
    if attn_mask is not None:
        raise ValueError("attn_mask must be None for nested features; got a mask")


def _require_valid(
    x: Tensor, k: Tensor, where: Where, k_where: Where, valid: Tensor | None, k_valid: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Which tokens of both sides are real, ``(batch, tokens)``; ``valid`` holds for keys at the same positions."""
    if valid is None and k_valid is None:
        return None, None
    if is_nested(x) or is_nested(k):
        raise ValueError("valid must be None for nested features, which need no padding; got a tensor")
    if k_valid is None and k_where is where and k.shape[1] == x.shape[1]:
        k_valid = valid
    return (
        None if valid is None else valid_tokens("valid", valid, where, x.shape[0], x.shape[1]),
        None if k_valid is None else valid_tokens("k_valid", k_valid, k_where, k.shape[0], k.shape[1]),
    )
