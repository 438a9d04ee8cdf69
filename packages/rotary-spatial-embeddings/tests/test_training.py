"""Training does not depend on the unit of length: the same steps in micrometres and in nanometres."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from RoSE import RoSEMultiHeadAttention, RotarySpatialEmbedding, frequency_groups
from torch import nn

SHAPE, TOKENS = (5, 7), 35


def trained(unit: float, ours: bool, **options: object) -> tuple[nn.Module, torch.Tensor]:
    """An attention after five steps of Adam, and its output, where a length of 1 is ``unit`` long."""
    torch.manual_seed(0)
    model = RoSEMultiHeadAttention(24, 2, 2, dtype=torch.float64, **options)
    groups = frequency_groups(model, 0.01)
    if not ours:
        groups = [{"params": [p for group in groups for p in group["params"]]}]
    of_groups = {id(p) for group in groups for p in group["params"]}
    others = {"params": [p for p in model.parameters() if id(p) not in of_groups]}
    optimizer = torch.optim.Adam([others, *groups], 0.01)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        x = torch.randn(2, TOKENS, 24, dtype=torch.float64, generator=generator)
        loss = (model(x, (0.7 * unit, 1.3 * unit), SHAPE) - x.roll(1, 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(others["params"], 1e-2)
        optimizer.step()
    return model, model(x, (0.7 * unit, 1.3 * unit), SHAPE)


def options_in(unit: float, kind: str) -> dict[str, object]:
    if kind == "wavelengths":
        return {"wavelengths": (4.0 * unit, 100.0 * unit)}
    return {"reference_spacing": (0.7 * unit, 1.3 * unit)}


@pytest.mark.parametrize("kind", ["reference", "wavelengths"])
@pytest.mark.parametrize("unit", [1e3, 1e-6, 2.54])
def test_the_unit_of_length_changes_nothing(unit: float, kind: str) -> None:
    expected, out = trained(1.0, True, **options_in(1.0, kind))
    got, same = trained(unit, True, **options_in(unit, kind))
    torch.testing.assert_close(same, out, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(got.rotary.freqs * unit, expected.rotary.freqs, rtol=1e-7, atol=1e-9)


def test_with_one_rate_for_all_it_does() -> None:
    _, out = trained(1.0, False, **options_in(1.0, "reference"))
    _, other = trained(1e3, False, **options_in(1e3, "reference"))
    assert (other - out).abs().max() > 0.1 * out.abs().max()


def test_rates_are_those_of_the_coarsest_axis_and_every_wave_has_one() -> None:
    shared = RotarySpatialEmbedding(16, 2, 2, reference_spacing=(4.0, 0.5))
    model = nn.ModuleDict({
        "one": RotarySpatialEmbedding(16, 2, 2),
        "again": nn.Sequential(shared, shared),
        "long": RotarySpatialEmbedding(16, 2, 2, wavelengths=(math.pi, 50.0)),
        "fixed": RotarySpatialEmbedding(16, 2, 2, learnable=False),
        "frozen": RotarySpatialEmbedding(16, 2, 2).requires_grad_(False),
        "none": RotarySpatialEmbedding(16, 2, 2, rotary_ratio=0.0),
        "like the first": RotarySpatialEmbedding(16, 2, 2),
    })  # fmt: skip
    groups = frequency_groups(model, 0.1)
    assert [group["lr"] for group in groups] == pytest.approx([0.1, 0.025, 0.2])
    assert [group["eps"] for group in groups] == pytest.approx([1e-8, 4e-8, 0.5e-8])
    assert [group["weight_decay"] for group in groups] == [0.0] * 3
    expected: list[Any] = [[model["one"].freqs, model["like the first"].freqs], [shared.freqs], [model["long"].freqs]]
    assert [[id(p) for p in group["params"]] for group in groups] == [[id(p) for p in ps] for ps in expected]
    assert frequency_groups(nn.Linear(2, 2), 0.1) == []


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module; got"):
        frequency_groups([nn.Linear(2, 2)], 0.1)
    with pytest.raises(ValueError, match=r"lr must be .*; got -1"):
        frequency_groups(nn.Linear(2, 2), -1)
    with pytest.raises(ValueError, match=r"eps must be .*; got -1"):
        frequency_groups(nn.Linear(2, 2), 0.1, eps=-1)
    with pytest.raises(TypeError, match=r"lr must be .*; got 'fast'"):
        frequency_groups(nn.Linear(2, 2), "fast")
