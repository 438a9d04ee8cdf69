"""What the tests of adapters in their libraries' models share."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from RoSE import Grid
from RoSE.adapters import RopeSlot
from torch import Tensor, nn

# Settings of the libraries' own rotations.
AXIAL = {"learnable": False, "directions": "axial", "frequency_scaling": "none"}
DINOV3 = {**AXIAL, "base_theta": 100.0, "reference_spacing": 1 / (2 * math.pi)}
SPACING = torch.tensor([[1.0, 1.0], [0.5, 2.0]])


def centred(shape: tuple[int, ...]) -> Grid:
    """Where DINOv3 sees its patches: every image reaches from -1 to 1."""
    return Grid(shape, [2 / n for n in shape], [1 / n - 1 for n in shape])


def lively(model: nn.Module) -> nn.Module:
    """The model with weights under which attention looks at some tokens more than at others."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("gamma_1", "gamma_2", "gamma", "lambda1")):  # what starts a residual branch near zero
                parameter.fill_(1.0)
            elif parameter.dim() > 1 and "rope" not in name and "rotary" not in name:
                parameter.normal_(std=1.5 / parameter[0].numel() ** 0.5, generator=generator)
    return model.eval()


def alike(got: Tensor, expected: Tensor, other: Tensor) -> None:
    """To 1e-5 the same, where a result for other positions is far from it."""
    scale = expected.abs().max()
    assert (other - expected).abs().max() > 0.02 * scale, "the model does not see positions"
    torch.testing.assert_close(got / scale, expected / scale, rtol=0, atol=1e-5)


def samples_have_places_of_their_own(
    run: Callable[[Tensor], Tensor], slot: RopeSlot, x: Tensor, spacing: Tensor
) -> None:
    """A batch with one spacing per sample gives what the samples give one by one."""
    with slot.at(spacing):
        together = run(x)
    for sample, row in enumerate(spacing):
        with slot.at(row):
            alone = run(x[sample : sample + 1])
        alike(together[sample : sample + 1], alone, together[sample : sample + 1] * 0 + run(x)[sample : sample + 1])


def unit_of_length_is_free(make: Callable[[float], tuple[Callable[[Tensor], Tensor], RopeSlot]], x: Tensor) -> None:
    """Lengths in thousandths of the unit, of positions and of wavelengths: the same outputs."""
    run, slot = make(0.5)
    thousandths, small = make(500.0)
    steps = torch.linspace(0.4, 0.9, slot.spatial_dims)
    with torch.no_grad():
        for part, other in zip(slot.parameters(), small.parameters(), strict=True):
            other.copy_(part / 1000)
        with slot.at(steps):
            expected = run(x)
        with slot.at(3 * steps):
            far = run(x)
        with small.at(1000 * steps):
            alike(thousandths(x), expected, far)


def wave_vectors_learn(run: Callable[[Tensor], Tensor], slot: RopeSlot, x: Tensor) -> None:
    """An optimiser's step through the model moves them and changes what the model says."""
    parameters = list(slot.parameters())
    before = [p.detach().clone() for p in parameters]
    first = run(x)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    (first * torch.randn(first.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    assert all((p.grad != 0).any() for p in parameters)
    optimizer.step()
    assert not any(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    assert not torch.allclose(run(x), first, atol=1e-4)


def compiled_once(model: nn.Module, run: Callable[[nn.Module, Tensor], Tensor], slot: RopeSlot, x: Tensor) -> None:
    """One graph without breaks for all spacings."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    steps = torch.linspace(0.4, 0.9, slot.spatial_dims)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for spacing in (1.0, steps, tuple((2 * steps).tolist())):
            with slot.at(spacing):
                torch.testing.assert_close(run(compiled, x), run(model, x), rtol=1e-4, atol=1e-4)
