"""What a segmentation network returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from RoSE import Grid
from torch import Tensor
from torch.utils import _pytree as pytree

from ..assignment import Assignment
from ..output import Output


@dataclass(eq=False, init=False)
class SegmentationOutput(Output):
    """Classes of the pixels, and what they were made of.

    Reads like a dataclass (``output.logits``) and like a dict (``output["logits"]``, ``**output``), and is a pytree.
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

    def __init__(
        self,
        logits: Tensor | Mapping[str, Any],
        features: tuple[Tensor, ...] = (),
        assignments: tuple[Assignment, ...] = (),
        grids: tuple[Grid, ...] = (),
    ) -> None:
        self._fill(logits, features, assignments, grids)


def _flatten(output: SegmentationOutput) -> tuple[list[Any], None]:
    # A grid is no pytree: its parts are taken along, where they may be tensors.
    grids = [[grid.shape, grid.spacing, grid.origin] for grid in output.grids]
    return [output.logits, output.features, output.assignments, grids], None


def _unflatten(values: Any, _: None) -> SegmentationOutput:
    logits, features, assignments, grids = values
    return SegmentationOutput(logits, features, assignments, tuple(Grid.derived(*parts) for parts in grids))


pytree.register_pytree_node(
    SegmentationOutput, _flatten, _unflatten, serialized_type_name="spatial_grouping_attention.SegmentationOutput"
)

# All that an output holds is inert, so that loading it runs nobody's code.
torch.serialization.add_safe_globals([SegmentationOutput])
