"""Dense grouping: every token sees every group."""

from __future__ import annotations

from .grouping import SpatialGroupingAttention


class DenseSpatialGroupingAttention(SpatialGroupingAttention):
    """Grouping in which every token may belong to any group; for the coarse, last stages of a backbone.

    Cost grows as N_in * N_out, memory as N_in + N_out.

    Takes the arguments of :class:`SpatialGroupingAttention`; ``relative_bias`` must be False.

    Raises:
        TypeError: an argument has the wrong type or is unknown.
        ValueError: an argument is out of range, sizes do not divide, or a relative bias is asked for.
    """

    def require_possible(self) -> None:
        """Refuse a bias over window offsets."""
        if self.relative_bias:
            raise ValueError(
                "relative_bias must be False for dense grouping, whose table would change with the grid (use "
                "SparseSpatialGroupingAttention, or rely on the rotary embedding); got True"
            )

    def window(self, output_shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A window that reaches from either end of the grid to the other."""
        return tuple(2 * g - 1 for g in output_shape), (1,) * len(output_shape)
