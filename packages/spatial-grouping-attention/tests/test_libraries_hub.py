"""Networks saved by huggingface_hub's mixin: weights and arguments come back exactly, and nothing is pickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from library_cases import images, stirred
from spatial_grouping_attention.models import GroupingViT, SegmentationOutput
from torch import Tensor

# Libraries warn of matters of their own. They are imported where they are used: elsewhere they are not installed.
pytestmark = [pytest.mark.libraries, pytest.mark.filterwarnings("ignore")]
SMALL = {"dims": (8, 16), "depths": (1, 1), "num_heads": (1, 2), "iters": 1}
CASES: dict[str, dict[str, Any]] = {
    "nano": {"preset": "nano"},
    "tiny, smaller": {"preset": "tiny", **SMALL, "head_width": 8},
    "no preset": {**SMALL, "spacing": (0.5, 0.7), "strides": [(1, 2)], "kernels": [(1, 3)], "stem_stride": (4, 2)},
    "RoSE": {
        **SMALL, "spacing": 0.5, "reference_spacing": (2.0, 1.0), "base_theta": 100.0, "rotary_ratio": 0.5,
        "directions": "axial", "frequency_scaling": "none", "learnable": False, "init_jitter_std": 0.0,
        "spacing_transform": "log",
    },
    "wavelengths": {**SMALL, "wavelengths": (16.0, 64.0)},
    "twin": {**SMALL, "downsample": "conv", "head": "fpn", "compactness": None},
    "panoptic": {**SMALL, "head": "panoptic", "num_candidates": 7, "temperature": "learned"},
}  # fmt: skip


def make(*first: int, **options: Any) -> Any:
    from spatial_grouping_attention.models.hub import PretrainedGroupingViT

    torch.manual_seed(0)
    return stirred(PretrainedGroupingViT(*(first or (2, 1, 3)), **options)).eval()


def load(folder: Path, **options: Any) -> Any:
    from spatial_grouping_attention.models.hub import PretrainedGroupingViT

    torch.manual_seed(1)
    return PretrainedGroupingViT.from_pretrained(folder, **options)


def seen(model: GroupingViT, spacing: float | None = 0.6) -> Tensor:
    with torch.no_grad():
        output: SegmentationOutput = model(images(1, 1, 21, 30).to(model.stem.proj.weight.dtype), spacing)
    return output.logits


@pytest.mark.parametrize("case", CASES)
def test_what_was_saved_comes_back(case: str, tmp_path: Path) -> None:
    model = make(**CASES[case])
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    again = load(tmp_path)
    assert not again.training
    assert again.preset == CASES[case].get("preset")
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    for spacing in (None, 0.6, 3.0):
        assert torch.equal(seen(again, spacing), seen(model, spacing))
    again.save_pretrained(tmp_path / "second")
    assert (tmp_path / "second" / "config.json").read_text() == (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("options", [{}, {"downsample": "conv"}])
def test_it_is_the_network_of_the_preset(options: dict[str, str]) -> None:
    from spatial_grouping_attention.models import grouping_vit_nano

    model, plain = make(preset="nano", spacing=0.5, **options), grouping_vit_nano(2, 1, 3, spacing=0.5, **options)
    plain.eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(seen(plain), seen(model))


def test_presets_may_change_after_a_network_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from spatial_grouping_attention.models.presets import SETTINGS

    model = make(preset="nano")
    model.save_pretrained(tmp_path)
    monkeypatch.setitem(SETTINGS, "nano", SETTINGS["tiny"])
    assert torch.equal(seen(load(tmp_path)), seen(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("late", [False, True])
def test_the_dtype_is_that_of_the_network_when_saved(dtype: torch.dtype, late: bool, tmp_path: Path) -> None:
    model = make(**SMALL).to(dtype) if late else make(**SMALL, dtype=dtype)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    for name, value in model.state_dict().items():
        assert again.state_dict()[name].dtype == value.dtype
    assert torch.equal(seen(again), seen(model))


def change(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in config.items() if value != "left out"}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"window_size": 7, "patch": 2}, r"GroupingViT and a preset only; got \['patch', 'window_size'\]"),
        ({"dims": "left out"}, r"config.json must have .*; got none of \['dims'\]"),
        ({"preset": "huge"}, "preset must be one of 'nano'"),
        ({"dtype": "float"}, "dtype must be one of 'float16'"),
        ({"window": 4}, "window must be odd"),
    ],
)  # fmt: skip
def test_a_config_that_says_something_else_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    make(**SMALL).save_pretrained(tmp_path)
    change(tmp_path, **changes)
    with pytest.raises(ValueError, match=words):
        load(tmp_path)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    make(**SMALL).save_pretrained(tmp_path)
    change(tmp_path, temperature="learned")
    with pytest.raises(RuntimeError, match="log_temperature"):
        load(tmp_path)


def test_a_folder_without_arguments_is_refused(tmp_path: Path) -> None:
    make(**SMALL).save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config.json must have .*; got none of \['spatial_dims'"):
        load(tmp_path)


def test_arguments_that_json_cannot_hold_are_refused() -> None:
    with pytest.raises(TypeError, match="spacing must be numbers, strings or sequences of them"):
        make(**SMALL, spacing=numpy.float32(0.5))
    with pytest.raises(TypeError, match="unexpected keyword argument 'heads'"):
        make(**SMALL, heads=2)


def test_pickles_are_not_read() -> None:
    from spatial_grouping_attention.models.hub import PretrainedGroupingViT

    with pytest.raises(ValueError, match="a pickle, which is not read"):
        PretrainedGroupingViT._load_as_pickle(make(**SMALL), "pytorch_model.bin", "cpu", True)


def test_keywords_of_a_call_win_over_the_saved_ones(tmp_path: Path) -> None:
    model = make(**SMALL)
    model.save_pretrained(tmp_path)
    assert torch.equal(seen(load(tmp_path, spacing=0.5, reference_spacing=1.0), None), seen(model, 0.5))
