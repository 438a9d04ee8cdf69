"""What the kernels compute, in torch's own operations: for second derivatives, and to check them against."""

from __future__ import annotations

import torch
from torch import Tensor

from ..angles import angles_of_tokens
from ..rotation import rotate_plain, work_dtype


def rotate_by_positions(
    x: Tensor, coordinates: Tensor, freqs: Tensor, num_prefix_tokens: int, interleaved: bool
) -> Tensor:
    """``(batch, heads, tokens, channels)`` turned by ``<p, w>``, as :func:`RoSE.kernels.rotate_positions` does."""
    cos, sin = angles_of_tokens(coordinates, freqs, num_prefix_tokens, work_dtype(x))
    rotary = freqs.shape[0]
    turned = rotate_plain(x[:, :rotary], cos.transpose(-3, -2), sin.transpose(-3, -2), interleaved)
    return torch.cat((turned, x[:, rotary:]), dim=1)
