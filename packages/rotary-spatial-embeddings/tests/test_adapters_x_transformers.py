"""RoSE in the rotary slot of x-transformers."""

from __future__ import annotations

import copy
from typing import Any

import adapter_cases as cases
import peers
import pytest
import torch
from RoSE import Grid
from RoSE.adapters import XTransformersRope
from torch import nn

pytestmark = [pytest.mark.libraries, pytest.mark.filterwarnings("ignore")]
SIZE = 32
X = torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(1))


def layers(kind: str = "Encoder", **options: Any) -> nn.Module:
    library = peers.beside_torchvision("x_transformers")
    sizes = {"dim": 64, "depth": 2, "heads": 4, "attn_dim_head": SIZE, "rotary_pos_emb": True, "rotary_emb_dim": SIZE}
    torch.manual_seed(0)
    return cases.lively(getattr(library, kind)(**sizes | options))


@pytest.mark.parametrize("options", [{}, {"rotary_emb_dim": SIZE // 2}, {"attn_kv_heads": 2}, {"attn_flash": True}])
@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
@torch.no_grad()
def test_one_axial_dimension_gives_the_models_own_outputs(kind: str, options: dict[str, Any]) -> None:
    model = layers(kind, **options)
    expected = model(X)
    model.rotary_pos_emb = XTransformersRope(options.get("rotary_emb_dim", SIZE), **cases.AXIAL)
    with model.rotary_pos_emb.at(5.0):
        other = model(X)
    cases.alike(model(X), expected, other)
    positions = torch.arange(24.0).unsqueeze(-1)
    cases.alike(model(X, pos=positions), expected, other)


@torch.no_grad()
def test_a_language_model_decodes_with_its_cache_and_memory() -> None:
    library = peers.beside_torchvision("x_transformers")
    model = cases.lively(
        library.TransformerWrapper(num_tokens=50, max_seq_len=32, attn_layers=layers("Decoder"), max_mem_len=8)
    )
    tokens = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(1))
    expected = model(tokens)
    own, mems = model(tokens[:, :8], return_mems=True)
    with_memory = model(tokens[:, 8:], mems=mems)
    model.attn_layers.rotary_pos_emb = XTransformersRope(SIZE, **cases.AXIAL)
    cases.alike(model(tokens), expected, expected * 0)
    cases.alike(model(tokens[:, 8:], mems=mems), with_memory, model(tokens[:, 8:]))
    _, cache = model(tokens[:, :15], return_intermediates=True)
    cases.alike(model(tokens, cache=cache)[:, -1], expected[:, -1], own[:, -1])


@torch.no_grad()
def test_images_and_volumes_by_coordinates() -> None:
    for shape, spacing in (((4, 6), cases.SPACING), ((2, 3, 4), torch.tensor([[3.0, 0.7, 0.7], [1.0, 1.0, 1.0]]))):
        model = layers()
        model.rotary_pos_emb = rope = XTransformersRope(SIZE, len(shape))
        points = Grid(shape, spacing).coordinates()
        together = model(X, pos=points)
        for sample in range(2):
            part = slice(sample, sample + 1)
            other = model(X[part], pos=points[1 - sample])
            cases.alike(model(X[part], pos=points[sample]), together[part], other)
            with rope.at(coordinates=Grid(shape, spacing[sample])):
                cases.alike(model(X[part]), together[part], other)
        # Outputs depend on displacements alone.
        cases.alike(model(X, pos=points + 1e4), together, model(X, pos=2 * points))
        with pytest.raises(ValueError, match="positions must be given"):
            model(X)


def test_a_vision_transformer_of_the_library() -> None:
    library = peers.beside_torchvision("x_transformers")
    model = library.ViTransformerWrapper(image_size=32, patch_size=8, attn_layers=layers(), num_classes=3)
    model.attn_layers.rotary_pos_emb = rope = XTransformersRope(SIZE, 2)
    images = torch.randn(2, 3, 32, 32)
    with rope.at(coordinates=Grid((4, 4), cases.SPACING)):
        model(images).sum().backward()
    assert (rope.rotary.freqs.grad != 0).any()


@torch.no_grad()
def test_keys_of_another_sequence_have_places_of_their_own() -> None:
    model = layers("Encoder", cross_attend=True)
    context = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(3))
    fine, coarse = Grid((4, 6), 0.5).coordinates(), Grid((2, 3), 1.0, 0.25).coordinates()
    model.rotary_pos_emb = XTransformersRope(SIZE, 2)
    expected = model(X, context=context, pos=fine, context_pos=coarse)
    other = model(X, context=context, pos=fine, context_pos=coarse + 2.0)
    cases.alike(model(X, context=context, pos=fine + 9.0, context_pos=coarse + 9.0), expected, other)


def test_places_learn_compile_and_are_saved() -> None:
    model = layers()
    model.rotary_pos_emb = XTransformersRope(SIZE)
    with torch.no_grad():
        cases.samples_have_places_of_their_own(model, model.rotary_pos_emb, X, torch.tensor([[0.3], [2.0]]))
    cases.compiled_once(model, lambda m, x: m(x), model.rotary_pos_emb, X)
    cases.wave_vectors_learn(model, model.rotary_pos_emb, X)
    other = layers()
    other.rotary_pos_emb = XTransformersRope(SIZE)
    other.load_state_dict(model.state_dict())
    for same in (other, copy.deepcopy(model)):
        assert torch.equal(same(X), model(X))
    half = copy.deepcopy(model).bfloat16()
    assert half.rotary_pos_emb.rotary.freqs.dtype == torch.float32
    assert half(X.bfloat16()).dtype == torch.bfloat16

    def make(reference: float) -> tuple[nn.Module, XTransformersRope]:
        fitted = layers()
        fitted.rotary_pos_emb = XTransformersRope(SIZE, reference_spacing=reference)
        return fitted, fitted.rotary_pos_emb

    cases.unit_of_length_is_free(make, X)
