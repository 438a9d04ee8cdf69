"""Self-attention of tokens with their neighbours on the grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from RoSE import Grid, RotarySpatialEmbedding
from RoSE.keywords import RotaryKeywords, spell_out_rotary_keywords
from RoSE.validation import (
    require_choice,
    require_flag,
    require_head_split,
    require_int,
    require_ints,
    require_numbers,
    require_odd,
    require_probability,
    require_shape,
)
from torch import Tensor, nn

from ..backends import Backend, Operands, assign
from ..geometry import Neighbourhood, Shape, Spacing, place_tokens, relate
from .compactness import compactness_of, inverse_softplus, make_raw_compactness, require_compactness
from .grouping import Ints
from .temperature import TEMPERATURES, heat, make_log_temperature

if TYPE_CHECKING:
    from typing_extensions import Unpack


@spell_out_rotary_keywords
class WindowedSelfAttention(nn.Module):
    """Multi-head self-attention over a window of neighbours, with positions in physical units (RoSE).

    This is the operator ``assign`` with equal grids: tokens look at tokens. Windows are clipped at the borders.

    Args:
        dim: channels; divisible by ``num_heads`` into an even head size.
        num_heads: attention heads.
        spatial_dims: axes of the grid, 1 or more.
        window: odd number of tokens in the window; int or one per axis; None for the whole grid.
        dilation: distance between the window's tokens; int or one per axis.
        qkv_bias: whether the projection to queries, keys and values has a bias.
        proj_dropout: probability, in [0, 1), after the output projection.
        spacing: physical distance between tokens when ``forward`` is given none; a number, or one per axis.
        relative_bias: whether to learn a bias per head and window offset; needs a window.
        temperature: ``"fixed"`` divides logits by the root of the head size; ``"learned"`` also multiplies them by a
            factor per head, learned as a logarithm, from 1.
        compactness: start of a factor per head, learned and above 0, by which logits are lowered per squared distance
            of two tokens, counted in tokens along every axis; None leaves the term out.
        backend: see :func:`.functional.grouping_attention`.
        device: where to put the parameters.
        dtype: of the parameters; wave vectors stay float32 at least.
        **rotary: keywords of :class:`RoSE.RotarySpatialEmbedding`; ``reference_spacing`` is ``spacing`` where only
            that is given.

    Raises:
        TypeError: an argument has the wrong type or is unknown.
        ValueError: an argument is out of range, sizes do not divide, or the window is even.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        spatial_dims: int = 2,
        window: Ints | None = 7,
        dilation: Ints = 1,
        *,
        qkv_bias: bool = True,
        proj_dropout: float = 0.0,
        spacing: float | Sequence[float] = 1.0,
        relative_bias: bool = False,
        temperature: str = "fixed",
        compactness: float | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **rotary: Unpack[RotaryKeywords],
    ) -> None:
        super().__init__()
        self.head_dim = require_head_split(dim, num_heads)
        self.dim = dim
        self.num_heads = num_heads
        self.spatial_dims = require_int("spatial_dims", spatial_dims, minimum=1)
        self.dilation = require_ints("dilation", dilation, spatial_dims, minimum=1)
        self.window: tuple[int, ...] | None = None
        if window is not None:
            self.window = require_odd("window", require_ints("window", window, spatial_dims, minimum=1))
        elif require_flag("relative_bias", relative_bias):
            raise ValueError("window must be a fixed size where relative_bias is True; got None")
        self.backend = require_choice("backend", backend, [b.value for b in Backend])
        self.spacing = require_numbers("spacing", spacing, spatial_dims, positive=True)
        require_choice("temperature", temperature, TEMPERATURES)
        self.compactness = require_compactness(compactness, dtype)
        if rotary.get("wavelengths") is None:  # which are in physical units already
            rotary.setdefault("reference_spacing", self.spacing)

        require_flag("qkv_bias", qkv_bias)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **made)
        self.rotary = RotarySpatialEmbedding(dim, num_heads, spatial_dims, **made, **rotary)
        self.proj = nn.Linear(dim, dim, **made)
        self.proj_drop = nn.Dropout(require_probability("proj_dropout", proj_dropout))
        self.log_temperature = make_log_temperature(temperature, num_heads, **made)
        self.raw_compactness = make_raw_compactness(self.compactness, num_heads, **made)
        self.bias_table: nn.Parameter | None = None
        if require_flag("relative_bias", relative_bias):
            self.bias_table = nn.Parameter(torch.zeros(num_heads, *(self.window or ()), **made))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the layer's own parameters to what construction gives; its modules reset theirs."""
        for parameter in (self.log_temperature, self.bias_table):
            if parameter is not None:
                parameter.zero_()
        if self.raw_compactness is not None and self.compactness is not None:
            self.raw_compactness.fill_(inverse_softplus(self.compactness))

    def neighbourhood(self, grid_shape: Sequence[int]) -> Neighbourhood | None:
        """The relation between the tokens of a grid; None where all see all, wherever they are."""
        if self.window is None and self.compactness is None:
            return None
        shape = require_shape("grid_shape", grid_shape, self.spatial_dims)
        window, dilation = self.window, self.dilation
        if window is None:
            window, dilation = tuple(2 * n - 1 for n in shape), (1,) * len(shape)
        ones, zeros = (1,) * len(shape), (0,) * len(shape)
        return relate(shape, shape, ones, ones, zeros, window, dilation)

    def forward(
        self,
        x: Tensor,
        spacing: Spacing | None = None,
        grid_shape: Shape | None = None,
        *,
        grid: Grid | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Let every token attend to its window.

        Args:
            x: tokens (B, N, dim), row-major over the grid.
            spacing: physical distance between tokens: a number, one per axis, a tensor (spatial_dims,), or one
                row per sample (B, spatial_dims); None for the constructor's.
            grid_shape: tokens along each axis; may be left out in 1-D and where ``valid`` shows it.
            grid: spacing and shape in one, instead of the two.
            valid: (B, *grid) or (B, N) boolean; false tokens are padding: nobody sees them, whatever they hold.

        Returns:
            (B, N, dim); 0 for tokens that are not valid.

        Raises:
            TypeError: x is not floating, the validity not boolean, or the grid no Grid.
            ValueError: shapes disagree, the grid is said twice, or the spacing is not positive and finite.
        """
        tokens = place_tokens(
            x,
            self.dim,
            self.spatial_dims,
            spacing=spacing,
            shape=grid_shape,
            grid=grid,
            default_spacing=self.spacing,
            valid=valid,
        )
        if tokens.valid is not None:
            x = x.masked_fill(~tokens.valid.unsqueeze(-1), 0.0)
        projected: Tensor = self.proj_drop(self.proj(self._attend(x, tokens.frame, tokens.valid)))
        return projected if tokens.valid is None else projected.masked_fill(~tokens.valid.unsqueeze(-1), 0.0)

    def _attend(self, x: Tensor, frame: Grid, valid: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k = self.rotary(q, k=k, coordinates=frame)
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.num_heads) for t in (q, k, v))
        bias = None if self.bias_table is None else self.bias_table.to(q.dtype)
        compactness = compactness_of(self.raw_compactness)
        # assign's fine tokens are the ones that look, its groups the ones that are looked at.
        looked_at, looking = k, heat(q, self.log_temperature)
        operands = Operands(
            looked_at,
            looking,
            v,
            self.neighbourhood(frame.shape),
            1.0 / math.sqrt(self.head_dim),
            bias,
            valid=valid,
            valid_groups=valid,
            compactness=None
            if compactness is None
            else compactness.to(torch.promote_types(q.dtype, compactness.dtype)),
        )
        out, _ = assign(operands, self.backend)
        return rearrange(out, "b h n d -> b n (h d)")
