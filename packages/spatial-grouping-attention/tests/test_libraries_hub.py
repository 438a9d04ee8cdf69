"""Networks saved by huggingface_hub's mixin: weights and arguments come back exactly, and nothing is pickled."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
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


def save_in_a_child(save: Callable[[], None]) -> int:
    """How a process ends that saves; it shares the files with this one, and nothing else."""
    child = multiprocessing.get_context("fork").Process(target=save)
    child.start()
    child.join(60)
    assert child.exitcode is not None
    return child.exitcode


def saved(folder: Path) -> tuple[GroupingViT, GroupingViT]:
    """A network that was saved, and another one like it."""
    old, new = make(**SMALL), make(**SMALL)
    with torch.no_grad():
        new.stem.proj.weight.add_(1.0)
    old.save_pretrained(folder)
    return old, new


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
@pytest.mark.parametrize("moment", ["while weights are written", "before the first file", "between files"])
def test_a_program_that_is_killed_leaves_a_whole_network(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = saved(tmp_path)
    replace, before = os.replace, [] if moment == "before the first file" else [None]

    def at_last(*files: Any) -> None:
        before.pop() if before else die()
        if moment == "between files":
            replace(*files)

    def half(_: object, file: str, **__: object) -> None:
        Path(file).write_bytes(b"half of it")
        die()

    with monkeypatch.context() as patch:
        if moment == "while weights are written":
            patch.setattr("safetensors.torch.serialize_file", half)
        else:
            patch.setattr(os, "replace", at_last)
        assert save_in_a_child(lambda: new.save_pretrained(tmp_path)) == -signal.SIGKILL
    found = new if moment == "between files" else old
    assert torch.equal(seen(load(tmp_path)), seen(found))
    whole = {"model.safetensors", "config.json", "README.md"}
    new.save_pretrained(tmp_path)
    assert torch.equal(seen(load(tmp_path)), seen(new))
    (leftover,) = {path.name for path in tmp_path.iterdir()} - whole  # another program could be at it still
    os.utime(tmp_path / leftover, (0, 0))
    new.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == whole


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_a_full_disk_leaves_the_old_network(tmp_path: Path) -> None:
    """The system does not let files of the process grow."""
    import resource

    old, new = saved(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def save() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        with pytest.raises(OSError, match=r"cannot write .*; what was there is unchanged"):
            new.save_pretrained(tmp_path)

    assert save_in_a_child(save) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert torch.equal(seen(load(tmp_path)), seen(old))


def test_a_readme_that_people_wrote_stays(tmp_path: Path) -> None:
    _, new = saved(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    new.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.999])
def test_weights_that_were_cut_off_are_named(part: float, tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ValueError, match=r"model\.safetensors must be whole; got a file that cannot be read"):
        load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b"3"])
def test_a_config_that_cannot_be_read_is_named(content: bytes, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json must be (JSON|a JSON object); got a"):
        load(tmp_path)


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load(tmp_path)


def test_pushing_saves_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from spatial_grouping_attention.models.hub import PretrainedGroupingViT

    said: dict[str, Any] = {}
    monkeypatch.setattr(PretrainedGroupingViT, "push_to_hub", lambda _, **options: said.update(options) or "address")
    network = make(**SMALL)
    assert network.save_pretrained(tmp_path / "net", push_to_hub=True, private=True) == "address"
    assert said == {"repo_id": "net", "private": True}
    assert torch.equal(seen(load(tmp_path / "net")), seen(network))
