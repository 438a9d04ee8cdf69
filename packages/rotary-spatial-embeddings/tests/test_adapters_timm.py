"""RoSE in the rope slot of timm's vision transformers."""

from __future__ import annotations

import copy
import math
from typing import Any

import adapter_cases as cases
import peers
import pytest
import torch
from RoSE import augment_coordinates
from RoSE.adapters import TimmRope
from torch import Tensor, nn

pytestmark = [pytest.mark.libraries, pytest.mark.filterwarnings("ignore")]
SHAPE = (4, 6)
X = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
FIXED_SIZE = {"img_size": (64, 96)}
MODELS: dict[str, dict[str, Any]] = {
    "vit_small_patch16_dinov3": {},  # half layout, class token and registers, any size
    "vit_small_patch16_rope_224.naver_in1k": FIXED_SIZE,
    "vit_small_patch16_rope_mixed_224.naver_in1k": FIXED_SIZE,  # wave vectors of every block
    "eva02_tiny_patch14_224": {**FIXED_SIZE, "patch_size": 16},
    "vit_medium_patch16_rope_reg1_gap_256.sbb_in1k": {"dynamic_img_size": True},
}
# Where a model of timm's sees its patches, and in which waves.
OWN: dict[str, dict[str, Any]] = {
    "RotaryEmbeddingDinoV3": {"coordinates": cases.centred(SHAPE)},
    "RotaryEmbeddingCat": {"spacing": 1.0},
    "RotaryEmbeddingMixed": {"spacing": 1.0},
}


def model_of(name: str, **options: Any) -> nn.Module:
    timm = peers.beside_torchvision("timm")
    return cases.lively(timm.create_model(name, depth=2, num_classes=0, **MODELS[name], **options))


