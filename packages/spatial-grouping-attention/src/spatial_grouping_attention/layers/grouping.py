"""The grouping layer; its variants differ only in which groups a token sees."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from einops import rearrange
from RoSE import Grid, RotarySpatialEmbedding
from RoSE.blocks import MLP, DropPath
from RoSE.keywords import RotaryKeywords, spell_out_rotary_keywords
from RoSE.validation import (
    require_callable,
    require_choice,
    require_divides,
    require_flag,
    require_int,
    require_ints,
    require_numbers,
    require_probability,
    require_real,
    require_shape,
)
from torch import Tensor, nn

from ..assignment import AssignmentOfHeads, AttentionAssignment
from ..backends import Backend
from ..geometry import (
    Neighbourhood,
    Shape,
    Spacing,
    TokenGrid,
    coarse_shape,
    coarsen,
    group_validity,
    place_tokens,
    relate,
)
from ..output import GroupingOutput
from .checkpoints import recomputed, refuse_reentrant_checkpoint
from .compactness import compactness_of, inverse_softplus, make_raw_compactness, require_compactness
from .temperature import TEMPERATURES, heat, make_log_temperature

if TYPE_CHECKING:
    from typing_extensions import Unpack

Ints = int | Sequence[int]
Members = Callable[[Tensor, Tensor], AssignmentOfHeads]

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Relation(NamedTuple):
    """Which groups a token may see, and which tokens and groups are real."""

    neighbourhood: Neighbourhood
    valid: Tensor | None
    """(B, N_in) boolean or None."""
    valid_groups: Tensor | None
    """(B, N_out) boolean or None."""


class Places(NamedTuple):
    """Where groups lie in the frame of their tokens, and how they are turned there."""

    coordinates: Tensor
    """(N_out, spatial_dims), or (B, N_out, spatial_dims)."""
    spacing: tuple[float, ...] | Tensor | None
    """Of the *tokens*, for a rotary embedding that transforms spacings: both sides must be transformed alike."""


@spell_out_rotary_keywords
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
        mlp_ratio: hidden channels of the MLP as a multiple of ``out_dims``, rounded down and at least 1.
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
        checkpoint: recompute attention and MLP of every iteration in the backward pass instead of keeping their
            activations; queries are kept.
        temperature: ``"fixed"`` divides logits by the root of the head size; ``"learned"`` also multiplies them by a
            factor per head, learned as a logarithm, from 1.
        norm_tokens: whether attention reads tokens and groups through a LayerNorm (before k and v, and before q).
        compactness: start of a factor per head, learned and above 0, by which logits are lowered per squared distance
            of token and group, in units of the group spacing (the weight of place in SLIC superpixels,
            doi:10.1109/TPAMI.2012.120): the layer starts as a soft local downsampling. None leaves the term out.
        device: where to put the parameters.
        dtype: of the parameters; wave vectors stay float32 at least.
        **rotary: keywords of :class:`RoSE.RotarySpatialEmbedding`, such as ``base_theta`` or ``rotary_ratio``;
            ``reference_spacing`` is ``spacing`` where only that is given.

    Raises:
        TypeError: an argument has the wrong type or is unknown.
        ValueError: an argument is out of range, or sizes do not divide.
    """

    _backends: ClassVar[tuple[str, ...]] = tuple(backend.value for backend in Backend)

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
        compactness: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **rotary: Unpack[RotaryKeywords],
    ) -> None:
        super().__init__()
        self.spatial_dims = require_choice("spatial_dims", spatial_dims, tuple(_CONVOLUTIONS))
        self.feature_dims = require_int("feature_dims", feature_dims, minimum=1)
        self.num_heads = require_int("num_heads", num_heads, minimum=1)
        self.head_dim = require_divides("num_heads", num_heads, "feature_dims", feature_dims)
        self.out_dims = feature_dims if out_dims is None else require_int("out_dims", out_dims, minimum=1)
        require_divides("num_heads", num_heads, "out_dims", self.out_dims)
        self.kernel_size = require_ints("kernel_size", kernel_size, spatial_dims, minimum=1)
        if stride is None:
            stride = tuple(max(1, k // 2) for k in self.kernel_size)
        if padding is None:
            padding = tuple((k - 1) // 2 for k in self.kernel_size)
        self.stride = require_ints("stride", stride, spatial_dims, minimum=1)
        self.padding = require_ints("padding", padding, spatial_dims, minimum=0)
        self.iters = require_int("iters", iters, minimum=0)
        self.backend = require_choice("backend", backend, self._backends)
        self.spacing = require_numbers("spacing", 1.0 if spacing is None else spacing, spatial_dims, positive=True)
        self.relative_bias = require_flag("relative_bias", relative_bias)
        require_flag("qkv_bias", qkv_bias)
        require_flag("mlp_bias", mlp_bias)
        self.checkpoint = require_flag("checkpoint", checkpoint)
        require_real("mlp_ratio", mlp_ratio, above=0.0)
        require_probability("mlp_dropout", mlp_dropout)
        require_callable("mlp_activation", mlp_activation)
        require_probability("drop_path", drop_path)
        require_choice("temperature", temperature, TEMPERATURES)
        require_flag("norm_tokens", norm_tokens)
        self.compactness = require_compactness(compactness, dtype)
        self.require_possible()
        if rotary.get("wavelengths") is None:  # which are in physical units already
            rotary.setdefault("reference_spacing", self.spacing)

        made: dict[str, Any] = {"device": device, "dtype": dtype}
        convolution: Any = _CONVOLUTIONS[spatial_dims]
        sizes = (self.kernel_size, self.stride, self.padding)
        self.proposal = convolution(feature_dims, self.out_dims, *sizes, **made)
        self.norm_proposal = nn.LayerNorm(self.out_dims, **made)
        self.q_proj = nn.Linear(self.out_dims, feature_dims, bias=qkv_bias, **made)
        self.k_proj = nn.Linear(feature_dims, feature_dims, bias=qkv_bias, **made)
        self.v_proj = nn.Linear(feature_dims, self.out_dims, bias=qkv_bias, **made)
        self.rotary = RotarySpatialEmbedding(feature_dims, num_heads, spatial_dims, **made, **rotary)
        # Asked here, because an adapter may stand in the embedding's place, which can be called and nothing else.
        self._transforms_spacing = self.rotary.spacing_transform is not None
        self.norm_attention = nn.LayerNorm(self.out_dims, **made)
        self.norm_mlp = nn.LayerNorm(self.out_dims, **made)
        self.mlp = MLP(
            self.out_dims,
            mlp_ratio=mlp_ratio,
            dropout=mlp_dropout,
            bias=mlp_bias,
            activation=mlp_activation,
            **made,
        )
        self.drop_path = DropPath(drop_path)
        self.norm_input = nn.LayerNorm(feature_dims, **made) if norm_tokens else nn.Identity()
        self.norm_query = nn.LayerNorm(self.out_dims, **made) if norm_tokens else nn.Identity()
        self.mask_embedding = nn.Parameter(torch.zeros(feature_dims, **made))
        self.log_temperature = make_log_temperature(temperature, num_heads, **made)
        self.raw_compactness = make_raw_compactness(self.compactness, num_heads, **made)
        self.bias_table: nn.Parameter | None = None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the layer's own parameters to what construction gives; its modules reset theirs."""
        for parameter in (self.mask_embedding, self.log_temperature, self.bias_table):
            if parameter is not None:
                parameter.zero_()
        if self.raw_compactness is not None and self.compactness is not None:
            self.raw_compactness.fill_(inverse_softplus(self.compactness))

    def require_possible(self) -> None:
        """Refuse options that a variant cannot have; called with the options set and nothing made yet."""

    @abstractmethod
    def window(self, output_shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Window and dilation per axis, in groups, for a grid of groups."""

    def neighbourhood(self, input_grid_shape: Sequence[int]) -> Neighbourhood:
        """The relation between tokens and groups for an input grid."""
        input_shape = require_shape("input_grid_shape", input_grid_shape, self.spatial_dims)
        output_shape = coarse_shape(input_shape, self.kernel_size, self.stride, self.padding)
        window, dilation = self.window(output_shape)
        return relate(input_shape, output_shape, self.stride, self.kernel_size, self.padding, window, dilation)

    def forward(
        self,
        x: Tensor,
        input_spacing: Spacing | None = None,
        input_grid_shape: Shape | None = None,
        mask: Tensor | None = None,
        *,
        input_origin: Spacing = 0.0,
        input_grid: Grid | None = None,
        valid: Tensor | None = None,
    ) -> GroupingOutput:
        """Group the tokens of a grid.

        Args:
            x: tokens (B, N, feature_dims), row-major over the grid.
            input_spacing: physical distance between tokens: a number, one per axis, a tensor (spatial_dims,), or
                one row per sample (B, spatial_dims); None for the constructor's ``spacing``.
            input_grid_shape: tokens along each axis; may be left out in 1-D and where ``mask`` or ``valid`` shows it.
            mask: (B, *grid) boolean; true tokens are replaced by the learned mask embedding.
            input_origin: physical position of the first token; only moves ``out_origin``.
            input_grid: spacing, shape and origin in one, instead of the three.
            valid: (B, *grid) or (B, N) boolean; false tokens are padding: they enter no convolution (which meets
                zeros in their place, as beyond the border), belong to no group and are seen by nobody, whatever they
                hold. Groups whose own cell owns no valid token are not valid either; see ``valid`` of the output.

        Returns:
            Groups, where they lie, and the memberships of the last iteration; see :class:`GroupingOutput`.

        Raises:
            TypeError: x is not floating, the mask or the validity not boolean, or the grid no Grid.
            ValueError: shapes disagree, the spacing is not positive and finite, the grid is said twice, or it is
                smaller than the kernel allows.
            RuntimeError: the layer itself is the function of a reentrant checkpoint, which would lose its gradients.
        """
        refuse_reentrant_checkpoint()
        tokens = place_tokens(
            x,
            self.feature_dims,
            self.spatial_dims,
            spacing=input_spacing,
            shape=input_grid_shape,
            grid=input_grid,
            default_spacing=self.spacing,
            origin=input_origin,
            mask=mask,
            valid=valid,
            names=("input_spacing", "input_grid_shape", "input_grid"),
            origin_name="input_origin",
        )
        relation = self._relation(tokens)
        coarse = self._coarsen(tokens.grid)
        places = self._places(tokens, coarse, x.device)
        x = self._filled(x, tokens)
        groups, assignment = self._refine(self._propose(x, tokens.grid.shape), x, tokens.frame, places, relation)
        if relation.valid_groups is not None:
            groups = groups.masked_fill(~relation.valid_groups.unsqueeze(-1), 0.0)
        return GroupingOutput(groups, coarse.shape, coarse.spacing, coarse.origin, assignment, relation.valid_groups)

    def members(self, x: Tensor, relation: Relation) -> Members:
        """What makes memberships from queries and keys (B, H, ..., D).

        Called once with the tokens (B, N_in, feature_dims), so that what depends on them alone is the same in every
        iteration.
        """
        neighbourhood, valid, valid_groups = relation
        scale, compactness = 1.0 / math.sqrt(self.head_dim), compactness_of(self.raw_compactness)

        def of(q: Tensor, k: Tensor) -> AttentionAssignment:
            terms = self._bias(q), valid, valid_groups, compactness
            return AttentionAssignment(q, k, neighbourhood, scale, *terms, backend=self.backend)

        return of

    def _relation(self, tokens: TokenGrid) -> Relation:
        neighbourhood = self.neighbourhood(tokens.grid.shape)
        if tokens.valid is None:
            return Relation(neighbourhood, None, None)
        return Relation(neighbourhood, tokens.valid, group_validity(tokens.valid, neighbourhood))

    def _coarsen(self, grid: Grid) -> Grid:
        return coarsen(grid, self.kernel_size, self.stride, self.padding)

    def _places(self, tokens: TokenGrid, coarse: Grid, device: torch.device) -> Places:
        in_frame = coarse if tokens.frame is tokens.grid else self._coarsen(tokens.frame)
        spacing = tokens.frame.spacing if self._transforms_spacing else None
        return Places(in_frame.coordinates(device=device), spacing)

    def _filled(self, x: Tensor, tokens: TokenGrid) -> Tensor:
        """Tokens with the mask embedding where they are masked, and nothing where they are not valid."""
        if tokens.mask is not None:
            x = torch.where(tokens.mask.unsqueeze(-1), self.mask_embedding.to(x.dtype), x)
        if tokens.valid is not None:
            x = x.masked_fill(~tokens.valid.unsqueeze(-1), 0.0)
        return x

    def _propose(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The groups as the convolution proposes them, (B, N_out, out_dims)."""
        proposed: Tensor = self.proposal(x.transpose(1, 2).reshape(*x.shape[::2], *shape))
        groups: Tensor = self.norm_proposal(proposed.flatten(2).transpose(1, 2))
        return groups

    def _refine(
        self, groups: Tensor, x: Tensor, frame: Grid, places: Places, relation: Relation
    ) -> tuple[Tensor, AssignmentOfHeads]:
        """All rounds of attention; the refined groups, and the memberships of the last round.

        Tokens do not change: their keys, their values and what they look at are made once.
        """
        x = self.norm_input(x)
        k = self._heads(self.rotary(self.k_proj(x), coordinates=frame))
        v = self._heads(self.v_proj(x))
        members_of = self.members(x, relation)
        members = members_of(self._queries(groups, places), k)
        for i in range(self.iters):
            if i > 0:
                members = members_of(self._queries(groups, places), k)
            groups = recomputed(self.checkpoint, self._round, groups, v, members)
        return groups, members

    def _round(self, groups: Tensor, v: Tensor, members: AssignmentOfHeads) -> Tensor:
        """What groups take up from the values (B, H, N_in, C) of their members, and make of it."""
        out = rearrange(members.group_heads(v)[0], "b h n d -> b n (h d)")
        groups = groups + self.drop_path(self.norm_attention(out))
        updated: Tensor = groups + self.drop_path(self.norm_mlp(self.mlp(groups)))
        return updated

    def _queries(self, groups: Tensor, places: Places) -> Tensor:
        q = self.q_proj(self.norm_query(groups))
        q = self.rotary(q, places.spacing, coordinates=places.coordinates)
        return heat(self._heads(q), self.log_temperature)

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h d) -> b h n d", h=self.num_heads)

    def _bias(self, q: Tensor) -> Tensor | None:
        return None if self.bias_table is None else self.bias_table.to(q.dtype)
