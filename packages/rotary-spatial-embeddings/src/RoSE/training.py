"""Learning rates for wave vectors, which have a unit where other weights have none."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from .embedding import RotarySpatialEmbedding
from .validation import require_module, require_real


def frequency_groups(model: nn.Module, lr: float, *, eps: float = 1e-8) -> list[dict[str, Any]]:
    """Groups of an optimiser for all wave vectors of a model that learn.

    Adam and its kind take steps of about the learning rate whatever the size of a gradient. A wave vector is in
    radians per physical unit: one and the same step is nothing to it in millimetres and a thousand times its length in
    nanometres. In these groups ``lr`` and ``eps`` are in units of the fastest wave vector that the module starts with
    along its coarsest axis (``1 / reference_spacing``, or ``2 pi / wavelengths[0]``), so that training does not depend
    on the unit. Along a finer axis waves are faster, and learn more slowly for their length. Nothing decays, since
    decay pulls all wavelengths towards infinity. Gradients have a unit as well: leave these groups out where the norm
    of all gradients is clipped.

    Args:
        model: holds :class:`RoSE.RotarySpatialEmbedding` at any depth.
        lr: of weights without a unit.
        eps: what the optimiser adds to the size of such weights' gradients (Adam's default).

    Returns:
        Groups with ``"params"``, ``"lr"``, ``"eps"`` and ``"weight_decay"``, one for each rate, in the order of the
        modules; none where nothing learns.

    Raises:
        TypeError: ``model`` is not a module, ``lr`` or ``eps`` not a number.
        ValueError: ``lr`` or ``eps`` is negative or not finite.
    """
    require_module("model", model)
    lr = require_real("lr", lr, minimum=0.0)
    eps = require_real("eps", eps, minimum=0.0)
    waves: dict[float, list[Tensor]] = {}
    seen: set[int] = set()
    for module in model.modules():
        if not isinstance(module, RotarySpatialEmbedding) or id(module.freqs) in seen:
            continue
        seen.add(id(module.freqs))
        if module.freqs.requires_grad:
            waves.setdefault(_fastest(module), []).append(module.freqs)
    return [
        {"params": freqs, "lr": lr * fastest, "eps": eps / fastest, "weight_decay": 0.0}
        for fastest, freqs in waves.items()
    ]


def _fastest(rotary: RotarySpatialEmbedding) -> float:
    """Radians per physical unit, along the coarsest axis."""
    return 2 * math.pi / rotary.wavelengths[0] if rotary.wavelengths else 1 / max(rotary.reference_spacing)
