"""The segmentation network: stages of attention, groupings in between, and memberships that lead back to the pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from RoSE import Grid
from RoSE.keywords import RotaryKeywords, spell_out_rotary_keywords
from RoSE.validation import (
    require_boolean,
    require_choice,
    require_flag,
    require_floating,
    require_int,
    require_numbers,
    require_probability,
    require_real,
    require_shape,
    require_sizes,
)
from torch import Tensor, nn

from ..assignment import Assignment
from ..geometry import Spacing
from .configuration import (
    Ints,
    Sizes,
    require_groupings,
    require_per_stage,
    require_rounds,
    require_steps,
    require_window,
)
from .downsample import DOWNSAMPLES, make_downsample
from .heads import make_head, require_head
from .output import SegmentationOutput
from .panoptic import CandidateHead, require_candidates
from .scale import Scale
from .stage import MLPS, Stage
from .stem import STEMS, make_stem
from .tokens import CONVOLUTIONS, Tokens

if TYPE_CHECKING:
    from typing_extensions import Unpack


@spell_out_rotary_keywords
class GroupingViT(nn.Module):
    """A vision transformer that segments by itself: groups of pixels form stage by stage, and carry classes back.

    A stem makes tokens of patches; stages of windowed self-attention (global in the last stage) work on them; between
    the stages a grouping layer turns tokens into fewer groups, by content, and starts as the strided convolution
    within it. What the last groups are reaches every token through the memberships of all stages (arXiv:2505.16993,
    section 4). Positions are physical throughout (RoSE): spacing may differ between axes, and between images.

    Any size is served. What strides lack is added inside as tokens that are not valid, and results never depend on it.

    Args:
        spatial_dims: axes of the images: 1, 2 or 3.
        in_channels: channels of the images.
        num_classes: logits of every pixel.
        dims: channels of every stage, two stages or more; divisible by ``num_heads`` into even head sizes.
        depths: transformer blocks of every stage; 0 for a stage that only passes its tokens on.
        num_heads: attention heads of every stage; those of a stage also group its tokens.
        mlp: of the blocks: ``"linear"``, or ``"conv"`` with a depthwise convolution among its hidden channels (Mix-FFN,
            arXiv:2105.15203).
        mlp_ratio: hidden channels of the blocks' MLPs per channel.
        stem: ``"patch"`` (a patch is projected, and normed by itself) or ``"conv"`` (convolutions that look beyond the
            patch and keep its contrast to others).
        stem_stride: pixels per token of the first stage; int or one per axis.
        strides: of the groupings, 1 or 2; int, or one entry per grouping, each an int or one per axis.
        kernels: odd, of the groupings' convolutions; given like ``strides``.
        window: odd number of tokens in the window of self-attention, in all stages but the last; int or one per axis.
        grouping: ``"sparse"`` or ``"dense"``, for all or one per grouping; None for a dense one before the last stage
            and sparse ones before.
        grouping_window: odd number of groups that a token of a sparse grouping sees; int or one per axis.
        grouping_mlp_ratio: hidden channels of the groupings' MLPs per channel.
        iters: rounds of every grouping.
        compactness: start of the learned weight of place in memberships; None for none. See
            :class:`SpatialGroupingAttention`.
        temperature: ``"fixed"`` or ``"learned"``, of the groupings.
        downsample: ``"group"``, or ``"conv"`` for the uniform twin: the same network with strided convolutions.
        head: ``"native"``, ``"panoptic"`` (native, and the last groups of largest mass are candidates for objects),
            ``"bilinear"`` (classes of the last tokens, interpolated), ``"fpn"`` (a feature pyramid) or ``"fused"`` (the
            pyramid with memberships in place of interpolation); None for native, and for bilinear in the twin, which
            has no memberships.
        head_width: channels of the head; None for those of the last stage, in pyramids twice those of the first.
        num_candidates: how many of the last groups at most are candidates for objects, beside any head; None for 100
            where the head is ``"panoptic"``, and otherwise for none.
        drop_path: probability, in [0, 1), of leaving out a residual branch in the last block; grows linearly from 0
            in the first (arXiv:1603.09382).
        checkpoint: while training, compute blocks and the rounds of groupings again in the backward pass instead of
            keeping what they compute: less memory, one more forward pass of them, and the same gradients.
        spacing: physical distance between pixels when ``forward`` is given none, and the one on which positions are
            scaled; a number, or one per axis.
        backend: see :func:`.functional.grouping_attention`.
        device: where to put the parameters.
        dtype: of the parameters; wave vectors stay float32 at least.
        **rotary: keywords of :class:`RoSE.RotarySpatialEmbedding`; ``reference_spacing`` is ``spacing`` unless given,
            counts for pixels, and grows with the strides.

    Raises:
        TypeError: an argument has the wrong type or is unknown.
        ValueError: an argument is out of range, sizes do not divide, or lists differ in length.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        num_classes: int,
        *,
        dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        mlp: str = "linear",
        mlp_ratio: float = 3.0,
        stem: str = "patch",
        stem_stride: Ints = 4,
        strides: Sizes = 2,
        kernels: Sizes = 3,
        window: Ints = 7,
        grouping: str | Sequence[str] | None = None,
        grouping_window: Ints = 3,
        grouping_mlp_ratio: float = 2.0,
        iters: int = 3,
        compactness: float | None = 2.0,
        temperature: str = "fixed",
        downsample: str = "group",
        head: str | None = None,
        head_width: int | None = None,
        num_candidates: int | None = None,
        drop_path: float = 0.0,
        checkpoint: bool = False,
        spacing: float | Sequence[float] = 1.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **rotary: Unpack[RotaryKeywords],
    ) -> None:
        super().__init__()
        self.spatial_dims = require_choice("spatial_dims", spatial_dims, tuple(CONVOLUTIONS))
        self.in_channels = require_int("in_channels", in_channels, minimum=1)
        self.num_classes = require_int("num_classes", num_classes, minimum=1)
        self.dims = require_per_stage("dims", dims, None)
        self.depths = require_per_stage("depths", depths, len(self.dims), minimum=0)
        self.num_heads = require_per_stage("num_heads", num_heads, len(self.dims))
        steps = require_steps(spatial_dims, len(self.dims) - 1, stem_stride, strides, kernels)
        # No window where all see all: the last stage is global.
        windows = [require_window("window", window, spatial_dims)] * (len(self.dims) - 1) + [None]
        kinds = require_groupings(grouping, len(self.dims) - 1)
        reach = require_window("grouping_window", grouping_window, spatial_dims)
        options = require_rounds(iters, grouping_mlp_ratio, compactness, temperature)
        options["checkpoint"] = require_flag("checkpoint", checkpoint)
        require_choice("mlp", mlp, MLPS)
        require_real("mlp_ratio", mlp_ratio, above=0.0)
        require_choice("downsample", downsample, DOWNSAMPLES)
        head = require_head(head, downsample)
        rates = _rising(require_probability("drop_path", drop_path), self.depths)
        width = None if head_width is None else require_int("head_width", head_width, minimum=1)
        self.spacing = require_numbers("spacing", spacing, spatial_dims, positive=True)

        made: dict[str, Any] = {"device": device, "dtype": dtype}
        of_stages: list[dict[str, Any]] = [
            {"spacing": _times(self.spacing, scale), "backend": backend, **_scaled(rotary, scale, spatial_dims)}
            for scale in steps.scales
        ]
        self.stem = make_stem(require_choice("stem", stem, STEMS), in_channels, self.dims[0], steps.scales[0], made)
        self.stages, self.downsamples = nn.ModuleList(), nn.ModuleList()
        for i, (dim, heads) in enumerate(zip(self.dims, self.num_heads, strict=True)):
            if i > 0:
                between = self.dims[i - 1], dim, steps.kernels[i - 1], steps.strides[i - 1]
                known = {
                    "num_heads": self.num_heads[i - 1],
                    "drop_path": rates[i].before,
                    **options,
                    **of_stages[i - 1],
                }
                self.downsamples.append(make_downsample(downsample, *between, kinds[i - 1], reach, known, made))
            at = dim, heads, spatial_dims, windows[i], mlp, mlp_ratio, rates[i].blocks
            self.stages.append(Stage(*at, checkpoint, made, of_stages[i]))
        scales = [Scale(scale, steps.scales[0]) for scale in steps.scales]
        self.head = make_head(head, self.dims, scales, width, self.num_classes, made)
        self.candidate_head = None
        candidates = require_candidates(num_candidates, head, downsample)
        if candidates is not None:
            hidden = width or self.dims[-1]
            self.candidate_head = CandidateHead(self.dims[-1], hidden, self.num_classes, candidates, made)

    def forward(self, image: Tensor, spacing: Spacing | None = None, valid: Tensor | None = None) -> SegmentationOutput:
        """Segment images.

        Args:
            image: (B, in_channels, *size).
            spacing: physical distance between pixels: a number, one per axis, a tensor (spatial_dims,), or one row
                per image (B, spatial_dims); None for the constructor's.
            valid: (B, *size) boolean; false pixels are padding, whatever they hold. Images of different sizes go
                into one batch by padding at their ends.

        Returns:
            Logits, and features, memberships and grids of the stages; see :class:`SegmentationOutput`.

        Raises:
            TypeError: the image is not floating, or the validity not boolean.
            ValueError: shapes disagree, or the spacing is not positive and finite.
        """
        grid = self._pixels(image, spacing, valid)
        tokens: Tokens = self.stages[0](self.stem(image, grid, valid))
        stages = [tokens]
        assignments: list[Assignment] = []
        for downsample, stage in zip(self.downsamples, self.stages[1:], strict=True):
            tokens, assignment = downsample(tokens)
            tokens = stage(tokens)
            stages.append(tokens)
            if assignment is not None:
                assignments.append(assignment)
        logits = self.head(stages, assignments, grid.shape)
        if valid is not None:
            logits = logits.masked_fill(~valid.unsqueeze(1), 0.0)
        found: tuple[Tensor | None, Tensor | None] = None, None
        if self.candidate_head is not None:
            found = self.candidate_head(tokens.x, assignments)
        features, grids, _ = zip(*stages, strict=True)
        return SegmentationOutput(logits, features, tuple(assignments), grids, self.stem.stride, valid, *found)

    def _pixels(self, image: Tensor, spacing: Spacing | None, valid: Tensor | None) -> Grid:
        """The grid of the pixels, with all that was said of them checked."""
        axes = ("depth", "height", "width")[-self.spatial_dims :]
        require_sizes("image", require_floating("image", image), " ".join(("B", "C", *axes)), C=self.in_channels)
        batch, _, *size = image.shape
        if valid is not None and tuple(require_boolean("valid", valid).shape) != (batch, *size):
            raise ValueError(f"valid must have shape {(batch, *size)} (B, *size); got {tuple(valid.shape)}")
        grid = Grid(require_shape("size of the image", size), self.spacing if spacing is None else spacing)
        if grid.batch not in (None, batch):
            raise ValueError(f"spacing must have the batch size {batch} where given per sample; got {grid.batch}")
        return grid


