"""Sparse grouping: every token sees the groups around its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from RoSE.keywords import RotaryKeywords, spell_out_rotary_keywords
from RoSE.validation import require_ints, require_odd
from torch import nn

from .grouping import Ints, SpatialGroupingAttention

if TYPE_CHECKING:
    from typing_extensions import Unpack


@spell_out_rotary_keywords
class SparseSpatialGroupingAttention(SpatialGroupingAttention):
    """Grouping in which a token may belong to the groups in a window around its own; for large, early stages.

    Cost grows as N_in * window, memory as N_in. With ``backend="tiled"`` a dilated window costs as much as the
    undilated one that reaches as far; with ``"native"`` next to nothing more than an undilated one.

    Other arguments are those of :class:`SpatialGroupingAttention`.

    Args:
        neighborhood_kernel: odd number of groups in the window; int or one per axis. Clipped at borders.
        neighborhood_dilation: distance between the window's groups; int or one per axis.

    Raises:
        TypeError: an argument has the wrong type or is unknown.
        ValueError: an argument is out of range, sizes do not divide, or the window is even.
    """

    def __init__(
        self,
        feature_dims: int = 128,
        spatial_dims: int = 3,
        kernel_size: Ints = 7,
        num_heads: int = 16,
        stride: Ints | None = None,
        padding: Ints | None = None,
        iters: int = 3,
        mlp_ratio: float = 4,
        out_dims: int | None = None,
        mlp_dropout: float = 0.0,
        mlp_bias: bool = True,
        mlp_activation: Callable[[], nn.Module] = nn.GELU,
        qkv_bias: bool = True,
        spacing: float | Sequence[float] | None = None,
        relative_bias: bool = False,
        backend: str = "auto",
        *,
        neighborhood_kernel: Ints = 3,
        neighborhood_dilation: Ints = 1,
        drop_path: float = 0.0,
        checkpoint: bool = False,
        temperature: str = "fixed",
        norm_tokens: bool = False,
        compactness: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **rotary: Unpack[RotaryKeywords],
    ) -> None:
        super().__init__(
            feature_dims,
            spatial_dims,
            kernel_size,
            num_heads,
            stride,
            padding,
            iters,
            mlp_ratio,
            out_dims,
            mlp_dropout,
            mlp_bias,
            mlp_activation,
            qkv_bias,
            spacing,
            relative_bias,
            backend,
            drop_path=drop_path,
            checkpoint=checkpoint,
            temperature=temperature,
            norm_tokens=norm_tokens,
            compactness=compactness,
            device=device,
            dtype=dtype,
            **rotary,
        )
        window = require_ints("neighborhood_kernel", neighborhood_kernel, spatial_dims, minimum=1)
        self.neighborhood_kernel = require_odd("neighborhood_kernel", window)
        self.neighborhood_dilation = require_ints(
            "neighborhood_dilation", neighborhood_dilation, spatial_dims, minimum=1
        )
        if self.relative_bias:
            self.bias_table = nn.Parameter(torch.zeros(num_heads, *window, device=device, dtype=dtype))

    def window(self, output_shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The layer's window, whatever the grid."""
        return self.neighborhood_kernel, self.neighborhood_dilation
