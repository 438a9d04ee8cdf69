"""What a segmentation network returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from RoSE import Grid
from RoSE.validation import require_integral, require_sizes
from torch import Tensor
from torch.utils import _pytree as pytree

from ..assignment import Assignment
from ..output import Output
from .panoptic import PixelMemberships, wide


@dataclass(eq=False, init=False)
class SegmentationOutput(Output):
    """Classes of the pixels, and what they were made of.

    Reads like a dataclass (``output.logits``) and like a dict (``output["logits"]``, ``**output``), and is a pytree.
    ``mask_logits`` is read in both ways and is no field: masks are as large as all candidates' pixels, and made anew
    whenever they are asked for.
    """

    logits: Tensor
    """Of the classes of every pixel, (B, num_classes, *size); 0 for pixels that are not valid."""
    features: tuple[Tensor, ...]
    """Of every stage, first stage first, (B, N, dims of the stage), row-major over its grid; 0 where not valid."""
    assignments: tuple[Assignment, ...]
    """Memberships of every stage's tokens in the tokens of the next, for :func:`.compose`; empty for the uniform
    twin."""
    grids: tuple[Grid, ...]
    """Where the tokens of every stage lie, in physical units; the first pixel lies at 0."""
    stem_stride: tuple[int, ...]
    """Pixels per token of the first stage, per axis."""
    valid: Tensor | None
    """Which pixels are real, (B, *size) boolean; None for all."""
    candidates: Tensor | None
    """Candidates for objects: the groups of the last stage of largest mass, largest first, (B, G) int64 with G the
    smaller of ``num_candidates`` and the groups; -1 where there are fewer valid groups. None without candidates."""
    class_logits: Tensor | None
    """Classes of the candidates, (B, G, num_classes + 1), the last of them "no object", which a -1 among the candidates
    is with certainty. None without candidates."""

    def __init__(
        self,
        logits: Tensor | Mapping[str, Any],
        features: tuple[Tensor, ...] = (),
        assignments: tuple[Assignment, ...] = (),
        grids: tuple[Grid, ...] = (),
        stem_stride: tuple[int, ...] = (),
        valid: Tensor | None = None,
        candidates: Tensor | None = None,
        class_logits: Tensor | None = None,
    ) -> None:
        self._fill(logits, features, assignments, grids, stem_stride, valid, candidates, class_logits)

    def __getitem__(self, name: str) -> Any:
        """A field by its name, or ``mask_logits``, which is made then, as a ``defaultdict`` makes what it lacks."""
        return self.mask_logits if name == "mask_logits" else super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        """Whether it is the name of a field; no masks are made to find out."""
        return name in set(self)

    @property
    def mask_logits(self) -> Tensor | None:
        """Masks of the candidates, (B, G, *size) of float32 at least: see :meth:`masks_of`. None without any."""
        return None if self.candidates is None else self.masks_of(self.candidates)

    def masks_of(self, groups: Tensor) -> Tensor:
        """Where groups of the last stage are: logarithms of the pixels' memberships, through all assignments.

        Memberships compete: those of a valid pixel in all groups sum to one. Between the tokens of the first stage
        they are interpolated. Memory is that of the masks, times the heads of the first grouping over the area of a
        patch.

        Args:
            groups: indices (B, G), integers; -1, as any that is no group of the last stage, has no members.

        Returns:
            (B, G, *size), ``log(membership + 1e-12)`` and so finite; pixels that are not valid have no membership.

        Raises:
            TypeError: the groups are not integers.
            ValueError: the shape of the groups is another, or there are no memberships (the uniform twin).
        """
        require_sizes("groups", require_integral("groups", groups), "B G", B=self.logits.shape[0])
        return self.memberships().log_masks(groups, wide(self.logits.dtype))

    def memberships(self) -> PixelMemberships:
        """Memberships of the pixels in the groups of the last stage, to carry values or to sum them.

        Raises:
            ValueError: there are none (the uniform twin).
        """
        if not self.assignments:
            raise ValueError("memberships need groupings; got an output without: the uniform twin does not group")
        size = tuple(self.logits.shape[2:])
        return PixelMemberships(self.assignments, self.grids[0], self.stem_stride, size, self.valid)


def candidates_of(output: SegmentationOutput) -> tuple[Tensor, Tensor]:
    """The candidates of an output and their classes.

    Raises:
        TypeError: it is no output of a network.
        ValueError: there are none.
    """
    if not isinstance(output, SegmentationOutput):
        raise TypeError(f"output must be a SegmentationOutput; got {type(output).__name__}")
    if output.candidates is None or output.class_logits is None:
        raise ValueError("output must come from a network with num_candidates; got one without candidates")
    return output.candidates, output.class_logits


def _flatten(output: SegmentationOutput) -> tuple[list[Any], None]:
    # A grid is no pytree: its parts are taken along, where they may be tensors.
    grids = [[grid.shape, grid.spacing, grid.origin] for grid in output.grids]
    return [grids if name == "grids" else value for name, value in output.items()], None


def _unflatten(values: Any, _: None) -> SegmentationOutput:
    logits, features, assignments, grids, *rest = values
    return SegmentationOutput(logits, features, assignments, tuple(Grid.derived(*parts) for parts in grids), *rest)


pytree.register_pytree_node(
    SegmentationOutput, _flatten, _unflatten, serialized_type_name="spatial_grouping_attention.SegmentationOutput"
)

# All that an output holds is inert, so that loading it runs nobody's code.
torch.serialization.add_safe_globals([SegmentationOutput])
