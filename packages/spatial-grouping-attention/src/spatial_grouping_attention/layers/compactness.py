"""How much a head prefers what is near: the weight of place beside content (SLIC, doi:10.1109/TPAMI.2012.120)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from RoSE.validation import require_parameter_dtype, require_real
from torch import Tensor, nn


def require_compactness(start: float | None, dtype: torch.dtype | None) -> float | None:
    """Return where a factor starts, if it is above 0 and a parameter of this type holds it; None for no factor."""
    if start is None:
        return None
    largest = torch.finfo(require_parameter_dtype(dtype)).max
    return require_real("compactness", start, above=0.0, minimum=0.0, maximum=largest)


def make_raw_compactness(
    start: float | None, num_heads: int, *, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Parameter | None:
    """What a head's factor is the softplus of (H,), which starts at ``start``; None where the term is left out."""
    if start is None:
        return None
    return nn.Parameter(torch.full((num_heads,), inverse_softplus(start), device=device, dtype=dtype))


def inverse_softplus(x: float) -> float:
    """The number whose softplus is x > 0."""
    return x + math.log(-math.expm1(-x))


def compactness_of(raw: Tensor | None) -> Tensor | None:
    """Factors of the squared distances (H,), in float32 at least."""
    return None if raw is None else F.softplus(raw.to(torch.promote_types(raw.dtype, torch.float32)))
