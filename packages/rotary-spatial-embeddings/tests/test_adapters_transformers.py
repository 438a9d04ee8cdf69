"""RoSE in the place of transformers' DINOv3 position embedding."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import adapter_cases as cases
import peers
import pytest
import torch
from RoSE import RotarySpatialEmbedding, augment_coordinates
from RoSE.adapters import DINOv3Rope
from torch import Tensor, nn

pytestmark = [pytest.mark.libraries, pytest.mark.filterwarnings("ignore")]
SHAPE = (4, 6)
X = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def library() -> Any:
    return peers.beside_torchvision("transformers")


def config(**options: Any) -> Any:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return library().DINOv3ViTConfig(**sizes, num_register_tokens=3, layerscale_value=1.0, **options)


def model_of(**options: Any) -> nn.Module:
    return cases.lively(library().DINOv3ViTModel(config(**options)))


def run(model: nn.Module, x: Tensor = X) -> Tensor:
    return model(x).last_hidden_state


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_axial_settings_give_the_models_own_outputs(attention: str) -> None:
    model = model_of(attn_implementation=attention)
    expected = run(model)
    model.rope_embeddings = DINOv3Rope(model.config, **cases.DINOV3)
    other = run(model)
    with model.rope_embeddings.at(coordinates=cases.centred(SHAPE)):
        cases.alike(run(model), expected, other)


@torch.no_grad()
def test_axial_settings_give_the_backbones_own_maps() -> None:
    backbone = cases.lively(library().DINOv3ViTBackbone(config(out_indices=[1, 2])))
    expected = backbone(X).feature_maps
    backbone.rope_embeddings = DINOv3Rope(backbone.config, **cases.DINOV3)
    other = backbone(X).feature_maps
    with backbone.rope_embeddings.at(coordinates=cases.centred(SHAPE)):
        for maps in zip(backbone(X).feature_maps, expected, other, strict=True):
            cases.alike(*maps)


def test_places_learn_and_compile() -> None:
    model = model_of()
    model.rope_embeddings = DINOv3Rope(model.config)
    with torch.no_grad():
        cases.samples_have_places_of_their_own(lambda x: run(model, x), model.rope_embeddings, X, 3 * cases.SPACING)
    cases.compiled_once(model, run, model.rope_embeddings, X)
    cases.wave_vectors_learn(lambda x: run(model, x), model.rope_embeddings, X)

    def make(reference: float) -> tuple[Any, DINOv3Rope]:
        fitted = model_of()
        fitted.rope_embeddings = DINOv3Rope(fitted.config, reference_spacing=reference)
        return lambda x: run(fitted, x), fitted.rope_embeddings

    cases.unit_of_length_is_free(make, X)


@torch.no_grad()
def test_augmentation_is_what_dinov3_does_while_training() -> None:
    amounts = {"shift": 0.3, "jitter": 1.5, "rescale": 2.0}
    model = model_of(**{f"pos_embed_{name}": amount for name, amount in amounts.items()})
    plain = run(model)
    torch.manual_seed(5)
    expected = run(model.train())
    model.rope_embeddings = DINOv3Rope(model.config, **cases.DINOV3)
    torch.manual_seed(5)
    points = augment_coordinates(cases.centred(SHAPE).coordinates(dtype=torch.float32), **amounts)
    with model.rope_embeddings.at(coordinates=points):
        cases.alike(run(model), expected, plain)


def test_copies_casts_and_checkpointing() -> None:
    model = model_of()
    model.rope_embeddings = DINOv3Rope(model.config)
    expected = run(model)
    assert torch.equal(run(copy.deepcopy(model)), expected)
    half = copy.deepcopy(model).bfloat16()
    assert half.rope_embeddings.rotary.freqs.dtype == torch.float32
    assert run(half).dtype == torch.bfloat16
    assert (run(half) - expected).abs().max() < 0.1 * expected.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        assert (run(model) - expected).abs().max() < 0.1 * expected.abs().max()
    model.gradient_checkpointing_enable()
    with model.rope_embeddings.at(0.7):
        loss = run(model.train()).square().sum()
    loss.backward()
    assert (model.rope_embeddings.rotary.freqs.grad != 0).any()


@pytest.mark.parametrize("learnable", [True, False])
def test_saved_and_loaded_by_the_library(learnable: bool, tmp_path: Path) -> None:
    """As docs/rose-adapters.md says: a class that has the adapter, and knows how its wave vectors start."""

    class Model(library().DINOv3ViTModel):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.rope_embeddings = DINOv3Rope(config, reference_spacing=0.5, learnable=learnable)

        def _init_weights(self, module: nn.Module) -> None:
            super()._init_weights(module)
            if isinstance(module, RotarySpatialEmbedding):
                module.reset_parameters()

    model = Model(config()).eval()
    if learnable:
        with torch.no_grad():
            model.rope_embeddings.rotary.freqs.mul_(1.25)
    model.save_pretrained(tmp_path / "mine")
    loaded = Model.from_pretrained(tmp_path / "mine").eval()
    assert torch.equal(run(loaded), run(model))
    # Weights of the library's own model have no wave vectors: they start as they are made.
    library().DINOv3ViTModel(config()).save_pretrained(tmp_path / "theirs")
    started = Model.from_pretrained(tmp_path / "theirs").rope_embeddings.rotary.freqs
    made = DINOv3Rope(config(), reference_spacing=0.5, learnable=False).rotary.freqs
    torch.testing.assert_close(started.detach(), made, rtol=0.15 if learnable else 0, atol=0)
