"""From one stage to the next: grouping, or the strided convolution of its uniform twin."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..assignment import Assignment
from ..geometry import coarsen, group_validity, relate
from ..layers import DenseSpatialGroupingAttention, SparseSpatialGroupingAttention
from .tokens import CONVOLUTIONS, Tokens, as_image, as_rows, blanked

DOWNSAMPLES = ("group", "conv")
GROUPINGS = ("sparse", "dense")


class QuietNorm(nn.LayerNorm):
    """A LayerNorm that starts with a weight of 0: what it ends is left out of a sum until training brings it in.

    Swin V2's start of branches that are normed at their end (arXiv:2111.09883). Of everything a grouping layer adds
    up, the convolution alone knows how tokens lie within their group; were the others as loud from the beginning, it
    would be a small part of the sum.
    """

    def reset_parameters(self) -> None:
        """Scale by 0, shift by 0."""
        super().reset_parameters()
        nn.init.zeros_(self.weight)


class Grouping(nn.Module):
    """A grouping layer between two stages, which starts as the strided convolution within it.

    Args:
        kind: ``"sparse"`` (a token sees the groups in a window around its own) or ``"dense"`` (all of them).
        dim: channels of the tokens.
        out_dims: channels of the groups.
        window: groups in the window, per axis; only where sparse.
        options: further keywords of the layer, ``device`` and ``dtype`` among them.
    """

    def __init__(self, kind: str, dim: int, out_dims: int, window: tuple[int, ...], options: dict[str, Any]) -> None:
        super().__init__()
        self.layer: SparseSpatialGroupingAttention | DenseSpatialGroupingAttention
        if kind == "sparse":
            self.layer = SparseSpatialGroupingAttention(
                dim, len(window), out_dims=out_dims, neighborhood_kernel=window, **options
            )
        else:
            self.layer = DenseSpatialGroupingAttention(dim, len(window), out_dims=out_dims, **options)
        made = {name: options[name] for name in ("device", "dtype")}
        self.layer.norm_attention = QuietNorm(out_dims, **made)
        self.layer.norm_mlp = QuietNorm(out_dims, **made)
        # No token is masked here, and a parameter that never has a gradient stops distributed training.
        self.layer.register_parameter("mask_embedding", None)

    def forward(self, tokens: Tokens) -> tuple[Tokens, Assignment]:
        """Tokens (B, N, dim) -> groups (B, N_out, out_dims) on their grid, and the tokens' memberships in them."""
        output = self.layer(tokens.x, input_grid=tokens.grid, valid=tokens.valid)
        return Tokens(output.x_out, output.grid, output.valid), output.assignment


class StridedConvolution(nn.Module):
    """What grouping is measured against: a strided convolution and a LayerNorm.

    Args:
        dim: channels of the tokens.
        out_dims: channels of what comes out.
        kernel_size: odd, per axis.
        stride: per axis.
        made: ``device`` and ``dtype`` of the parameters.
    """

    def __init__(
        self, dim: int, out_dims: int, kernel_size: tuple[int, ...], stride: tuple[int, ...], made: dict[str, Any]
    ) -> None:
        super().__init__()
        self.kernel_size, self.stride = kernel_size, stride
        self.padding = tuple((k - 1) // 2 for k in kernel_size)
        self.proj = CONVOLUTIONS[len(stride)](dim, out_dims, kernel_size, stride, self.padding, **made)
        self.norm = nn.LayerNorm(out_dims, **made)

    def forward(self, tokens: Tokens) -> tuple[Tokens, None]:
        """Tokens (B, N, dim) -> tokens (B, N_out, out_dims) on the coarser grid, and no memberships."""
        x, grid, valid = tokens
        sizes = self.kernel_size, self.stride, self.padding
        coarse = coarsen(grid, *sizes)
        if valid is not None:
            ones = (1,) * grid.ndim
            relation = relate(grid.shape, coarse.shape, self.stride, self.kernel_size, self.padding, ones, ones)
            valid = group_validity(valid, relation)
        x = self.norm(as_rows(self.proj(as_image(x, grid.shape))))
        return Tokens(blanked(x, valid), coarse, valid), None


def make_downsample(
    way: str,
    dim: int,
    out_dims: int,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    kind: str,
    window: tuple[int, ...],
    options: dict[str, Any],
    made: dict[str, Any],
) -> Grouping | StridedConvolution:
    """What stands between two stages: ``way`` is one of DOWNSAMPLES, the rest as the two modules say."""
    if way == "conv":
        return StridedConvolution(dim, out_dims, kernel_size, stride, made)
    options = {"kernel_size": kernel_size, "stride": stride, **options, **made}
    return Grouping(kind, dim, out_dims, window, options)
