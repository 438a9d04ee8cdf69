"""Pictures of memberships; needs matplotlib (the ``plot`` extra)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from RoSE.validation import require_choice
from torch import Tensor

from .assignment import Assignment, compose
from .assignment.base import label_boundaries

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANEL_PIXELS = 1024


def plot_groups(
    image: Tensor,
    assignments: Sequence[Assignment],
    *,
    sample: int = 0,
    axis: int = 0,
    index: int | None = None,
    titles: Sequence[str] | None = None,
    nested: bool = False,
) -> Figure:
    """Draw the segments of every stage over an image, or over a slice of a volume.

    Each stage is shown through all stages before it: every token takes its label in the chain
    (:meth:`.Assignment.labels`), and tokens that are not valid stay as they are. Where tokens are coarser than pixels
    (a patch stem), labels are repeated to the image's size.

    Args:
        image: (H, W), (D, H, W), or with one or three channels in front; any range, scaled for display.
        assignments: one per stage, first stage first, as :func:`compose` takes them.
        sample: which sample of the batch the assignments describe.
        axis: axis of a volume to cut across.
        index: slice of a volume; None for the middle one.
        titles: one per stage; None for the number of groups.
        nested: which label of a chain is meant: its most likely group, or the one that is reached stage by stage.

    Returns:
        A matplotlib figure: the image, then one panel per stage with its borders drawn in.

    Raises:
        ImportError: matplotlib is not installed.
        IndexError: there is no such sample, axis or slice.
        TypeError: an entry is no assignment.
        ValueError: there is no stage, stages do not fit, titles are not one for each, or the image's grid does not have
            the assignments' number of axes.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_groups needs matplotlib: pip install 'spatial-grouping-attention[plot]'") from error

    if titles is not None and len(titles) != len(assignments):
        raise ValueError(f"titles must be one for each of the {len(assignments)} stages; got {len(titles)}")
    picture, stages = _slices(image, assignments, sample, axis, index, nested)
    # Drawn enlarged, so that a border is thin beside groups of a few pixels.
    zoom = max(1, PANEL_PIXELS // max(picture.shape[1:]))
    background = _enlarge(_to_display(picture), zoom)
    figure = Figure(
        figsize=(5.0 * (len(stages) + 1), 5.0 * background.shape[0] / background.shape[1] + 0.4), layout="constrained"
    )
    axes: Any = figure.subplots(1, len(stages) + 1, squeeze=False)[0]
    axes[0].imshow(background.numpy())
    axes[0].set_title("image")
    for i, (panel, labels) in enumerate(zip(axes[1:], stages, strict=True)):
        labels = _enlarge(labels, zoom)
        # A fixed scramble gives neighbouring numbers different colours.
        colours = torch.as_tensor(colormaps["tab20"]((labels * 7919 % 20).numpy())[..., :3])
        borders = label_boundaries(labels[None])[0]
        tinted = torch.where((labels >= 0).unsqueeze(-1), 0.65 * background + 0.35 * colours, background)
        panel.imshow(tinted.masked_fill(borders.unsqueeze(-1), 0.0).numpy())
        panel.set_title(f"{assignments[i].num_groups} groups" if titles is None else titles[i])
    for panel in axes:
        panel.set_axis_off()
    return figure


def _slices(
    image: Tensor, assignments: Sequence[Assignment], sample: int, axis: int, index: int | None, nested: bool
) -> tuple[Tensor, list[Tensor]]:
    """The image (1 or 3, H, W), or a slice of the volume, and the labels of every stage there, (H, W)."""
    stages_of_all = compose(assignments).stages
    chains = [compose(stages_of_all[: i + 1]) for i in range(len(stages_of_all))]
    shape = chains[0].input_shape
    ndim = len(shape)
    require_choice("number of axes of the assignments' grids", ndim, (2, 3))
    if image.ndim not in (ndim, ndim + 1) or (image.ndim == ndim + 1 and image.shape[0] not in (1, 3)):
        raise ValueError(
            f"image must be a {ndim}-D grid, with 1 or 3 channels in front or none; got {tuple(image.shape)}"
        )
    picture = image if image.ndim == ndim + 1 else image[None]
    grid = picture.shape[1:]
    stages = [_resize_labels(chain.labels(nested=nested)[sample].reshape(shape), grid) for chain in chains]
    if ndim == 3:
        middle = grid[axis] // 2 if index is None else index
        picture, stages = picture.select(axis + 1, middle), [labels.select(axis, middle) for labels in stages]
    return picture, stages


def _enlarge(picture: Tensor, zoom: int) -> Tensor:
    """Repeat every pixel of (H, W, ...) ``zoom`` times along both axes."""
    return picture.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)


def _resize_labels(labels: Tensor, shape: Sequence[int]) -> Tensor:
    """Repeat labels to a finer grid (nearest)."""
    for dim, size in enumerate(shape):
        index = torch.arange(size, device=labels.device) * labels.shape[dim] // size
        labels = labels.index_select(dim, index)
    return labels.cpu()


def _to_display(picture: Tensor) -> Tensor:
    """(1 or 3, H, W) of any range -> (H, W, 3) in [0, 1]; what is not finite (padding) is black."""
    picture = picture.detach().cpu().to(torch.float64)
    finite = picture[picture.isfinite()]
    low, high = (finite.amin(), finite.amax()) if finite.numel() else (picture.new_zeros(()), picture.new_ones(()))
    picture = picture.where(picture.isfinite(), low)
    return ((picture - low) / (high - low).clamp(min=1e-12)).expand(3, -1, -1).permute(1, 2, 0)
