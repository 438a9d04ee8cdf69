"""The grouping layer; its variants differ only in which groups a token sees."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange
from RoSE import Grid, RotarySpatialEmbedding
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import functional, validation
from ..assignment import Assignment, AttentionAssignment
from ..functional import Backend
from ..geometry import Neighbourhood, coarse_shape, coarsen
from ..output import GroupingOutput
from .drop_path import DropPath
from .mlp import MLP

Ints = int | Sequence[int]
Spacing = float | Sequence[float] | Tensor

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class SpatialGroupingAttention(nn.Module, ABC):
    """Downsample a grid of tokens by softly assigning them to groups (arXiv:2505.16993, section 3).

    A strided convolution proposes one group per stride; then, ``iters`` times, the groups attend to the tokens
    with memberships that compete over groups, and take up what their members carry:

        x_out = norm(conv(x))
        repeat:  x_out += norm(grouping_attention(q(x_out), k(x), v(x)));  x_out += norm(mlp(x_out))

    Queries and keys are rotated (RoSE) at their physical positions in one frame: a group lies at the centre of its
    receptive field.

    Args:
        feature_dims: channels of the tokens; divisible by ``num_heads`` into an even head size.
        spatial_dims: axes of the grid: 1, 2 or 3.
        kernel_size: of the convolution that proposes the groups; int or one per axis.
        num_heads: attention heads; divides ``out_dims`` too.
        stride: tokens per group along each axis; None for half the kernel, at least 1.
        padding: zero padding of the convolution; None for (kernel - 1)//2.
        iters: rounds of grouping and MLP; with 0 the groups stay as proposed and only the memberships are made.
        mlp_ratio: hidden channels of the MLP as a multiple of ``out_dims``.
        out_dims: channels of the groups; None for ``feature_dims``.
        mlp_dropout: probability, in [0, 1).
        mlp_bias: whether the MLP's linear layers have a bias.
        mlp_activation: makes the MLP's activation module.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        spacing: physical distance between input tokens when ``forward`` is given none; a number, or one per
            axis; None for 1.
        relative_bias: whether to learn a bias per head and window offset; needs a window.
        backend: see :func:`.functional.grouping_attention`.
        drop_path: probability, in [0, 1), of leaving out a sample's residual branch while training (stochastic
            depth, arXiv:1603.09382).
        checkpoint: recompute every iteration in the backward pass instead of keeping its activations.
        **rose: keywords of :class:`RoSE.RotarySpatialEmbedding`, such as ``base_theta`` or ``rotary_ratio``;
            ``reference_spacing`` is ``spacing`` where only that is given.

    Raises:
        TypeError: an argument has the wrong type or is unknown.
        ValueError: an argument is out of range, or sizes do not divide.
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
        **rose: Any,
    ) -> None:
        super().__init__()
        validation.one_of("spatial_dims", spatial_dims, _CONVOLUTIONS)
        self.feature_dims = validation.positive_int("feature_dims", feature_dims)
        self.spatial_dims = spatial_dims
        self.num_heads = validation.positive_int("num_heads", num_heads)
        self.out_dims = self.feature_dims if out_dims is None else validation.positive_int("out_dims", out_dims)
        validation.divides("num_heads", num_heads, "feature_dims", feature_dims)
        validation.divides("num_heads", num_heads, "out_dims", self.out_dims)
        self.kernel_size = validation.per_axis("kernel_size", kernel_size, spatial_dims, minimum=1)
        if stride is None:
            stride = tuple(max(1, k // 2) for k in self.kernel_size)
        if padding is None:
            padding = tuple((k - 1) // 2 for k in self.kernel_size)
        self.stride = validation.per_axis("stride", stride, spatial_dims, minimum=1)
        self.padding = validation.per_axis("padding", padding, spatial_dims, minimum=0)
        self.iters = validation.positive_int("iters", iters, minimum=0)
        if not callable(mlp_activation):
            raise TypeError(f"mlp_activation must be callable and make a module, got {mlp_activation!r}")
        if validation.finite_number("mlp_ratio", mlp_ratio) <= 0:
            raise ValueError(f"mlp_ratio must be positive, got {mlp_ratio}")
        validation.probability("mlp_dropout", mlp_dropout)
        validation.one_of("backend", backend, [b.value for b in Backend])
        self.backend = backend
        # A grid of one point checks a spacing and spells it out per axis.
        self.spacing = Grid((1,) * spatial_dims, 1.0 if spacing is None else spacing).spacing
        if "wavelengths" not in rose:  # which are in physical units already
            rose.setdefault("reference_spacing", self.spacing)

        convolution: Any = _CONVOLUTIONS[spatial_dims]
        self.propose = convolution(self.feature_dims, self.out_dims, self.kernel_size, self.stride, self.padding)
        self.norm_proposal = nn.LayerNorm(self.out_dims)
        self.to_q = nn.Linear(self.out_dims, self.feature_dims, bias=qkv_bias)
        self.to_k = nn.Linear(self.feature_dims, self.feature_dims, bias=qkv_bias)
        self.to_v = nn.Linear(self.feature_dims, self.out_dims, bias=qkv_bias)
        self.rotary = RotarySpatialEmbedding(self.feature_dims, num_heads, spatial_dims, **rose)
        self.norm_attention = nn.LayerNorm(self.out_dims)
        self.norm_mlp = nn.LayerNorm(self.out_dims)
        self.mlp = MLP(
            self.out_dims,
            max(1, round(self.out_dims * mlp_ratio)),
            dropout=mlp_dropout,
            bias=mlp_bias,
            activation=mlp_activation,
        )
        self.mask_embedding = nn.Parameter(torch.zeros(self.feature_dims))
        self.drop_path = DropPath(validation.probability("drop_path", drop_path))
        self.checkpoint = validation.flag("checkpoint", checkpoint)
        self.relative_bias = validation.flag("relative_bias", relative_bias)
        self.bias_table: nn.Parameter | None = None

    @abstractmethod
    def window(self, output_shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Window and dilation per axis, in groups, for a grid of groups."""

    def neighbourhood(self, input_grid_shape: Sequence[int]) -> Neighbourhood:
        """The relation between tokens and groups for an input grid."""
        input_shape = tuple(input_grid_shape)
        output_shape = coarse_shape(input_shape, self.kernel_size, self.stride, self.padding)
        window, dilation = self.window(output_shape)
        return Neighbourhood(input_shape, output_shape, self.stride, self.kernel_size, self.padding, window, dilation)

    def forward(
        self,
        x: Tensor,
        input_spacing: Spacing | None = None,
        input_grid_shape: Sequence[int] | None = None,
        mask: Tensor | None = None,
        *,
        input_origin: Spacing = 0.0,
    ) -> GroupingOutput:
        """Group the tokens of a grid.

        Args:
            x: tokens (B, N, feature_dims), row-major over the grid.
            input_spacing: physical distance between tokens: a number, one per axis, a tensor (spatial_dims,), or
                one row per sample (B, spatial_dims); None for the constructor's ``spacing``.
            input_grid_shape: tokens along each axis; may be left out in 1-D and where ``mask`` shows it.
            mask: (B, *grid) boolean; true tokens are replaced by the learned mask embedding.
            input_origin: physical position of the first token; only moves ``out_origin``.

        Returns:
            Groups, where they lie, and the memberships of the last iteration; see :class:`GroupingOutput`.

        Raises:
            TypeError: x is not floating, or the mask not boolean.
            ValueError: shapes disagree, the spacing is not positive and finite, or the grid is smaller than the
                kernel allows.
        """
        grid = self._input_grid(x, input_spacing, input_grid_shape, mask, input_origin)
        neighbourhood = self.neighbourhood(grid.shape)
        coarse = coarsen(grid, self.kernel_size, self.stride, self.padding)
        if mask is not None:
            x = torch.where(mask.flatten(1)[..., None], self.mask_embedding.to(x.dtype), x)

        groups = self.norm_proposal(self._convolve(x, grid.shape))
        turn_tokens, turn_groups = self._angles(Grid(grid.shape, grid.spacing), x)
        k = self._heads(self.rotary.rotate(self.to_k(x), *turn_tokens))
        v = self._heads(self.to_v(x))
        relation = self.relate(x, neighbourhood)
        q = self._queries(groups, turn_groups)
        for i in range(self.iters):
            q = q if i == 0 else self._queries(groups, turn_groups)
            groups = self._recomputed(self._update, groups, q, k, v, relation)
        return GroupingOutput(groups, coarse.shape, coarse.spacing, coarse.origin, self.assignment(q, k, relation))

    def relate(self, x: Tensor, neighbourhood: Neighbourhood) -> Any:
        """What decides which groups a token sees: computed once from the tokens, the same in every iteration."""
        return neighbourhood

    def group(self, q: Tensor, k: Tensor, v: Tensor, relation: Any) -> Tensor:
        """Average the members of every group: q (B, H, N_out, D), k and v (B, H, N_in, ...) -> (B, H, N_out, C)."""
        out, _ = functional.grouping_attention(q, k, v, relation, bias=self._bias(q), backend=self.backend)
        return out

    def assignment(self, q: Tensor, k: Tensor, relation: Any) -> Assignment:
        """The memberships that :meth:`group` used."""
        return AttentionAssignment(q, k, relation, 1.0 / math.sqrt(q.shape[-1]), self._bias(q), self.backend)

    def _update(self, groups: Tensor, q: Tensor, k: Tensor, v: Tensor, relation: Any) -> Tensor:
        out = rearrange(self.group(q, k, v, relation), "b h n d -> b n (h d)")
        groups = groups + self.drop_path(self.norm_attention(out))
        updated: Tensor = groups + self.drop_path(self.norm_mlp(self.mlp(groups)))
        return updated

    def _recomputed(self, function: Callable[..., Tensor], *operands: Any) -> Tensor:
        if not (self.checkpoint and torch.is_grad_enabled()):
            return function(*operands)
        result: Tensor = checkpoint(function, *operands, use_reentrant=False)
        return result

    def _convolve(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        proposed: Tensor = self.propose(x.transpose(1, 2).reshape(*x.shape[::2], *shape))
        return proposed.flatten(2).transpose(1, 2)

    def _angles(self, frame: Grid, x: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Cosines and sines for the tokens and for the groups.

        Positions enter by differences only, so the frame starts at the first token: exact in float32 however far
        from zero the image lies.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        groups = coarsen(frame, self.kernel_size, self.stride, self.padding)
        # A spacing transform depends on the spacing, and both sides must be transformed alike.
        spacing = None if self.rotary.spacing_transform is None else frame.spacing
        placed = groups.coordinates(device=x.device)
        return (
            self.rotary.angles(self.rotary.positions(frame.size, coordinates=frame, device=x.device), dtype),
            self.rotary.angles(self.rotary.positions(groups.size, spacing, coordinates=placed), dtype),
        )

    def _queries(self, groups: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        return self._heads(self.rotary.rotate(self.to_q(groups), *angles))

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h d) -> b h n d", h=self.num_heads)

    def _bias(self, q: Tensor) -> Tensor | None:
        return None if self.bias_table is None else self.bias_table.to(q.dtype)

    def _input_grid(
        self,
        x: Tensor,
        spacing: Spacing | None,
        shape: Sequence[int] | None,
        mask: Tensor | None,
        origin: Spacing,
    ) -> Grid:
        """Check the input and describe its grid."""
        if mask is not None:
            validation.boolean("mask", mask)
        if shape is None and mask is not None:
            shape = tuple(mask.shape[1:])
        spacing = self.spacing if spacing is None else spacing
        names = ("input_spacing", "input_grid_shape")
        grid = validation.token_grid(x, self.feature_dims, self.spatial_dims, spacing, shape, origin, names=names)
        if mask is not None and tuple(mask.shape) != (x.shape[0], *grid.shape):
            raise ValueError(f"mask must have shape {(x.shape[0], *grid.shape)} (B, *grid), got {tuple(mask.shape)}")
        return grid
