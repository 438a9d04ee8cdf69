"""Attention with positions: the scores of the formula, and the whole attention in linear memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .embedding import RotarySpatialEmbedding
from .grid import Grid
from .positions import Shape, Spacing
from .validation import require_floating, require_int, require_real

# A score matrix larger than this is refused unless the user raises the limit. A grid of 100 x 100 with 16
# heads (6.4 GB in float32) stays possible; what comes next, 200 x 200 (102 GB), is beyond ordinary machines.
MAX_SCORE_BYTES = 16 * 2**30


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
        **rose: Keywords of :class:`RoSE.RotarySpatialEmbedding`.

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
        **rose: Any,
    ) -> None:
        """Check the arguments and set up; see the class."""
        super().__init__()
        self.scale = require_real("scale", scale, above=0.0)
        self.max_score_bytes = require_int("max_score_bytes", max_score_bytes, minimum=1)
        self.rose = RotarySpatialEmbedding(dim, num_heads, spatial_dims, **rose)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        spacing: Spacing | None = None,
        grid_shape: Shape | None = None,
        k_spacing: Spacing | None = None,
        k_grid_shape: Shape | None = None,
        *,
        coordinates: Tensor | Grid | None = None,
        k_coordinates: Tensor | Grid | None = None,
        num_prefix_tokens: int = 0,
        k_num_prefix_tokens: int | None = None,
    ) -> Tensor:
        """Scores before the softmax.

        Args:
            q: Queries ``(batch, query tokens, dim)``.
            k: Keys ``(batch, key tokens, dim)``.
            spacing: See :meth:`RoSE.RotarySpatialEmbedding.rotate_pair`, as for all further arguments.
            grid_shape: Shape of the grid.
            k_spacing: Spacing of the keys' grid.
            k_grid_shape: Shape of the keys' grid.
            coordinates: Positions instead of a grid.
            k_coordinates: Positions of the keys.
            num_prefix_tokens: Leading tokens without position.
            k_num_prefix_tokens: The same for k, when it differs.

        Returns:
            ``(batch, heads, query tokens, key tokens)``, of q's dtype.

        Raises:
            TypeError: As :meth:`RoSE.RotarySpatialEmbedding.rotate_pair`.
            ValueError: As there, and when the scores would take more than ``max_score_bytes``.
        """
        _require_features(q=q, k=k)
        if q.dim() == 3 and k.dim() == 3:
            self._require_affordable(q, k)
        q, k = self._rotated(
            q, k, spacing, grid_shape, k_spacing, k_grid_shape,
            coordinates=coordinates, k_coordinates=k_coordinates,
            num_prefix_tokens=num_prefix_tokens, k_num_prefix_tokens=k_num_prefix_tokens,
        )  # fmt: skip
        return (q * self.scale if self.scale != 1.0 else q) @ k.transpose(-2, -1)

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
        coordinates: Tensor | Grid | None = None,
        k_coordinates: Tensor | Grid | None = None,
        num_prefix_tokens: int = 0,
        k_num_prefix_tokens: int | None = None,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
    ) -> Tensor:
        """The whole attention, ``softmax(scores) v``, through torch's fused kernels in linear memory.

        Args:
            q: Queries ``(batch, query tokens, dim)``.
            k: Keys ``(batch, key tokens, dim)``.
            v: Values ``(batch, key tokens, value dim)``, heads dividing the value dim. Not rotated.
            spacing: As :meth:`forward`, with all arguments up to ``k_num_prefix_tokens``.
            grid_shape: Shape of the grid.
            k_spacing: Spacing of the keys' grid.
            k_grid_shape: Shape of the keys' grid.
            coordinates: Positions instead of a grid.
            k_coordinates: Positions of the keys.
            num_prefix_tokens: Leading tokens without position.
            k_num_prefix_tokens: The same for k, when it differs.
            attn_mask: As in ``torch.nn.functional.scaled_dot_product_attention``.
            dropout_p: Probability of dropping an attention weight.

        Returns:
            ``(batch, query tokens, value dim)``.

        Raises:
            TypeError: As :meth:`forward`.
            ValueError: As :meth:`forward`, except for the limit on the scores, which are never stored.
        """
        _require_features(q=q, k=k, v=v)
        heads = self.rose.num_heads
        if v.dim() != 3 or v.shape[:2] != k.shape[:2] or v.shape[2] % heads:
            raise ValueError(
                f"v must be (batch, key tokens, value dim), a value dim divisible by {heads} heads, and k's "
                f"batch and tokens; got v {tuple(v.shape)} for k {tuple(k.shape)}"
            )
        require_real("dropout_p", dropout_p, minimum=0.0, maximum=1.0)
        q, k = self._rotated(
            q, k, spacing, grid_shape, k_spacing, k_grid_shape,
            coordinates=coordinates, k_coordinates=k_coordinates,
            num_prefix_tokens=num_prefix_tokens, k_num_prefix_tokens=k_num_prefix_tokens,
        )  # fmt: skip
        v = torch.unflatten(v, 2, (heads, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, scale=self.scale)
        return out.transpose(1, 2).flatten(2)

    def _rotated(self, q: Tensor, k: Tensor, *positions: Any, **more: Any) -> tuple[Tensor, Tensor]:
        """Rotated q and k with heads in front: ``(batch, heads, tokens, head size)``."""
        q, k = self.rose.rotate_pair(q, k, *positions, **more)
        split = (self.rose.num_heads, self.rose.head_dim)
        return torch.unflatten(q, 2, split).transpose(1, 2), torch.unflatten(k, 2, split).transpose(1, 2)

    def _require_affordable(self, q: Tensor, k: Tensor) -> None:
        wanted = q.shape[0] * self.rose.num_heads * q.shape[1] * k.shape[1] * q.element_size()
        if wanted > self.max_score_bytes:
            raise ValueError(
                f"the scores of {q.shape[1]} queries and {k.shape[1]} keys would take {wanted / 1e9:.1f} GB, "
                f"over max_score_bytes = {self.max_score_bytes / 1e9:.1f} GB: call attend(q, k, v, ...), "
                "which never stores them, or raise max_score_bytes"
            )


def _require_features(**features: Tensor) -> None:
    for name, tensor in features.items():
        require_floating(name, tensor)
    batches = {name: tensor.shape[0] for name, tensor in features.items() if tensor.dim()}
    if len(set(batches.values())) > 1:
        raise ValueError(f"all features must have one batch size; got {batches}")