def with_its_own_waves(model: nn.Module) -> dict[str, Any]:
    """Put RoSE into the slot, turning as what was there; return where tokens then are."""
    own = model.rope
    kind = type(own).__name__
    where = dict(OWN[kind])
    if kind == "RotaryEmbeddingDinoV3":
        model.rope = TimmRope.for_model(model, **cases.DINOV3)
    elif kind == "RotaryEmbeddingMixed":
        model.rope = TimmRope.for_model(model)
        state = {f"rotary.{i}.freqs": own.freqs.detach()[:, i].movedim(0, -1) for i in range(2)}
        model.rope.load_state_dict({name: freqs.flip(-1) for name, freqs in state.items()})  # timm: x, then y
    else:
        model.rope = TimmRope.for_model(model, **cases.AXIAL, base_theta=float(own.temperature))
        if own.grid_indexing == "xy":
            model.rope.rotary.freqs.copy_(model.rope.rotary.freqs.flip(-1))
        if own.ref_feat_shape is not None:
            where = {"spacing": [ref / n for ref, n in zip(own.ref_feat_shape, SHAPE, strict=True)]}
    return where


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_axial_settings_give_the_models_own_outputs(name: str) -> None:
    model = model_of(name)
    expected, features = model(X), model.forward_features(X)
    where = with_its_own_waves(model)
    with model.rope.at(7.0):
        other = model(X)
    with model.rope.at(**where):
        cases.alike(model(X), expected, other)
        torch.testing.assert_close(model.forward_features(X), features, rtol=1e-4, atol=1e-4)
        _, intermediates = model.forward_intermediates(X, indices=[1], norm=True)
    torch.testing.assert_close(
        intermediates[0].flatten(2).mT, features[:, model.num_prefix_tokens :], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", MODELS)
def test_places_learn_and_compile(name: str) -> None:
    model = model_of(name)
    model.rope = TimmRope.for_model(model)
    with torch.no_grad():
        cases.samples_have_places_of_their_own(model, model.rope, X, 3 * cases.SPACING)
    cases.compiled_once(model, lambda m, x: m(x), model.rope, X)
    cases.wave_vectors_learn(model, model.rope, X)

    def make(reference: float) -> tuple[nn.Module, Any]:
        model.rope = TimmRope.for_model(model, reference_spacing=reference)
        fitted = copy.deepcopy(model)
        return fitted, fitted.rope

    cases.unit_of_length_is_free(make, X)


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_copies_casts_and_sizes(name: str) -> None:
    model = model_of(name)
    model.rope = TimmRope.for_model(model)
    expected = model(X)
    restored = model_of(name)
    restored.rope = TimmRope.for_model(restored)
    restored.load_state_dict(model.state_dict())
    for other in (restored, copy.deepcopy(model)):
        assert torch.equal(other(X), expected)
    names = {n for n, _ in model.named_parameters() if n.startswith("rope.")}
    assert names == {n for n in model.no_weight_decay() if n.startswith("rope.")}
    half = copy.deepcopy(model).bfloat16()
    assert all(p.dtype == torch.float32 for p in half.rope.parameters())
    assert half(X.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(X) - expected).abs().max() < 0.1 * expected.abs().max()
    model.set_grad_checkpointing()
    with model.rope.at(0.7):
        loss = model.train()(X).square().sum()
    loss.backward()  # outside of the context: tables are made before what is recomputed
    assert all((p.grad != 0).any() for p in model.rope.parameters())
    model.set_grad_checkpointing(False)
    if not model.dynamic_img_size:
        model.set_input_size(img_size=(32, 48))
    assert model.forward_features(X[..., :32, :48]).shape[1] == model.num_prefix_tokens + 6


@torch.no_grad()
def test_augmentation_is_what_dinov3_does_while_training() -> None:
    amounts = {"shift": 0.3, "jitter": 1.5, "rescale": 2.0}
    model = model_of("vit_small_patch16_dinov3")
    for name, amount in amounts.items():
        setattr(model.rope, f"{name}_coords", amount)
    model.rope.aug_active = True
    plain = model(X)
    torch.manual_seed(5)
    expected = model.train()(X)
    where = with_its_own_waves(model)
    torch.manual_seed(5)
    points = augment_coordinates(where["coordinates"].coordinates(dtype=torch.float32), **amounts)
    with model.rope.at(coordinates=points):
        cases.alike(model(X), expected, plain)


def test_patches_may_be_dropped_where_every_block_has_its_own_waves() -> None:
    model = model_of("vit_medium_patch16_rope_reg1_gap_256.sbb_in1k", patch_drop_rate=0.5).train()
    with pytest.raises(ValueError, match="rope_mixed must be True, set before, where a model drops patches"):
        TimmRope.for_model(model)
    model.rope_mixed = True
    model.rope = TimmRope.for_model(model)
    assert len(model.rope.rotary) == 2
    model(X)[:, 0].sum().backward()
    assert all((p.grad != 0).any() for p in model.rope.parameters())


@torch.no_grad()
def test_patches_may_be_dropped_where_heads_share_their_waves() -> None:
    model = model_of("vit_medium_patch16_rope_reg1_gap_256.sbb_in1k", patch_drop_rate=0.5).train()
    own = model.rope
    torch.manual_seed(0)
    expected = model(X)
    model.rope = TimmRope(64, 1, **cases.AXIAL)
    if own.grid_indexing == "xy":
        model.rope.rotary.freqs.copy_(model.rope.rotary.freqs.flip(-1))
    outputs = []
    for spacing in ([ref / n for ref, n in zip(own.ref_feat_shape, SHAPE, strict=True)], 7.0):
        with model.rope.at(spacing):
            torch.manual_seed(0)
            outputs.append(model(X))
    cases.alike(outputs[0], expected, outputs[1])


def test_heads_that_share_keys_share_their_waves() -> None:
    from timm.models.eva import Eva

    if "num_kv_heads" not in Eva.__init__.__annotations__:
        pytest.skip("this timm has no grouped queries")
    sizes = {"img_size": (64, 96), "embed_dim": 96, "depth": 2, "num_heads": 6, "num_kv_heads": 2, "num_classes": 0}
    model = cases.lively(Eva(**sizes, qkv_fused=False, attn_type="rope", use_rot_pos_emb=True, use_abs_pos_emb=False))
    expected = model(X)
    model.rope = TimmRope.for_model(model, **cases.AXIAL)
    assert model.rope.num_heads == 1
    with model.rope.at(7.0):
        other = model(X)
    cases.alike(model(X), expected, other)
    with torch.no_grad():
        cases.samples_have_places_of_their_own(model, model.rope, X, 3 * cases.SPACING)


def test_a_model_without_a_rope_is_refused() -> None:
    timm = peers.beside_torchvision("timm")
    with pytest.raises(TypeError, match="model must be a timm Eva with a rope; got VisionTransformer"):
        TimmRope.for_model(timm.create_model("vit_tiny_patch16_224", depth=1))


def test_far_from_the_origin_scores_stay() -> None:
    """Where no token stands outside of space, outputs depend on displacements alone."""
    model = model_of("vit_small_patch16_rope_224.naver_in1k", class_token=False, global_pool="avg")
    model.rope = TimmRope.for_model(model, reference_spacing=1 / math.pi)
    assert model.num_prefix_tokens == 0
    with torch.no_grad():
        points = cases.centred(SHAPE).coordinates()
        outputs: list[Tensor] = []
        for where in (points, points + torch.tensor([1e5, -3e4]), points * 2):
            with model.rope.at(coordinates=where):
                outputs.append(model(X))
    cases.alike(outputs[1], outputs[0], outputs[2])
