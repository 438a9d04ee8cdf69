"""Two small networks that differ in one thing: how they go from a fine grid to a coarse one, and back.

Both are a convolutional stem at full resolution, three stages that halve the grid, and a linear classifier on the
coarsest tokens. In the first, every stage groups its tokens; the masks are the classifier's logits, carried down to
the pixels by the groups themselves. In the second, every stage is a strided convolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from RoSE import Grid
from spatial_grouping_attention import (
    ComposedAssignment,
    DenseSpatialGroupingAttention,
    SparseSpatialGroupingAttention,
    compose,
)
from torch import Tensor, nn

DIMS = (32, 32, 48, 64)  # channels of the pixels and of the three coarser grids
HEADS = 4
ITERS = 2
COMPACTNESS = 2.0  # a head's preference for what is near, to start with
KERNEL = 4  # with stride 2, a group sits in the middle of its own 2 x 2 tokens


@dataclass(frozen=True)
class Coarse:
    """A classifier's answer on the coarsest grid, and what is needed to bring it to the pixels."""

    logits: Tensor
    """(B, N, classes)."""
    grid: Grid
    """Where the coarsest tokens lie."""
    pixels: Grid
    """Where the pixels lie."""
    groups: ComposedAssignment | None = None
    """Which of the coarsest tokens every pixel belongs to; None where the tokens are not groups."""

    def native(self) -> Tensor:
        """Logits of the pixels (B, classes, H, W) by composed memberships."""
        if self.groups is None:
            raise ValueError("only groups know their members; these tokens are not groups")
        return self._image(self.groups.upsample(self.logits))

    def bilinear(self) -> Tensor:
        """Logits of the pixels (B, classes, H, W) by linear interpolation at their physical positions."""
        rows, columns = (
            hat(*(Grid(g.shape[a], g.spacing[a], g.origin[a]) for g in (self.pixels, self.grid))) for a in (0, 1)
        )
        image = self.logits.unflatten(1, self.grid.shape)
        return torch.einsum("yi,xj,bijc->bcyx", rows, columns, image)

    def _image(self, tokens: Tensor) -> Tensor:
        return tokens.transpose(1, 2).unflatten(2, self.pixels.shape)


def hat(fine: Grid, coarse: Grid) -> Tensor:
    """Weights (fine, coarse) of linear interpolation along one axis; constant beyond the first and last point."""
    where, nodes = (grid.coordinates(dtype=torch.float32) for grid in (fine, coarse))
    where = where.clamp(nodes.min(), nodes.max())
    return (1 - (where - nodes.T).abs() / coarse.spacing[0]).clamp(min=0)


