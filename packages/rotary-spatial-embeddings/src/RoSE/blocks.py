"""Ready-made layers: multi-head attention with projections, and a transformer block over several grids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .embedding import RotarySpatialEmbedding
from .grid import Grid
from .positions import Shape, Spacing, require_batch
from .validation import (
    require_callable,
    require_flag,
    require_floating,
    require_int,
    require_probability,
    require_real,
)


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
        attn_dropout: Probability of dropping an attention weight in training.
        proj_dropout: Probability of dropping an output channel in training.
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
        context_dim: int | None = None,
        qkv_bias: bool = True,
        attn_dropout: float = 0.0,
        proj_dropout: float = 0.0,
        **rose: Any,
    ) -> None:
        """Check the arguments and set up; see the class."""
        super().__init__()
        self.rose = RotarySpatialEmbedding(dim, num_heads, spatial_dims, **rose)
        self.context_dim = dim if context_dim is None else require_int("context_dim", context_dim, minimum=1)
        self.attn_dropout = require_probability("attn_dropout", attn_dropout)
        self.query = nn.Linear(dim, dim, bias=qkv_bias)
        self.key_value = nn.Linear(self.context_dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_dropout = nn.Dropout(require_probability("proj_dropout", proj_dropout))

    def forward(
        self,
        x: Tensor,
        spacing: Spacing | None = None,
        grid_shape: Shape | None = None,
        k_spacing: Spacing | None = None,
        k_grid_shape: Shape | None = None,
        *,
        context: Tensor | None = None,
        coordinates: Tensor | Grid | None = None,
        k_coordinates: Tensor | Grid | None = None,
        num_prefix_tokens: int = 0,
        k_num_prefix_tokens: int | None = None,
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
            attn_mask: As in ``scaled_dot_product_attention``.
            is_causal: Let tokens see only tokens that are not behind them in the sequence.

        Returns:
            ``(batch, tokens, dim)``.

        Raises:
            TypeError: As :meth:`RoSE.RotarySpatialEmbedding.rotate_pair`.
            ValueError: As there.
        """
        context = x if context is None else context
        for name, tensor, channels in (("x", x, self.rose.dim), ("context", context, self.context_dim)):
            require_floating(name, tensor)
            if tensor.dim() != 3 or tensor.shape[-1] != channels:
                raise ValueError(f"{name} must be (batch, tokens, {channels}); got {tuple(tensor.shape)}")
        q = self.query(x)
        k, v = self.key_value(context).chunk(2, dim=-1)
        q, k = self.rose.rotate_pair(
            q, k, spacing, grid_shape, k_spacing, k_grid_shape,
            coordinates=coordinates, k_coordinates=k_coordinates,
            num_prefix_tokens=num_prefix_tokens, k_num_prefix_tokens=k_num_prefix_tokens,
        )  # fmt: skip
        dropout = self.attn_dropout if self.training else 0.0
        out = attend(q, k, v, self.rose.num_heads, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal)
        projected: Tensor = self.proj_dropout(self.proj(out))
        return projected


def attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int, **sdpa: Any) -> Tensor:
    """Attention of ``(batch, tokens, channels)`` tensors through torch's fused kernels."""
    if q.is_nested:  # whose kernels want every argument contiguous; v is a slice of a projection
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    q, k, v = (torch.unflatten(t, -1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **sdpa).transpose(1, 2).flatten(2)


class MLP(nn.Module):
    """The two-layer perceptron of a transformer block, on the last axis.

    Args:
        dim: Channels in and out.
        mlp_ratio: Hidden channels per channel; their number is rounded down and at least 1.
        dropout: Probability of dropping a channel in training, after either linear layer.
        bias: Whether the linear layers have one.
        activation: Makes the nonlinearity's module.
        device: Where to put the parameters.
        dtype: Of the parameters.

    Raises:
        TypeError: Arguments of the wrong type.
        ValueError: Arguments that break a rule.
    """

    def __init__(
        self,
        dim: int,
        *,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        bias: bool = True,
        activation: Callable[[], nn.Module] = nn.GELU,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Check the arguments and set up; see the class."""
        super().__init__()
        require_int("dim", dim, minimum=1)
        hidden = max(1, int(dim * require_real("mlp_ratio", mlp_ratio, above=0.0)))
        require_flag("bias", bias)
        self.fc1 = nn.Linear(dim, hidden, bias=bias, device=device, dtype=dtype)
        self.act = require_callable("activation", activation)()
        self.fc2 = nn.Linear(hidden, dim, bias=bias, device=device, dtype=dtype)
        self.dropout = nn.Dropout(require_probability("dropout", dropout))

    def forward(self, x: Tensor) -> Tensor:
        """``(..., dim) -> (..., dim)``."""
        hidden = self.dropout(self.act(self.fc1(x)))
        out: Tensor = self.dropout(self.fc2(hidden))
        return out


class DropPath(nn.Module):
    """Leave out whole samples of a residual branch in training (stochastic depth; Huang et al., arXiv:1603.09382).

    Kept samples are scaled by ``1 / (1 - rate)``, so that the branch's mean stays.

    Args:
        rate: Probability of leaving a sample out, in [0, 1).

    Raises:
        TypeError: A rate that is not a number.
        ValueError: A rate outside of [0, 1).
    """

    def __init__(self, rate: float = 0.0) -> None:
        """Check the arguments and set up; see the class."""
        super().__init__()
        self.rate = require_probability("rate", rate)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, ...) -> (batch, ...)``; x itself where nothing is left out."""
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand(x.shape[0], *(1,) * (x.dim() - 1), device=x.device) >= self.rate
        return x * (keep.to(x.dtype) / (1 - self.rate))

    def extra_repr(self) -> str:
        """What ``print(module)`` shows."""
        return f"rate={self.rate:g}"


class MultiResolutionBlock(nn.Module):
    """A pre-norm transformer block in which several grids, each with its own spacing, attend to one another.

    All grids share one physical frame: a voxel of a coarse grid meets the fine voxels at its place. The
    origin of a grid given by shape and spacing is 0; grids that start elsewhere are given as
    :class:`RoSE.Grid`.

    Args:
        dim: Channels.
        num_heads: Attention heads.
        spatial_dims: Axes of a position.
        mlp_ratio: Hidden channels of the MLP per channel.
        mlp_activation: Makes the MLP's nonlinearity.
        mlp_bias: Whether the MLP's linear layers have a bias.
        mlp_dropout: Dropout after either linear layer of the MLP.
        qkv_bias: Whether the projections of q, k and v have a bias.
        attn_dropout: Probability of dropping an attention weight in training.
        proj_dropout: Dropout after the attention's projection.
        drop_path: Probability of dropping a residual branch for a sample in training, in [0, 1).
        norm_eps: Epsilon of the layer norms.
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
        mlp_ratio: float = 4.0,
        mlp_activation: Callable[[], nn.Module] = nn.GELU,
        mlp_bias: bool = True,
        mlp_dropout: float = 0.0,
        qkv_bias: bool = True,
        attn_dropout: float = 0.0,
        proj_dropout: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
        **rose: Any,
    ) -> None:
        """Check the arguments and set up; see the class."""
        super().__init__()
        self.rose = RotarySpatialEmbedding(dim, num_heads, spatial_dims, **rose)
        self.attn_dropout = require_probability("attn_dropout", attn_dropout)
        require_real("norm_eps", norm_eps, minimum=0.0)
        require_callable("mlp_activation", mlp_activation)
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_dropout = nn.Dropout(require_probability("proj_dropout", proj_dropout))
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = MLP(
            dim,
            mlp_ratio=mlp_ratio,
            dropout=require_probability("mlp_dropout", mlp_dropout),
            bias=require_flag("mlp_bias", mlp_bias),
            activation=mlp_activation,
        )
        self.drop_path = DropPath(require_probability("drop_path", drop_path))

    def forward(
        self,
        x: Tensor | Sequence[Tensor],
        spacing: Any = None,
        grid_shape: Any = None,
        *,
        coordinates: Any = None,
        leading_tokens: bool = False,
    ) -> Tensor | list[Tensor]:
        """Apply the block.

        Args:
            x: Tokens of the grids, a list of ``(batch, tokens of the grid, dim)``; or one such tensor.
            spacing: One spacing per grid, each in any form :meth:`RoSE.RotarySpatialEmbedding.forward` takes;
                for a single tensor just its spacing. None means 1 for all.
            grid_shape: One shape per grid; for a single tensor just its shape.
            coordinates: Instead of the two: one tensor or :class:`RoSE.Grid` per grid, or just one.
            leading_tokens: Whether the first tensor of the list holds tokens without a position (class
                tokens, registers): they attend and are attended to, unrotated.

        Returns:
            What was given: a list of tensors of the same shapes, or a tensor.

        Raises:
            TypeError: As :meth:`RoSE.RotarySpatialEmbedding.forward`.
            ValueError: As there, or lists of lengths that disagree.
        """
        if isinstance(x, Tensor):
            if leading_tokens:
                raise ValueError("leading_tokens=True needs a list of tensors, the leading tokens first; got a tensor")
            _require_parts([x], self.rose.dim)
            return self._block([x], [spacing], [grid_shape], [coordinates], leading=False)[0]
        parts = list(x)
        count = len(parts) - bool(leading_tokens)
        if count < 1:
            raise ValueError(f"x must hold at least one grid's tokens; got {len(parts)} tensors")
        given = {"spacing": spacing, "grid_shape": grid_shape, "coordinates": coordinates}
        each = [_per_grid(name, values, count) for name, values in given.items()]
        _require_parts(parts, self.rose.dim)
        return self._block(parts, *each, leading=leading_tokens)

    def _block(
        self,
        parts: list[Tensor],
        spacings: list[Any],
        shapes: list[Any],
        coordinates: list[Any],
        *,
        leading: bool,
    ) -> list[Tensor]:
        lengths = [part.shape[1] for part in parts]
        gridded = parts[1:] if leading else parts
        placed = [
            self.rose.positions(part.shape[1], *where, device=part.device)
            for part, *where in zip(gridded, spacings, shapes, coordinates, strict=True)
        ]
        batch = parts[0].shape[0]
        if any(points.dim() == 3 for points in placed):
            placed = [require_batch(points, batch).expand(batch, -1, -1) for points in placed]
        positions = torch.cat(placed, dim=-2)

        x = torch.cat(parts, dim=1)
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        q, k = self.rose.rotate_at(positions, q, k, num_prefix_tokens=lengths[0] if leading else 0)
        dropout = self.attn_dropout if self.training else 0.0
        x = x + self.drop_path(self.proj_dropout(self.proj(attend(q, k, v, self.rose.num_heads, dropout_p=dropout))))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return list(x.split(lengths, dim=1))


def _per_grid(name: str, values: Any, count: int) -> list[Any]:
    """One entry per grid; None stands for none anywhere."""
    if values is None:
        return [None] * count
    if isinstance(values, (str, Tensor, Grid)) or not isinstance(values, Sequence) or len(values) != count:
        raise ValueError(f"{name} must be a list with one entry for each of the {count} grids; got {values!r}")
    return list(values)


def _require_parts(parts: list[Tensor], dim: int) -> None:
    for index, part in enumerate(parts):
        require_floating(f"x[{index}]", part)
        if part.dim() != 3 or part.shape[-1] != dim or part.shape[0] != parts[0].shape[0]:
            raise ValueError(
                f"x[{index}] must be (batch, tokens, {dim}) with the batch size of x[0]; "
                f"got {tuple(part.shape)} beside {tuple(parts[0].shape)}"
            )
