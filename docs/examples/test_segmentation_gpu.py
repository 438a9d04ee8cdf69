"""The training programs on a GPU, beside the same on a processor."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from predict_segmentation import main as predict
from segment_volume import main as segment_volume
from segmentation.checkpoint import read
from segmentation.records import Records
from test_segment_volume import Files
from test_segmentation_training import QUICK, write_set
from train_segmentation import main as train

pytestmark = [pytest.mark.training, pytest.mark.gpu]

ON_GPU = [{"cpu": "cuda"}.get(option, option) for option in QUICK]


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    """Left to itself cuDNN convolves float32 with the 10 bits of TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def history_of(folder):
    """Numbers of all epochs."""
    rows = json.loads((folder / "history.json").read_text())
    return [value for row in rows for name, value in row.items() if isinstance(value, float) and "seconds" not in name]


def share_alike(ones, others):
    """Of pixels."""
    return np.mean([np.mean(one == other) for one, other in zip(ones, others, strict=True)])


@pytest.mark.parametrize("task", ["semantic", "instances"])
def test_a_training_is_that_of_a_processor(task, tmp_path):
    options = [*write_set(tmp_path / "set", (24, 26), ".png", instances=task == "instances"), "--task", task]
    for name, quick in (("there", ON_GPU), ("here", QUICK)):
        train([*options, *quick, "--amp", "float32", "--out", str(tmp_path / name)])
    losses = [json.loads((tmp_path / name / "history.json").read_text()) for name in ("there", "here")]
    for row, expected in zip(*losses, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-2)
    assert read(tmp_path / "there" / "best.pt", ())["weights"]["stem.proj.weight"].device.type == "cpu"


@pytest.mark.parametrize("precision", [[], ["--amp", "bf16"], ["--amp", "fp16"]])
def test_half_types_and_processes_that_cut_crops(precision, tmp_path):
    """As it runs where nothing is said, too: several processes and the GPU's own precision."""
    options = write_set(tmp_path / "set", (24, 26), ".png")
    train([*options, *ON_GPU, *precision, "--workers", "2", "--out", str(tmp_path / "out")])
    assert np.isfinite(history_of(tmp_path / "out")).all()
    weights = read(tmp_path / "out" / "best.pt", ())["weights"]
    assert all(weight.isfinite().all() for weight in weights.values())
    assert weights["stem.proj.weight"].dtype == torch.float32


def test_stopped_and_gone_on_with(tmp_path, monkeypatch):
    """Random numbers of the GPU are gone on with as well; sums there may have another order."""
    options = [*write_set(tmp_path / "set", (24, 26), ".png"), *ON_GPU, "--amp", "float32"]
    train([*options, "--out", str(tmp_path / "undisturbed")])

    def press(self, steps_done, *_):
        if steps_done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(Records, "step", press)
        with pytest.raises(SystemExit):
            train([*options, "--out", str(tmp_path / "stopped")])
    train([*options, "--out", str(tmp_path / "stopped"), "--resume"])
    assert history_of(tmp_path / "stopped") == pytest.approx(history_of(tmp_path / "undisturbed"), rel=1e-3, abs=1e-4)


def test_predictions_are_those_of_a_processor(tmp_path):
    options = write_set(tmp_path / "set", (24, 26), ".png")
    train([*options, *ON_GPU, "--amp", "float32", "--out", str(tmp_path / "training")])
    told = ["--checkpoint", str(tmp_path / "training" / "best.pt"), "--images", options[1]]
    for largest in ("1000000", "300"):
        maps = {}
        for device in ("cuda", "cpu"):
            out = str(tmp_path / f"{device}{largest}")
            written = predict([*told, "--out", out, "--device", device, "--largest", largest])
            maps[device] = [np.asarray(Image.open(path)) for path in written]
        assert share_alike(maps["cuda"], maps["cpu"]) > 0.99


def test_volumes_are_those_of_a_processor(tmp_path):
    """By a worker of the program's own, which is a process with its own context."""
    files = Files(tmp_path, "")
    arguments = files.arguments[: files.arguments.index("--device")]
    maps = {}
    for device in ("cuda", "cpu"):
        files.out = tmp_path / f"{device}.ome.zarr"
        arguments[arguments.index("--out") + 1] = str(files.out)
        segment_volume([*arguments, "--device", device, "--workers", "1"])
        maps[device] = files.labels
    assert len(np.unique(maps["cpu"])) > 1
    assert share_alike([maps["cuda"]], [maps["cpu"]]) > 0.99