class Mixer(nn.Module):
    """Residual block of a grid: every channel looks around itself, every token thinks."""

    def __init__(self, dims: int, reach: int = 7) -> None:
        super().__init__()
        self.look = nn.Conv2d(dims, dims, reach, padding=reach // 2, groups=dims)
        self.norm = nn.LayerNorm(dims)
        self.think = nn.Sequential(nn.Linear(dims, 2 * dims), nn.GELU(), nn.Linear(2 * dims, dims))

    def forward(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """(B, N, dims) -> (B, N, dims)."""
        seen = self.look(x.transpose(1, 2).unflatten(2, shape)).flatten(2).transpose(1, 2)
        return x + self.think(self.norm(seen))


class Stem(nn.Module):
    """Brightness -> tokens, one for every pixel."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, dims, 3, padding=1), nn.GELU(), nn.Conv2d(dims, dims, 3, padding=1)
        )
        self.norm = nn.LayerNorm(dims)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 1, H, W) -> (B, H * W, dims)."""
        return self.norm(self.convolutions(image).flatten(2).transpose(1, 2))


class StridedConvolution(nn.Module):
    """A grouping layer without the grouping: the same proposal, the same rounds of an MLP, which is wider."""

    def __init__(self, dims: int, out_dims: int, hidden: int) -> None:
        super().__init__()
        self.proposal = nn.Conv2d(dims, out_dims, KERNEL, stride=2, padding=1)
        self.norm_proposal = nn.LayerNorm(out_dims)
        self.norm_mlp = nn.LayerNorm(out_dims)
        self.mlp = nn.Sequential(nn.Linear(out_dims, hidden), nn.GELU(), nn.Linear(hidden, out_dims))

    @classmethod
    def with_parameters(cls, wanted: int, dims: int, out_dims: int) -> StridedConvolution:
        """The one whose number of parameters is nearest to ``wanted``."""
        narrowest, next_one = (count(cls(dims, out_dims, hidden)) for hidden in (1, 2))
        return cls(dims, out_dims, 1 + max(0, round((wanted - narrowest) / (next_one - narrowest))))

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """Tokens of a grid -> tokens of the grid half as fine, each in the middle of its 2 x 2."""
        image = self.proposal(x.transpose(1, 2).unflatten(2, grid.shape))
        x = self.norm_proposal(image.flatten(2).transpose(1, 2))
        for _ in range(ITERS):
            x = x + self.norm_mlp(self.mlp(x))
        spacing = tuple(2 * s for s in grid.spacing)
        origin = tuple(o + s / 2 for o, s in zip(grid.origin, grid.spacing, strict=True))
        return x, Grid(tuple(image.shape[2:]), spacing, origin)


class GroupingNetwork(nn.Module):
    """Two sparse groupings and a dense one, with mixers between them.

    Args:
        num_classes: of the labels.
        spacing: physical distance between the pixels. Every stage is told the spacing of its own input, so that the
            shortest wave of its rotary embedding fits its grid.
    """

    def __init__(self, num_classes: int, spacing: tuple[float, float]) -> None:
        super().__init__()
        self.spacing = spacing
        self.stem = Stem(DIMS[0])
        kinds = (SparseSpatialGroupingAttention, SparseSpatialGroupingAttention, DenseSpatialGroupingAttention)
        self.groupings = nn.ModuleList(
            kind(
                dims, 2, KERNEL, HEADS,
                out_dims=out_dims, iters=ITERS, mlp_ratio=2, compactness=COMPACTNESS,
                spacing=tuple(s * 2**stage for s in spacing),
            )
            for stage, (kind, (dims, out_dims)) in enumerate(zip(kinds, pairwise(DIMS), strict=True))
        )  # fmt: skip
        self.mixers = nn.ModuleList(Mixer(dims) for dims in DIMS)
        self.classify = nn.Linear(DIMS[-1], num_classes)

    def forward(self, image: Tensor) -> Coarse:
        """Classify the last groups of (B, 1, H, W)."""
        pixels = Grid(tuple(image.shape[2:]), self.spacing)
        grid, assignments = pixels, []
        x = self.mixers[0](self.stem(image), grid.shape)
        for grouping, mixer in zip(self.groupings, self.mixers[1:], strict=True):
            out = grouping(x, input_grid=grid)
            grid = out.grid
            x = mixer(out.x_out, grid.shape)
            assignments.append(out.assignment)
        return Coarse(self.classify(x), grid, pixels, compose(assignments))


class StridedNetwork(nn.Module):
    """The same network with a strided convolution in place of every grouping.

    Args:
        twin: the network with groupings. Every stage gets as many parameters as the grouping it replaces, up to the
            rounding of its MLP's width; everything else has the same shape.
    """

    def __init__(self, twin: GroupingNetwork) -> None:
        super().__init__()
        self.spacing = twin.spacing
        self.stem = Stem(DIMS[0])
        self.stages = nn.ModuleList(
            StridedConvolution.with_parameters(count(grouping), dims, out_dims)
            for grouping, (dims, out_dims) in zip(twin.groupings, pairwise(DIMS), strict=True)
        )
        self.mixers = nn.ModuleList(Mixer(dims) for dims in DIMS)
        self.classify = nn.Linear(DIMS[-1], twin.classify.out_features)

    def forward(self, image: Tensor) -> Coarse:
        """Classify the coarsest tokens of (B, 1, H, W)."""
        pixels = grid = Grid(tuple(image.shape[2:]), self.spacing)
        x = self.mixers[0](self.stem(image), grid.shape)
        for stage, mixer in zip(self.stages, self.mixers[1:], strict=True):
            x, grid = stage(x, grid)
            x = mixer(x, grid.shape)
        return Coarse(self.classify(x), grid, pixels)


def count(module: nn.Module) -> int:
    """How many numbers a module learns."""
    return sum(p.numel() for p in module.parameters())
