"""Parts of transformer blocks, and a block over several grids at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .attention import rotated
from .embedding import RotarySpatialEmbedding
from .grid import Grid
from .keywords import spell_out_rotary_keywords
from .masks import emptied
from .positions import Where, as_grid, require_coordinates, valid_tokens
from .softmax import attend
from .validation import (
    require_callable,
    require_flag,
    require_floating,
    require_int,
    require_probability,
    require_real,
    require_tensor,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .keywords import RotaryKeywords


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


@spell_out_rotary_keywords
class MultiResolutionBlock(nn.Module):
    """A pre-norm transformer block in which several grids, each with its own spacing, attend to one another.

    All grids share one physical frame: a voxel of a coarse grid meets the fine voxels at its place. The
    origin of a grid given by shape and spacing is 0; grids that start elsewhere are given as
    :class:`RoSE.Grid`.

    Args:
        dim: Channels.
        num_heads: Attention heads.
        spatial_dims: Axes of a position.
        mlp_ratio: Hidden channels of the MLP per channel (see :class:`MLP`).
        mlp_activation: Makes the MLP's nonlinearity.
        mlp_bias: Whether the MLP's linear layers have a bias.
        mlp_dropout: Dropout after either linear layer of the MLP, in [0, 1).
        qkv_bias: Whether the projections of q, k and v have a bias.
        attn_dropout: Probability of dropping an attention weight in training, in [0, 1).
        proj_dropout: Dropout after the attention's projection, in [0, 1).
        drop_path: Probability of dropping a residual branch for a sample in training, in [0, 1).
        norm_eps: Epsilon of the layer norms.
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
        mlp_ratio: float = 4.0,
        mlp_activation: Callable[[], nn.Module] = nn.GELU,
        mlp_bias: bool = True,
        mlp_dropout: float = 0.0,
        qkv_bias: bool = True,
        attn_dropout: float = 0.0,
        proj_dropout: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **rotary: Unpack[RotaryKeywords],
    ) -> None:
        """Check the arguments and set up; see the class."""
        super().__init__()
        self.rotary = RotarySpatialEmbedding(dim, num_heads, spatial_dims, device=device, dtype=dtype, **rotary)
        # Its own, because an adapter may stand in the embedding's place, which can be called and nothing else.
        self.dim, self.num_heads, self.spatial_dims = dim, num_heads, spatial_dims
        self.attn_dropout = require_probability("attn_dropout", attn_dropout)
        require_real("norm_eps", norm_eps, minimum=0.0)
        require_flag("qkv_bias", qkv_bias)
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps, device=device, dtype=dtype)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(require_probability("proj_dropout", proj_dropout))
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps, device=device, dtype=dtype)
        self.mlp = MLP(
            dim,
            mlp_ratio=mlp_ratio,
            dropout=require_probability("mlp_dropout", mlp_dropout),
            bias=require_flag("mlp_bias", mlp_bias),
            activation=require_callable("mlp_activation", mlp_activation),
            device=device,
            dtype=dtype,
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
        valid: Any = None,
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
            valid: Which tokens are real: per grid None or ``(batch, *grid)`` or ``(batch, tokens of the grid)``, or
                just one. The others are seen by nobody and come out as they went in.

        Returns:
            What was given: a list of tensors of the same shapes, or a tensor.

        Raises:
            TypeError: As :meth:`RoSE.RotarySpatialEmbedding.forward`.
            ValueError: As there, or lists of lengths that disagree.
        """
        if isinstance(x, Tensor):
            if leading_tokens:
                raise ValueError("leading_tokens must be False unless x is a list, the leading tokens first; got True")
            _require_parts([x], self.dim)
            return self._apply_to_parts([x], [Where(spacing, grid_shape, coordinates)], [valid], leading=False)[0]
        parts = _listed(x)
        count = len(parts) - require_flag("leading_tokens", leading_tokens)
        if count < 1:
            raise ValueError(f"x must hold at least one grid's tokens; got {len(parts)} tensors")
        given = {"spacing": spacing, "grid_shape": grid_shape, "coordinates": coordinates, "valid": valid}
        *said, masks = (_per_grid(name, values, count) for name, values in given.items())
        _require_parts(parts, self.dim)
        return self._apply_to_parts(
            parts, [Where(*each) for each in zip(*said, strict=True)], masks, leading=leading_tokens
        )

    def _apply_to_parts(
        self, parts: list[Tensor], places: list[Where], masks: list[Tensor | None], *, leading: bool
    ) -> list[Tensor]:
        lengths = [part.shape[1] for part in parts]
        gridded = parts[int(leading) :]
        where = _one_behind_the_other(places, gridded, self.spatial_dims, lengths[0] if leading else 0)
        valid = _valid_parts(parts, places, masks, leading)

        given = torch.cat(parts, dim=1)
        x = emptied(given, valid)
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        q, k = rotated(self.rotary, q, k, where, where)
        dropout = self.attn_dropout if self.training else 0.0
        mixed = attend(q, k, v, self.num_heads, k_valid=valid, dropout_p=dropout)
        x = x + self.drop_path(self.proj_drop(self.proj(mixed)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        if valid is not None:
            x = torch.where(valid.unsqueeze(-1), x, given)
        return list(torch.split(x, lengths, dim=1))


def _one_behind_the_other(places: list[Where], parts: list[Tensor], spatial_dims: int, prefix: int) -> Where:
    """Where all tokens are, from where each grid's are."""
    names = ("spacing", "grid_shape", "coordinates")
    pieces: list[Tensor | Grid] = []
    spacings: list[Any] = []
    for (spacing, grid_shape, coordinates, _), part in zip(places, parts, strict=True):
        if coordinates is None or isinstance(coordinates, Grid):
            pieces.append(as_grid(spatial_dims, part.shape[1], spacing, grid_shape, coordinates, names=names))
            spacings.append(None)
            continue
        if grid_shape is not None:
            raise ValueError(f"grid_shape must be None beside coordinates; got {grid_shape!r}")
        pieces.append(require_coordinates(coordinates, spatial_dims, part.shape[1]))
        spacings.append(spacing)
    return Where(spacings, None, pieces, prefix)


def _valid_parts(parts: list[Tensor], places: list[Where], masks: list[Tensor | None], leading: bool) -> Tensor | None:
    """Which of all tokens are real, ``(batch, tokens)``; None where all are."""
    if all(mask is None for mask in masks):
        return None
    real = [part.new_ones(part.shape[:2], dtype=torch.bool) for part in parts]
    for index, (mask, where) in enumerate(zip(masks, places, strict=True)):
        if mask is not None:
            at = index + leading
            real[at] = valid_tokens(f"valid[{index}]", mask, where, *parts[at].shape[:2])
    return torch.cat(real, dim=1)


def _per_grid(name: str, values: Any, count: int) -> list[Any]:
    """One entry per grid; None stands for none anywhere."""
    if values is None:
        return [None] * count
    if isinstance(values, (str, Tensor, Grid)) or not isinstance(values, Sequence) or len(values) != count:
        raise ValueError(f"{name} must be a list with one entry for each of the {count} grids; got {values!r}")
    return list(values)


def _listed(x: Any) -> list[Tensor]:
    """What is no tensor must be a list of them."""
    return list(x) if isinstance(x, Sequence) else [require_tensor("x", x)]


def _require_parts(parts: list[Tensor], dim: int) -> None:
    for index, part in enumerate(parts):
        require_floating(f"x[{index}]", part)
        if part.dim() != 3 or part.shape[-1] != dim or part.shape[0] != parts[0].shape[0]:
            raise ValueError(
                f"x[{index}] must be (batch, tokens, {dim}) with the batch size of x[0]; "
                f"got {tuple(part.shape)} beside {tuple(parts[0].shape)}"
            )
        if part.dtype != parts[0].dtype:
            raise TypeError(f"x[{index}] must have the dtype of x[0], {parts[0].dtype}; got {part.dtype}")
