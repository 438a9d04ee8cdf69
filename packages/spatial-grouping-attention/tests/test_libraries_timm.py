"""The presets as timm's models, and through timm in segmentation_models_pytorch and transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from library_cases import beside_torchvision, images, nano, stirred
from torch import Tensor, nn

# Libraries warn of matters of their own. They are imported where they are used: elsewhere they are not installed.
pytestmark = [pytest.mark.libraries, pytest.mark.filterwarnings("ignore")]
SIZE = (37, 50)
TINY = {"dims": (16, 32, 64, 128), "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8), "iters": 1}
"""The layout of tiny, smaller."""


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    beside_torchvision("timm")
    import spatial_grouping_attention.models.timm_models  # noqa: F401


def create(name: str = "grouping_vit_nano", **options: Any) -> Any:
    import timm

    torch.manual_seed(0)
    return stirred(timm.create_model(name, **options)).eval()


def test_every_preset_is_listed() -> None:
    import timm

    names = [f"grouping_vit_{size}" for size in ("base", "large", "nano", "tiny")]
    assert timm.list_models("grouping_vit*") == timm.list_models(module="timm_models") == names
    assert timm.list_models("grouping_vit*", pretrained=True) == []
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("grouping_vit_nano", pretrained=True)


@pytest.mark.parametrize("options", [{}, {"downsample": "conv"}, {"stem_stride": (4, 2), "strides": [1, (1, 2)]}])
def test_features_are_those_of_the_network(options: dict[str, Any]) -> None:
    network = nano(in_channels=3, num_classes=5, **options).eval()
    model = create(features_only=True, **options)
    missing, unexpected = model.model.load_state_dict(network.state_dict(), strict=False)
    assert missing == []
    assert unexpected
    assert all(name.startswith("head.") for name in unexpected)
    x = images(2, 3, *SIZE)
    with torch.no_grad():
        features, output = model(x), network(x)
    for got, want, grid, dim in zip(features, output.features, output.grids, network.dims, strict=True):
        assert got.shape == (2, dim, *grid.shape)
        torch.testing.assert_close(got.flatten(2).mT, want)
    assert model.feature_info.channels() == list(network.dims)
    assert model.feature_info.reduction() == [round(max(grid.spacing)) for grid in output.grids]


def test_only_the_stages_that_are_asked_for_are_kept() -> None:
    x, all_of_them = images(1, 3, *SIZE), create(features_only=True)
    for wanted in ((1,), (0, 1), (-1,), (-2,), 2):
        some = create(features_only=True, out_indices=wanted)
        some.load_state_dict(all_of_them.state_dict(), strict=False)
        numbers = [n % 3 for n in (range(-wanted, 0) if isinstance(wanted, int) else wanted)]
        with torch.no_grad():
            for got, number in zip(some(x), numbers, strict=True):
                torch.testing.assert_close(got, all_of_them(x)[number])
        assert some.feature_info.channels() == [all_of_them.feature_info.channels()[n] for n in numbers]
        assert len(some.model.stages) == max(numbers) + 1
        assert len(some.model.downsamples) == max(numbers)


def test_the_parts_of_a_classifier_make_the_whole() -> None:
    model, x = create(num_classes=7, in_chans=2), images(2, 2, *SIZE)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == (2, model.num_features, 5, 7)
        torch.testing.assert_close(model.forward_head(features), model(x))
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.mean((2, 3)))
        last, found = model.forward_intermediates(x)
        torch.testing.assert_close(last, features)
        torch.testing.assert_close(found[-1], features)
        early = model.forward_intermediates(x, [0], stop_early=True, intermediates_only=True)
        torch.testing.assert_close(early[0], found[0])
        first, _ = model.forward_intermediates(x, [0], stop_early=True)
        torch.testing.assert_close(first, found[0])
    assert model(x).shape == (2, 7)
    assert model.in_chans == 2
    with pytest.raises(ValueError, match="output_fmt must be one of 'NCHW'"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_spacing_is_told_per_call_or_beforehand() -> None:
    x, spacing = images(2, 3, *SIZE), torch.tensor([[0.5, 0.8], [2.0, 1.0]])
    model, network = create(), nano(in_channels=3).eval()
    network.load_state_dict({n: p for n, p in model.state_dict().items() if "head" not in n}, strict=False)
    with torch.no_grad():
        want = network(x, spacing).features[-1]
        torch.testing.assert_close(model.forward_features(x, spacing=spacing).flatten(2).mT, want)
        logits = model(x, spacing=spacing)
        assert not torch.allclose(logits, model(x))
        torch.testing.assert_close(logits[:1], model(x[:1], spacing[0]))
        beforehand = create(spacing=(0.5, 0.8), reference_spacing=1.0)
        beforehand.load_state_dict(model.state_dict())
        torch.testing.assert_close(beforehand(x)[:1], logits[:1])


def test_the_classifier_can_be_replaced_and_removed() -> None:
    model, x = create(num_classes=7), images(2, 3, *SIZE)
    assert model.get_classifier() is model.head.fc
    model.reset_classifier(4)
    assert model(x).shape == (2, 4)
    assert model.num_classes == 4
    model.reset_classifier(5, "max")
    with torch.no_grad():
        torch.testing.assert_close(model(x), model.get_classifier()(model.forward_features(x).amax((2, 3))))
    assert model.global_pool == "max"
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    assert isinstance(model.get_classifier(), nn.Identity)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, model.num_features, 5, 7)


def test_gradients_are_the_same_when_recomputed() -> None:
    model, x = create("grouping_vit_tiny", num_classes=3, drop_path_rate=0.4, **TINY).train(), images(2, 3, *SIZE)
    kept, gradients = [], []

    def count(tensor: Tensor) -> Tensor:
        kept[-1] += tensor.numel()
        return tensor

    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(3)
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            logits = model(x)
        logits.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])
    assert kept[1] < kept[0] / 2


def test_dropout_and_stochastic_depth_have_timms_names() -> None:
    model, x = create(drop_path_rate=0.5, drop_rate=0.5), images(2, 3, *SIZE)
    rates = [part.rate for name, part in model.named_modules() if name.endswith("drop_path")]
    assert max(rates) == 0.5
    assert model.head.drop.p == 0.5
    torch.testing.assert_close(model(x), model(x))
    model.train()
    assert not torch.allclose(model(x), model(x))


@pytest.mark.parametrize("name", ["grouping_vit_nano", "grouping_vit_tiny"])
def test_layers_are_ordered_by_depth_for_the_optimiser(name: str) -> None:
    from timm.optim import create_optimizer_v2

    model = create(name, temperature="learned")
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.1, layer_decay=0.5)
    scale, decay = {}, {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            scale[id(parameter)], decay[id(parameter)] = group["lr_scale"], group["weight_decay"]
    rate = {name: scale[id(parameter)] for name, parameter in model.named_parameters()}
    parts = ["stem."]
    for i, stage in enumerate(model.stages):
        parts += [f"stages.{i}.blocks.{j}." for j in range(len(stage.blocks))]
        parts += [f"downsamples.{i}."] * (i < len(model.downsamples))
    parts.append("head.")
    rates = [{value for name, value in rate.items() if name.startswith(part)} for part in parts]
    assert all(len(values) == 1 for values in rates)
    in_order = [value for (value,) in rates]
    assert in_order == sorted(set(in_order))
    assert in_order[-1] == 1.0
    free = model.no_weight_decay()
    assert {n.rpartition(".")[2] for n in free} == {"freqs", "raw_compactness", "log_temperature"}
    for n, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if n in free or parameter.ndim <= 1 else 0.1)


def test_what_timm_knows_of_a_model() -> None:
    from spatial_grouping_attention.models.timm_models import GroupingBackbone
    from timm.data import resolve_model_data_config

    model = create(num_classes=11)
    assert model.default_cfg["architecture"] == "grouping_vit_nano"
    assert model.default_cfg["fixed_input_size"] is False
    assert model.get_submodule(model.default_cfg["first_conv"]) is model.stem.proj
    assert model.get_submodule(model.default_cfg["classifier"]) is model.get_classifier()
    assert resolve_model_data_config(model)["input_size"] == (3, 224, 224)
    with pytest.raises(TypeError, match="unexpected keyword argument 'patch_size'"):
        create(patch_size=16)
    with pytest.raises(ValueError, match="spatial_dims of the network must be one of 2"):
        GroupingBackbone(nano(3))


def test_half_types_and_one_graph() -> None:
    model, x = create(num_classes=3), images(2, 3, *SIZE)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert (model(x) - model.float()(x)).abs().max() < 0.1
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


SMP: dict[str, tuple[str, dict[str, Any]]] = {
    # Reductions 2, 4, 8: nano, with three steps of a decoder.
    "nano": ("nano", {"encoder_depth": 3}),
    # 4, 8, 16, 32: the layout of the others, with the five that most decoders have.
    "tiny": ("tiny", TINY),
    # 2, 4, 8, 16, 32: nano with five stages.
    "five": ("nano", {"dims": (8, 16, 16, 32, 32), "depths": (0, 1, 1, 1, 1), "num_heads": (1, 2, 2, 4, 4)}),
}


@pytest.mark.parametrize("case", SMP)
@pytest.mark.parametrize("architecture", ["Unet", "FPN"])
def test_segmentation_models_pytorch_decodes_the_features(architecture: str, case: str) -> None:
    smp = beside_torchvision("segmentation_models_pytorch")
    preset, options = SMP[case]
    if case == "nano" and architecture == "Unet":
        options = {**options, "decoder_channels": (32, 16, 8)}
    if case == "nano" and architecture == "FPN":
        # Of three levels and the image, which is where its decoder ends already.
        options = {**options, "upsampling": 1}
    torch.manual_seed(0)
    model = getattr(smp, architecture)(
        f"tu-grouping_vit_{preset}", encoder_weights=None, in_channels=2, classes=3, **options
    )
    x = images(2, 2, 64, 96)
    features = model.encoder(x)
    assert [f.shape[1] for f in features] == model.encoder.out_channels
    assert [f.shape[2] for f in features] == [64 // 2**i for i in range(len(features))]
    logits = model(x)
    assert logits.shape == (2, 3, 64, 96)
    logits.square().sum().backward()
    assert all(p.grad is not None for p in model.encoder.parameters())


def test_transformers_has_it_for_a_backbone() -> None:
    transformers = beside_torchvision("transformers")
    config = transformers.TimmBackboneConfig(
        backbone="grouping_vit_nano", num_channels=2, out_indices=(0, 2), use_pretrained_backbone=False
    )
    torch.manual_seed(0)
    backbone = transformers.TimmBackbone(config)
    network, x = nano(in_channels=2).eval(), images(2, 2, *SIZE)
    parameters = {f"_backbone.model.{name}": value for name, value in network.state_dict().items()}
    missing, _ = backbone.load_state_dict(parameters, strict=False)
    assert missing == []
    with torch.no_grad():
        maps, want = backbone.eval()(x).feature_maps, network(x)
    for got, number in zip(maps, (0, 2), strict=True):
        assert got.shape == (2, network.dims[number], *want.grids[number].shape)
        torch.testing.assert_close(got.flatten(2).mT, want.features[number])
    assert list(backbone.channels) == [network.dims[0], network.dims[2]]
    assert backbone.stage_names == ["stages.0", "stages.1", "stages.2"] or len(backbone.out_features) == 2