def _times(numbers: Sequence[float], scale: Sequence[int]) -> tuple[float, ...]:
    return tuple(d * s for d, s in zip(numbers, scale, strict=True))


def _scaled(rotary: RotaryKeywords, scale: tuple[int, ...], spatial_dims: int) -> dict[str, Any]:
    """Keywords of the embeddings of a stage, whose tokens lie ``scale`` pixels apart."""
    scaled: dict[str, Any] = {**rotary}
    if "reference_spacing" in rotary:
        reference = require_numbers("reference_spacing", rotary["reference_spacing"], spatial_dims, positive=True)
        scaled["reference_spacing"] = _times(reference, scale)
    return scaled


class _Rates(NamedTuple):
    """Probabilities of stochastic depth of a stage."""

    before: float
    """Of the grouping before it."""
    blocks: list[float]
    """Of its blocks."""


def _rising(last: float, depths: Sequence[int]) -> list[_Rates]:
    """Probabilities of stochastic depth: linear from 0 in the first block; a grouping has its next block's."""
    total = sum(depths)
    rates = [last * i / max(total - 1, 1) for i in range(total)] or [0.0]
    starts = [sum(depths[:i]) for i in range(len(depths))]
    return [
        _Rates(rates[min(start, len(rates) - 1)], rates[start : start + depth])
        for start, depth in zip(starts, depths, strict=True)
    ]
