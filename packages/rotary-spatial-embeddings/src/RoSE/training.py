"""Learning rates for wave vectors, which have a unit where other weights have none."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from .embedding import RotarySpatialEmbedding
from .validation import require_module, require_real


def frequency_groups(model: nn.Module, lr: float) -> list[dict[str, Any]]:
    """Groups of an optimiser for all wave vectors of a model that learn.

    Adam and its kind take steps of about the learning rate whatever the size of a gradient. A wave vector is in
    radians per physical unit: one and the same step is nothing to it in millimetres and a thousand times its length in
    nanometres. In these groups the step is ``lr`` times the fastest wave vector that the module starts with
    (``1 / reference_spacing`` of its coarsest axis, or ``2 pi / wavelengths[0]``), so that training does not depend on
    the unit, and nothing decays, since decay pulls all wavelengths towards infinity. (Their gradients have a unit as
    well: leave them out where the norm of all gradients is clipped.)

    Args:
        model: holds :class:`RoSE.RotarySpatialEmbedding` at any depth.
        lr: of weights without a unit.

    Returns:
        Groups with ``"params"``, ``"lr"`` and ``"weight_decay"``, one for each rate, in the order of the modules;
        none where nothing learns.

    Raises:
        TypeError: ``model`` is not a module, ``lr`` not a number.
        ValueError: ``lr`` is negative or not finite.
    """
    require_module("model", model)
    lr = require_real("lr", lr, minimum=0.0)
    rates: dict[float, list[Tensor]] = {}
    seen: set[int] = set()
    for module in model.modules():
        if not isinstance(module, RotarySpatialEmbedding) or id(module.freqs) in seen:
            continue
        seen.add(id(module.freqs))
        if module.freqs.requires_grad:
            rates.setdefault(lr * _fastest(module), []).append(module.freqs)
    return [{"params": freqs, "lr": rate, "weight_decay": 0.0} for rate, freqs in rates.items()]


def _fastest(rotary: RotarySpatialEmbedding) -> float:
    """Radians per physical unit."""
    return 2 * math.pi / rotary.wavelengths[0] if rotary.wavelengths else 1 / max(rotary.reference_spacing)
