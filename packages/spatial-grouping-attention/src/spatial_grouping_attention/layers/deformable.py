"""Deformable grouping: every token looks where its content tells it to."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from einops import rearrange
from RoSE.keywords import RotaryKeywords, spell_out_rotary_keywords
from RoSE.validation import require_int
from torch import Tensor, nn

from ..assignment import DeformableAssignment
from ..backends import deformable
from ..geometry import remembered
from .compactness import compactness_of
from .grouping import Ints, Members, Relation, SpatialGroupingAttention

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Offsets(nn.Linear):
    """Reads from a token's features how far its points move; starts with all points where they are."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """No movement, whatever the features."""
        self.weight.zero_()
        self.bias.zero_()


@spell_out_rotary_keywords
class DeformableSpatialGroupingAttention(SpatialGroupingAttention):
    """Grouping over points at learned, content-dependent, fractional offsets around every token's own cell.

    The points start on a window of whole steps, where the layer equals the sparse one, and every token moves its
    points by offsets that a linear layer reads from its features (after Deformable DETR, arXiv:2010.04159). Queries,
    and values on the way up, are interpolated linearly between groups. Points whose place in the window lies
    outside the grid, or on a group that is not valid, are not looked at; points that wander outside are held at the
    border of the box that holds the valid groups.

    Other arguments are those of :class:`SpatialGroupingAttention`.

    Args:
        num_points: points per token and head; None for 3 to the power of ``spatial_dims``. They start on the
            nearest places of the smallest odd window that holds them.
        relative_bias: whether to learn a bias per head and point.
        backend: ``"auto"``, ``"reference"`` (plain torch), ``"native"`` (kernels for a CPU, which need numba) or
            ``"triton"`` (kernels for NVIDIA GPUs). "auto" takes kernels where they can serve; asked for by name they
            raise where they cannot, as on another device and under a compiler.

    Raises:
        TypeError: an argument has the wrong type or is unknown.
        ValueError: an argument is out of range, or sizes do not divide.
    """

    _backends: ClassVar[tuple[str, ...]] = deformable.BACKENDS

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
        num_points: int | None = None,
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
        self.num_points = require_int("num_points", 3**spatial_dims if num_points is None else num_points, minimum=1)
        self.places = tuple(starting_places(self.num_points, spatial_dims))
        self.offsets = Offsets(feature_dims, num_heads * self.num_points * spatial_dims, device=device, dtype=dtype)
        if self.relative_bias:
            self.bias_table = nn.Parameter(torch.zeros(num_heads, self.num_points, device=device, dtype=dtype))

    def window(self, output_shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The smallest odd window that holds the points' starting places."""
        side = 2 * max(abs(step) for place in self.places for step in place) + 1
        return (side,) * self.spatial_dims, (1,) * self.spatial_dims

    def members(self, x: Tensor, relation: Relation) -> Members:
        """Decide where every token looks, and what makes memberships there from queries and keys."""
        neighbourhood, valid, valid_groups = relation
        groups = deformable.lattice(neighbourhood.output_shape, valid_groups)
        places = neighbourhood.cells(x.device)[:, None, :] + _steps(self.places, x.device)
        visible = _visible(places, groups)
        if valid is not None:
            visible = visible & valid[:, None, :, None]
        # Half types cannot tell positions on a large grid apart.
        offsets = self.offsets(x).to(torch.promote_types(x.dtype, torch.float32))
        offsets = rearrange(
            offsets, "b n (h p d) -> b h n p d", h=self.num_heads, p=self.num_points, d=self.spatial_dims
        )
        # Points that are nowhere are taken where they start: NaN then stays near its token, in the shares.
        lost = offsets.isnan()
        offsets = offsets.masked_fill(lost, 0.0)
        points = places + offsets
        lost = lost.any(-1).any(-1, keepdim=True)
        scale, compactness = 1.0 / math.sqrt(self.head_dim), compactness_of(self.raw_compactness)
        lowering = None
        if compactness is not None:
            tokens = neighbourhood.places(x.device, offsets.dtype)
            strides = tuple(axis.stride for axis in neighbourhood.axes)
            squares = deformable.squared_distances(tokens, strides, places, offsets, groups)
            lowering = compactness[:, None, None] * squares

        def of(q: Tensor, k: Tensor) -> DeformableAssignment:
            shares = deformable.point_log_shares(
                q,
                k,
                points,
                visible,
                groups,
                scale=scale,
                bias=self._bias(q),
                lowering=lowering,
                backend=self.backend,
            )
            shares = shares.masked_fill(lost, torch.nan)
            return DeformableAssignment(shares, points, neighbourhood, valid, valid_groups, backend=self.backend)

        return of


def starting_places(num_points: int, ndim: int) -> list[tuple[int, ...]]:
    """The ``num_points`` places of the smallest odd window that are nearest to its centre.

    A number of points that fills its window gives the window in row-major order.
    """
    radius = 0
    while (2 * radius + 1) ** ndim < num_points:
        radius += 1
    places = list(itertools.product(range(-radius, radius + 1), repeat=ndim))
    if num_points < len(places):
        places = sorted(places, key=lambda place: sum(step * step for step in place))[:num_points]
    return places


@remembered(64)
def _steps(places: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Starting places as a tensor (P, ndim), moved to a device once: every move would make it wait."""
    return torch.tensor(places, device=device)


def _visible(places: Tensor, groups: deformable.Lattice) -> Tensor:
    """Which starting places (N_in, P, ndim) lie on a group: (N_in, P), or (B, 1, N_in, P) where some are missing."""
    inside = torch.ones(places.shape[:-1], dtype=torch.bool, device=places.device)
    for place, size in zip(places.unbind(-1), groups.shape, strict=True):
        inside = inside & (place >= 0) & (place < size)
    if groups.valid is None:
        return inside
    flat = torch.zeros_like(inside, dtype=torch.long)
    for axis, size in enumerate(groups.shape):
        flat = flat * size + places[..., axis].clamp(0, size - 1)
    return (inside & groups.valid[:, flat]).unsqueeze(1)
