"""Pictures of an embedding: what wavelengths its heads have and where they point.

Needs matplotlib (``pip install rotary-spatial-embeddings[plot]``). Figures are built without pyplot, which would keep
them open until they are closed by hand.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from .angles import phases
from .embedding import RotarySpatialEmbedding

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_frequencies"]


def plot_frequencies(
    embedding: RotarySpatialEmbedding, *, axes: tuple[int, int] = (0, 1), reach: float | None = None
) -> Figure:
    """Draw the bands, directions and similarity of an embedding, one colour for each head.

    Left: the wavelengths of every head in physical units. Middle: the wave vectors along two spatial axes, with
    logarithmic radius (in one dimension, on a line). Right: how alike a vector of ones looks to itself after a
    displacement along each spatial axis, averaged over heads; 1 at no displacement, and the faster it falls
    without returning, the better positions are told apart.

    Args:
        embedding: What to draw; it must rotate something.
        axes: The two spatial axes of the middle panel.
        reach: Largest displacement of the right panel, physical units; default eight reference spacings, or four
            of the shortest wavelengths if that is longer.

    Returns:
        The figure, for ``savefig``.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: An embedding that rotates nothing, or spatial axes it does not have.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_frequencies needs matplotlib: pip install 'rotary-spatial-embeddings[plot]'") from error

    freqs = embedding.freqs.detach().to("cpu", torch.float64)
    dims = embedding.spatial_dims
    if not freqs.numel():
        raise ValueError("rotary_ratio must be above 0 for there to be something to draw; got 0")
    if dims > 1 and not all(0 <= a < dims for a in axes):
        raise ValueError(f"axes must name spatial axes 0 to {dims - 1}; got {axes}")
    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    colours = [colormaps["viridis"](h / max(1, len(freqs) - 1)) for h in range(len(freqs))]
    _draw_bands(panels[0], freqs, colours)
    _draw_directions(panels[1], freqs, axes if dims > 1 else (0, 0), colours)
    shortest = float(2 * math.pi / freqs.norm(dim=-1).max())
    _draw_similarity(panels[2], freqs, reach or max(8 * max(embedding.reference_spacing), 4 * shortest))
    return figure


def _draw_bands(panel: Axes, freqs: torch.Tensor, colours: list[tuple[float, float, float, float]]) -> None:
    lengths = 2 * math.pi / freqs.norm(dim=-1)
    for head, colour in enumerate(colours):
        panel.plot(
            lengths[head].tolist(), [head] * lengths.shape[1], "|", color=colour, markersize=14, markeredgewidth=2
        )
    panel.set_xscale("log")
    panel.set(title="Wavelengths of every head", xlabel="wavelength (physical units)", ylabel="head")


def _draw_directions(
    panel: Axes, freqs: torch.Tensor, axes: tuple[int, int], colours: list[tuple[float, float, float, float]]
) -> None:
    pair = freqs[..., list(axes)]
    if axes[0] == axes[1]:
        pair[..., 1] = 0
    length = pair.norm(dim=-1, keepdim=True)
    visible = length[..., 0] > 1e-9 * length.max()
    # Logarithmic radius: the slowest visible wave lies near the centre, the fastest on the rim.
    slowest = length[visible].min()
    radius = 1 + torch.log10((length / slowest).clamp_min(1))
    spots = pair / length.clamp_min(1e-300) * radius
    for head, colour in enumerate(colours):
        seen = spots[head][visible[head]]
        panel.plot(seen[:, 0].tolist(), seen[:, 1].tolist(), "o", color=colour, markersize=4)
        for spot in seen.tolist():
            panel.plot([0, spot[0]], [0, spot[1]], "-", color=colour, linewidth=0.5, alpha=0.5)
    panel.set_aspect("equal")
    panel.set(
        title="Wave vectors (logarithmic radius)", xlabel=f"spatial axis {axes[0]}", ylabel=f"spatial axis {axes[1]}"
    )


def _draw_similarity(panel: Axes, freqs: torch.Tensor, reach: float) -> None:
    steps = torch.linspace(0, reach, 400, dtype=torch.float64)
    for axis in range(freqs.shape[-1]):
        apart = torch.zeros(len(steps), freqs.shape[-1], dtype=torch.float64)
        apart[:, axis] = steps
        panel.plot(steps.tolist(), phases(apart, freqs).cos().mean(dim=(1, 2)).tolist(), label=f"along axis {axis}")
    panel.legend()
    panel.set(title="Similarity over displacement", xlabel="displacement (physical units)", ylabel="mean cosine")
