"""RoSE in the rope_impl slot of Primus.

Its own rotation needs timm < 1.0.23, whose embedding knew three dimensions; with RoSE in the slot, Primus runs beside
later versions too. ``nox -s tests-libraries`` runs this file beside both.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import adapter_cases as cases
import peers
import pytest
import torch
from RoSE.adapters import PrimusRope
from torch import nn

pytestmark = [pytest.mark.libraries, pytest.mark.filterwarnings("ignore")]
HEADS, SHAPE = 4, (2, 2, 3)
X = torch.randn(2, 1, 16, 16, 24, generator=torch.Generator().manual_seed(1))


def primus(**options: Any) -> nn.Module:
    peers.beside_torchvision("timm")
    architectures = peers.beside_torchvision("dynamic_network_architectures.architectures.primus")
    torch.manual_seed(0)
    make = partial(architectures.Primus, 1, 96, (8, 8, 8), 2, eva_depth=2, eva_numheads=HEADS, input_shape=X.shape[2:])
    return cases.lively(make(**{"num_register_tokens": 2, "use_abs_pos_embed": False} | options))


def primus_with_rose(**options: Any) -> nn.Module:
    return primus(rope_impl=PrimusRope, rope_kwargs={"num_heads": HEADS, **options})


@torch.no_grad()
def test_axial_settings_give_its_own_outputs() -> None:
    timm = peers.beside_torchvision("timm")
    if tuple(map(int, timm.__version__.split(".")[:3])) >= (1, 0, 23):
        pytest.skip(f"Primus' own embedding cannot be made beside timm {timm.__version__}")
    expected = primus()(X)
    for options in ({}, {"num_heads": 1}):
        model = primus_with_rose(**cases.AXIAL | options)
        with model.eva.rope.at(5.0):
            other = model(X)
        cases.alike(model(X), expected, other)
    # Anisotropic voxels: what an axis' steps are to it, its waves see.
    stretched = primus_with_rose(**cases.AXIAL, spacing=(3.0, 0.5, 0.5), reference_spacing=(3.0, 0.5, 0.5))
    cases.alike(stretched(X), expected, other)


def test_places_learn_and_compile() -> None:
    model = primus_with_rose(spacing=(3.0, 0.7, 0.7))
    rope = model.eva.rope
    spacing = torch.tensor([[3.0, 0.7, 0.7], [1.0, 1.0, 1.0]])
    with torch.no_grad():
        expected = model(X)
        with rope.at(spacing[0]):
            cases.alike(model(X), expected, model(X) * 0)
        with rope.at(2 * spacing):
            pass
        cases.samples_have_places_of_their_own(model, rope, X, 2 * spacing)
    cases.compiled_once(model, lambda m, x: m(x), rope, X)
    cases.wave_vectors_learn(model, rope, X)

    def make(reference: float) -> tuple[nn.Module, Any]:
        fitted = primus_with_rose(reference_spacing=reference)
        return fitted, fitted.eva.rope

    cases.unit_of_length_is_free(make, X)


def test_checkpoints_copies_and_casts() -> None:
    model = primus_with_rose()
    expected = model(X)
    other = primus_with_rose()
    other.load_state_dict(model.state_dict())
    for same in (other, copy.deepcopy(model)):
        assert torch.equal(same(X), expected)
    half = copy.deepcopy(model).bfloat16()
    assert half.eva.rope.rotary.freqs.dtype == torch.float32
    assert half(X.bfloat16()).isfinite().all()
    model.train()(X).square().sum().backward()
    assert (model.eva.rope.rotary.freqs.grad != 0).any()
