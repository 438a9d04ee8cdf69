"""What a grouping layer returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from RoSE import Grid
from torch import Tensor
from torch.utils import _pytree as pytree

from .assignment import (
    Assignment,
    AttentionAssignment,
    ComposedAssignment,
    DeformableAssignment,
    Movable,
    Usage,
)
from .geometry import Neighbourhood


class Output(Movable, Mapping[str, Any]):
    """Base of dataclasses of results that read like a mapping as well, and can be taken apart and put together again.

    Code that walks through nested containers, to move or to cast what models return, rebuilds a mapping from one
    mapping of all its items, or sets the fields of a dataclass one by one: both can be done here.
    """

    def _fill(self, *values: Any) -> None:
        """Set the fields in their order, or all of them from one mapping in place of the first."""
        names = list(self)
        if isinstance(values[0], Mapping):
            if sorted(values[0]) != sorted(names):
                raise TypeError(f"a mapping in place of the fields must have the keys {names}; got {list(values[0])}")
            values = tuple(values[0][name] for name in names)
        for name, value in zip(names, values, strict=True):
            setattr(self, name, value)

    def __getitem__(self, name: str) -> Any:
        """A field by its name."""
        if name not in set(self):
            raise KeyError(name)
        return getattr(self, name)

    # By identity: comparing tensors entry by entry has no truth value.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __iter__(self) -> Iterator[str]:
        """The names of the fields."""
        return (field.name for field in fields(cast(Any, self)))

    def __len__(self) -> int:
        """How many fields there are."""
        return len(fields(cast(Any, self)))


@dataclass(eq=False, init=False)
class GroupingOutput(Output):
    """Features of the groups, where the groups lie, and which tokens belong to them.

    Reads like a dataclass (``output.x_out``) and like a dict (``output["x_out"]``, ``**output``), and is a
    pytree, so that it passes through ``torch.compile``, ``torch.export`` and hooks. ``torch.load`` takes saved outputs
    with its defaults (``weights_only=True``) once this package is imported.

    A *reentrant* checkpoint (``torch.utils.checkpoint`` with ``use_reentrant=True``) looks for results in tensors and
    tuples of tensors alone: it would hand on this output cut off from the graph, and every gradient through it would
    be lost without a word. Layers refuse to be its function; a function of yours that calls layers inside of one
    must return tensors, or use ``use_reentrant=False``, or the layers' own ``checkpoint=True``.
    """

    x_out: Tensor
    """Features of the groups (B, N_out, out_dims); 0 for groups that are not valid."""
    out_grid_shape: tuple[int, ...]
    """Groups along each axis; their product is N_out."""
    out_spacing: tuple[float, ...] | Tensor
    """Distance between groups in physical units: one per axis, or (B, spatial_dims) if the input's was."""
    out_origin: tuple[float, ...] | Tensor
    """Position of the first group in the frame in which the input's origin was given."""
    assignment: Assignment
    """Memberships of the input tokens in the groups."""
    valid: Tensor | None
    """Which groups are real, (B, N_out) boolean, for the next layer's ``valid``; None for all."""

    def __init__(
        self,
        x_out: Tensor | Mapping[str, Any],
        out_grid_shape: tuple[int, ...] | None = None,
        out_spacing: tuple[float, ...] | Tensor | None = None,
        out_origin: tuple[float, ...] | Tensor | None = None,
        assignment: Assignment | None = None,
        valid: Tensor | None = None,
    ) -> None:
        self._fill(x_out, out_grid_shape, out_spacing, out_origin, assignment, valid)

    @property
    def grid(self) -> Grid:
        """Where the groups lie: ``out_grid_shape``, ``out_spacing`` and ``out_origin`` in one."""
        return Grid.derived(self.out_grid_shape, self.out_spacing, self.out_origin)


def _flatten(output: GroupingOutput) -> tuple[list[Any], None]:
    return list(output.values()), None


def _unflatten(values: Any, _: None) -> GroupingOutput:
    return GroupingOutput(*values)


pytree.register_pytree_node(
    GroupingOutput, _flatten, _unflatten, serialized_type_name="spatial_grouping_attention.GroupingOutput"
)

# All that an output holds is inert, so that loading it runs nobody's code.
torch.serialization.add_safe_globals(
    [
        AttentionAssignment,
        ComposedAssignment,
        DeformableAssignment,
        Grid,
        GroupingOutput,
        Neighbourhood,
        Usage,
    ]
)
