"""Where the groups of a strided convolution lie in physical space, and which of them are real."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from RoSE import Grid
from RoSE.constants import numbers
from RoSE.memo import remembered
from torch import Tensor

from .axis import Axis, output_size
from .neighbourhood import Neighbourhood


def coarse_shape(
    shape: Sequence[int], kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[int, ...]:
    """Number of groups per axis, ``(n + 2p - k)//s + 1``.

    Raises:
        ValueError: the kernel is larger than the padded grid on some axis.
    """
    sizes = []
    for n, k, s, p in zip(shape, kernel_size, stride, padding, strict=True):
        if n + 2 * p < k:
            raise ValueError(
                f"kernel_size must not exceed the padded grid (n + 2*padding >= kernel_size); "
                f"got n={n}, padding={p}, kernel_size={k} in grid {tuple(shape)}"
            )
        sizes.append(output_size(n, k, s, p))
    return tuple(sizes)


def coarsen(grid: Grid, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Grid:
    """The grid of groups in the same physical frame as ``grid``.

    ``spacing' = spacing * stride`` and ``origin' = origin + ((k - 1)/2 - p) * spacing``: a group sits at the
    centre of its receptive field, so even kernels get their half voxel. Tensors come out in float64.
    """
    spacing, origin = grid.spacing, grid.origin
    if isinstance(spacing, Tensor) or isinstance(origin, Tensor):
        return _coarsen_tensors(grid, kernel_size, stride, padding)
    return _coarsen_numbers(grid.shape, spacing, origin, tuple(kernel_size), tuple(stride), tuple(padding))


@remembered(1024)
def _coarsen_numbers(
    shape: tuple[int, ...],
    spacing: tuple[float, ...],
    origin: tuple[float, ...],
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
) -> Grid:
    return Grid.derived(
        coarse_shape(shape, kernel_size, stride, padding),
        tuple(d * s for d, s in zip(spacing, stride, strict=True)),
        tuple(o + c * d for o, c, d in zip(origin, _centres(kernel_size, padding), spacing, strict=True)),
    )


def _coarsen_tensors(grid: Grid, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Grid:
    # Rounding would move groups against their tokens, and more with every stage: float64, whatever holds the numbers.
    device = next(x.device for x in (grid.spacing, grid.origin) if isinstance(x, Tensor))
    step, start, s, c = (
        x.to(device=device, dtype=torch.float64) if isinstance(x, Tensor) else numbers(x, device)
        for x in (grid.spacing, grid.origin, tuple(stride), _centres(kernel_size, padding))
    )
    shape = coarse_shape(grid.shape, kernel_size, stride, padding)
    return Grid.derived(shape, step * s, start + step * c)


def _centres(kernel_size: Sequence[int], padding: Sequence[int]) -> tuple[float, ...]:
    """Centre of the first group's receptive field per axis, in steps from the first token."""
    return tuple((k - 1) / 2 - p for k, p in zip(kernel_size, padding, strict=True))


def group_validity(valid: Tensor, neighbourhood: Neighbourhood) -> Tensor:
    """Which groups are real: those whose own cell owns a token that is.

    Args:
        valid: (B, N_in) boolean.
        neighbourhood: the grids of tokens and groups.

    Returns:
        (B, N_out) boolean.
    """
    counts: Tensor = torch.unflatten(valid, 1, neighbourhood.input_shape).long()
    for dim, axis in enumerate(neighbourhood.axes, 1):
        # Cells are intervals, and their tokens a difference of two running sums.
        up_to = torch.cat((torch.zeros_like(counts.narrow(dim, 0, 1)), counts.cumsum(dim)), dim)
        counts = up_to.index_select(dim, _edges(axis, valid.device)).diff(dim=dim)
    return counts.flatten(1) > 0


def _edges(axis: Axis, device: torch.device) -> Tensor:
    """Where the cells of an axis begin, and where the last one ends: (groups + 1,)."""
    inner = torch.arange(1, axis.groups, device=device) * axis.stride + axis.offset
    return F.pad(F.pad(inner.clamp(0, axis.size), (1, 0)), (0, 1), value=axis.size)
