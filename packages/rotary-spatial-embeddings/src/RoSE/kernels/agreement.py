"""The small problem on which the kernels have to agree with the plain form before they serve."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rotation import rotate_plain
from .calls import rotate, rotate_positions
from .plain import rotate_by_positions
from .selfcheck import require_agreement

TOLERANCE = 1e-5


def check_rotation(device: torch.device) -> None:
    """Compare both kernels and their gradients with the plain form in float64.

    Raises:
        ArithmeticError: They disagree.
    """
    batch, heads, tokens, channels, planes, axes, prefix = 2, 3, 5, 10, 3, 2, 1
    q = _numbers(device, batch, tokens, heads, channels).transpose(1, 2)
    k = _numbers(device, batch, heads, tokens, channels)
    freqs = _numbers(device, heads - 1, planes, axes)
    coordinates = 1e4 + 100 * _numbers(device, batch, tokens - prefix, axes).double()
    leaves = {"q": q, "k": k, "coordinates": coordinates, "wave vectors": freqs}
    results = []
    for wide in (False, True):
        q, k, coordinates, freqs = ((x.double() if wide else x).detach().requires_grad_() for x in leaves.values())
        if wide:
            turned = [rotate_by_positions(x, coordinates, freqs, prefix, True) for x in (q, k)]
        else:
            turned = [x for x in rotate_positions(q, k, coordinates, freqs, num_prefix_tokens=prefix) if x is not None]
        gradients = torch.autograd.grad(turned, (q, k, coordinates, freqs), [x.detach().cos() for x in turned])
        results.append([*turned, *gradients])
    names = ["turned q", "turned k", *(f"the gradient to {name}" for name in leaves)]
    for name, got, expected in zip(names, *results, strict=True):
        require_agreement(name, got, expected, TOLERANCE)

    angle = _numbers(device, tokens, heads, planes)
    leaves = {"x": _numbers(device, batch, tokens, heads, channels), "cosines": angle.cos(), "sines": angle.sin()}
    results = []
    for wide in (False, True):
        x, cos, sin = ((x.double() if wide else x).detach().requires_grad_() for x in leaves.values())
        out = rotate_plain(x, cos, sin, False) if wide else rotate(x, cos, sin, interleaved=False)
        results.append([out, *torch.autograd.grad(out, (x, cos, sin), out.detach().cos())])
    for name, got, expected in zip(
        ["turned x", *(f"the gradient to {name}" for name in leaves)], *results, strict=True
    ):
        require_agreement(name, got, expected, TOLERANCE)


def _numbers(device: torch.device, *shape: int) -> Tensor:
    """Irregular numbers in [-1, 1] that leave torch's generators alone."""
    count = torch.Size(shape).numel()
    return torch.arange(1, count + 1, device=device, dtype=torch.float32).mul(2.4).sin().view(shape)
