"""Dense grouping: every token sees every group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from RoSE.keywords import RotaryKeywords, spell_out_rotary_keywords
from torch import nn

from .grouping import Ints, SpatialGroupingAttention

if TYPE_CHECKING:
    from typing_extensions import Unpack


@spell_out_rotary_keywords
class DenseSpatialGroupingAttention(SpatialGroupingAttention):
    """Grouping in which every token may belong to any group; for the coarse, last stages of a backbone.

    Cost grows as N_in * N_out, memory as N_in + N_out.

    Args:
        relative_bias: must be False: a table over all offsets would change with the grid.
        feature_dims, spatial_dims, kernel_size, num_heads, stride, padding, iters, mlp_ratio, out_dims, mlp_dropout,
            mlp_bias, mlp_activation, qkv_bias, spacing, backend, drop_path, checkpoint, temperature, norm_tokens,
            device, dtype, **rotary: see :class:`SpatialGroupingAttention`.

    Raises:
        TypeError: an argument has the wrong type or is unknown.
        ValueError: an argument is out of range, sizes do not divide, or a relative bias is asked for.
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
        drop_path: float = 0.0,
        checkpoint: bool = False,
        temperature: str = "fixed",
        norm_tokens: bool = False,
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
            device=device,
            dtype=dtype,
            **rotary,
        )
        if self.relative_bias:
            raise ValueError(
                "relative_bias must be False for dense grouping, whose table would change with the grid (use "
                "SparseSpatialGroupingAttention, or rely on the rotary embedding); got True"
            )

    def window(self, output_shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A window that reaches from either end of the grid to the other."""
        return tuple(2 * g - 1 for g in output_shape), (1,) * len(output_shape)
