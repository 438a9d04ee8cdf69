"""The ``rope_impl`` slot of Primus, nnU-Net's transformer (package ``dynamic-network-architectures``)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from ..validation import require_shape
from .slot import spell_out_keywords
from .timm import TimmRope

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..keywords import RotaryKeywords


@spell_out_keywords
class PrimusRope(TimmRope):
    """``Primus(..., rope_impl=PrimusRope, rope_kwargs={"num_heads": 12, "spacing": ...})``.

    Args:
        dim: What Primus says: the head size, and two thirds of it for volumes.
        in_pixels: False; Primus says so.
        feat_shape: Tokens along each axis; Primus says it.
        ref_feat_shape: The same; Primus says it.
        num_heads: Of the network (``eva_numheads``); with 1 all heads share their wave vectors.
        spacing: Distance between tokens in physical units, voxel size times ``patch_embed_size``: a number or one per
            axis.
        device: Where to put the wave vectors.
        dtype: Of the wave vectors.
        **rotary: Keywords of :class:`RoSE.RotarySpatialEmbedding`.

    Raises:
        TypeError: Arguments of the wrong type.
        ValueError: Arguments that break a rule, or that ask for what a spacing replaces: ``in_pixels``, or a
            ``ref_feat_shape`` that is not ``feat_shape``.
    """

    def __init__(
        self,
        dim: int,
        in_pixels: bool,
        feat_shape: Sequence[int],
        ref_feat_shape: Sequence[int],
        *,
        num_heads: int = 1,
        spacing: float | Iterable[float] = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **rotary: Unpack[RotaryKeywords],
    ) -> None:
        """Check the arguments and set up; see the class."""
        shape = require_shape("feat_shape", feat_shape)
        if in_pixels or tuple(ref_feat_shape) != shape:
            raise ValueError(
                "in_pixels must be False and ref_feat_shape must be feat_shape: positions come from the spacing; "
                f"got in_pixels={in_pixels}, feat_shape={feat_shape}, ref_feat_shape={ref_feat_shape}"
            )
        head_dim = dim * 3 // 2 if len(shape) == 3 else dim
        super().__init__(
            head_dim * num_heads, num_heads, len(shape),
            grid_shape=shape, spacing=spacing, device=device, dtype=dtype, **rotary,
        )  # fmt: skip
