"""The programs from files to files: trained, killed, gone on with, and used."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from predict_segmentation import main as predict
from segmentation import loop, sharded
from segmentation.checkpoint import read
from segmentation.records import Records
from segmentation.settings import Settings, build_network
from train_segmentation import main as train

pytestmark = pytest.mark.training

QUICK = ["--epochs", "2", "--steps", "2", "--batch", "2", "--device", "cpu", "--validation", "0.34"]

# Runs in a process of its own, which kills itself with half of the second epoch's checkpoint on the disk.
KILLED = """
import os, signal, sys
sys.path.insert(0, {examples!r})
import torch
import train_segmentation
from segmentation import sharded
torch.set_num_threads(1)
complete, written = sharded._complete, []

def kill_in_the_second(folder, temporary, *rest):
    written.append(temporary)
    if len(written) == 2:
        (temporary / "rest.pt").write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)
    complete(folder, temporary, *rest)

sharded._complete = kill_in_the_second
train_segmentation.main({arguments!r})
"""


# Likewise; Ctrl-C reaches all processes of a terminal's group, workers among them.
STOPPED = """
import os, signal, sys
sys.path.insert(0, {examples!r})
import torch
import train_segmentation
from segmentation.records import Records
torch.set_num_threads(1)
Records.step = lambda self, step, *_: os.killpg(0, signal.SIGINT) if step == 1 else None
if __name__ == "__main__":
    train_segmentation.main({arguments!r})
"""


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Sums of several threads may differ in the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def blobs(size, seed):
    """An image of noise with two bright boxes, and the boxes as instances."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(size, np.uint8)
    for number, start in enumerate((2, 13), 1):
        labels[tuple(slice(start + int(rng.integers(3)), start + 9) for _ in size)] = number
    return (60.0 * (labels > 0) + rng.normal(100, 10, size)).astype(np.uint8), labels


def write_set(folder, size, suffix, instances=False):
    """Three pairs in two folders."""
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for i in range(3):
        image, labels = blobs(size, i)
        for kind, array in (("images", image), ("labels", labels if instances else (labels > 0).astype(np.uint8))):
            path = folder / kind / f"cell{i}{suffix}"
            if suffix == ".png":
                Image.fromarray(array).save(path)
            else:
                nibabel.save(nibabel.Nifti1Image(array, np.diag([2.0, 0.5, 0.5, 1.0])), path)
    return ["--images", str(folder / "images"), "--labels", str(folder / "labels")]


@pytest.fixture(scope="session")
def plane(tmp_path_factory):
    """Options that name three images of 24 x 26 pixels, and a training of them that nobody disturbed."""
    folder = tmp_path_factory.mktemp("plane")
    options = [*write_set(folder / "set", (24, 26), ".png"), *QUICK]
    train([*options, "--out", str(folder / "undisturbed")])
    return options, folder / "undisturbed"


def kept(folder):
    """Tensors of a checkpoint by name, and the rest of it."""
    path, rest = sharded.read(folder / "last", ())
    settings = Settings.from_data(rest["settings"])
    training = loop.Training(build_network(settings), None, settings, torch.device("cpu"))
    tensors = training.tensors()
    sharded.load(path, tensors)
    return tensors, rest["training"]


def assert_same_training(one, other):
    assert (one / "history.json").read_text() == (other / "history.json").read_text()
    first, second = (torch.utils._pytree.tree_leaves(kept(folder)) for folder in (one, other))
    assert len(first) == len(second)
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(first, second, strict=True))


def test_what_training_leaves(plane):
    _, out = plane
    history = json.loads((out / "history.json").read_text())
    assert [row["epoch"] for row in history] == [1, 2]
    for row in history:
        assert row["loss"] == pytest.approx(row["cross-entropy"] + row["dice"])
        assert 0 <= row["mean IoU"] <= 1
        assert 0 <= row["unused groups, stage 1"] < 1
    assert len((out / "history.csv").read_text().splitlines()) == 3
    assert sorted(path.name for path in (out / "pictures").iterdir()) == ["epoch_0001.png", "epoch_0002.png"]
    assert np.asarray(Image.open(out / "pictures" / "epoch_0001.png")).std() > 10
    assert list((out / "tensorboard").iterdir())
    best = read(out / "best.pt", ("settings", "weights", "epoch"))
    assert best["epoch"] in (1, 2)
    build_network(Settings.from_data(best["settings"])).load_state_dict(best["weights"])


def test_killed_while_writing_and_gone_on_with(plane, tmp_path):
    options, undisturbed = plane
    arguments = [*options, "--out", str(tmp_path / "killed")]
    program = KILLED.format(examples=str(Path(__file__).parent), arguments=arguments)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    out = tmp_path / "killed"
    assert sorted(path.name for path in (out / "last").iterdir()) == [".00000001.tmp", "00000000"]
    assert kept(out)[1]["progress"]["epoch"] == 1
    train([*arguments, "--resume"])
    assert_same_training(undisturbed, out)
    assert [path.name for path in (out / "last").iterdir()] == ["00000001"]


@pytest.mark.parametrize("step", [1, 3])
def test_stopped_by_the_keyboard_in_the_middle_of_an_epoch(plane, tmp_path, monkeypatch, capsys, step):
    options, undisturbed = plane
    arguments = [*options, "--out", str(tmp_path / "stopped")]

    def press(self, steps_done, *_):
        if steps_done == step:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(Records, "step", press)
        with pytest.raises(SystemExit) as stopped:
            train(arguments)
    assert stopped.value.code == 130
    assert f"stopped after step {step}; --resume goes on" in capsys.readouterr().err
    train([*arguments, "--resume"])
    assert f"resumed    after step {step} of 4" in capsys.readouterr().out
    assert_same_training(undisturbed, tmp_path / "stopped")


@pytest.mark.slow
def test_stopped_by_the_keyboard_with_workers(plane, tmp_path):
    options, undisturbed = plane
    arguments = [*options, "--out", str(tmp_path), "--workers", "1"]
    program = STOPPED.format(examples=str(Path(__file__).parent), arguments=arguments)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)
    assert done.returncode == 130, done.stderr
    assert "stopped after step 1" in done.stderr
    train([*arguments, "--resume"])
    assert_same_training(undisturbed, tmp_path)


def test_complete_training_is_not_trained_further(plane):
    options, out = plane
    before = {path: path.read_bytes() for path in (out / "last").rglob("*.*")}
    assert before
    train([*options, "--out", str(out), "--resume"])
    assert {path: path.read_bytes() for path in (out / "last").rglob("*.*")} == before


def test_workers_change_nothing(plane, tmp_path):
    options, undisturbed = plane
    train([*options, "--out", str(tmp_path), "--workers", "1"])
    assert_same_training(undisturbed, tmp_path)


def test_half_precision_on_a_processor(plane, tmp_path):
    options, _ = plane
    train([*options, "--out", str(tmp_path), "--amp", "bf16"])
    assert read(tmp_path / "best.pt", ())["weights"]["stem.proj.weight"].dtype == torch.float32
    losses = [json.loads((out / "history.json").read_text())[-1]["loss"] for out in (tmp_path, plane[1])]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "is there already: --resume goes on with it"),
        (["--resume", "--seed", "3"], "seed is 0 in the checkpoint; got 3"),
        (
            ["--resume", "--task", "instances", "--epochs", "9"],
            "task is semantic in the checkpoint; got instances; epoc",
        ),
    ],
)
def test_what_disagrees_with_the_checkpoint_is_named(plane, extra, message):
    options, out = plane
    with pytest.raises(SystemExit, match=message):
        train([*options, "--out", str(out), *extra])


def test_other_files_than_before(plane, tmp_path):
    _, out = plane
    options = write_set(tmp_path, (24, 26), ".png")
    for kind in ("images", "labels"):
        (tmp_path / kind / "cell1.png").rename(tmp_path / kind / "cell9.png")
    with pytest.raises(SystemExit, match="on the files that it was begun with; missing: cell1; new: cell9"):
        train([*options, "--out", str(out), "--resume"])


def test_nothing_to_go_on_from(plane, tmp_path):
    with pytest.raises(SystemExit, match=r"last must be a folder with a checkpoint; there is none"):
        train([*plane[0], "--out", str(tmp_path), "--resume"])


def test_damaged_checkpoint(plane, tmp_path):
    options, out = plane
    shutil.copytree(out / "last", tmp_path / "last")
    (path,) = tmp_path.glob("last/*/__0_0.distcp")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(SystemExit, match=r"must be a whole checkpoint; of its files, damaged: __0_0.distcp"):
        train([*options, "--out", str(tmp_path), "--resume"])


def test_full_disk_stops_training_and_keeps_what_there_was(plane, tmp_path, monkeypatch):
    options, undisturbed = plane
    arguments = [*options, "--out", str(tmp_path)]
    save = torch.save

    def fill(contents, file, *_, **__):
        if isinstance(contents, dict) and contents.get("training", {}).get("progress", {}).get("epoch") == 2:
            raise OSError(28, "No space left on device")
        save(contents, file)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", fill)
        with pytest.raises(SystemExit, match="No space left on device; the checkpoint that was there is unchanged"):
            train(arguments)
    assert [path.name for path in (tmp_path / "last").iterdir()] == ["00000000"]
    assert kept(tmp_path)[1]["progress"]["epoch"] == 1
    train([*arguments, "--resume"])
    assert_same_training(undisturbed, tmp_path)


def test_loss_that_is_no_number_names_step_and_files(plane, tmp_path, monkeypatch):
    def broken(output, *_):
        return {"total": output.logits.mean() * float("nan")}

    monkeypatch.setitem(train.__globals__["CRITERIA"], "semantic", broken)
    with pytest.raises(SystemExit, match=r"the loss is nan in step 1 \(epoch 1\); its crops are from cell\d, cell\d"):
        train([*plane[0], "--out", str(tmp_path)])


def test_gradient_that_is_no_number_leaves_the_weights_as_they_were(plane, monkeypatch):
    monkeypatch.setattr(loop.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(torch.inf))
    settings = Settings.from_data(read(plane[1] / "best.pt", ())["settings"])
    network = build_network(settings)
    training = loop.Training(network, lambda o, *_: {"total": o.logits.sum()}, settings, torch.device("cpu"))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    batch = {
        "image": torch.randn(2, 1, 16, 16), "labels": torch.zeros(2, 16, 16, dtype=torch.long),
        "valid": torch.ones(2, 16, 16, dtype=torch.bool), "spacing": torch.ones(2, 2), "sample": torch.tensor([1, 0]),
    }  # fmt: skip
    with pytest.raises(loop.DivergenceError, match="norm of the gradient is inf in step 1") as raised:
        training.take_step(batch)
    assert raised.value.samples == [0, 1]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_bad_data_is_named_before_training(plane, tmp_path):
    options = write_set(tmp_path, (24, 26), ".png")
    (tmp_path / "images" / "cell0.png").write_bytes(b"")
    (tmp_path / "labels" / "cell2.png").unlink()
    with pytest.raises(SystemExit, match="cell2"):
        train([*options, *QUICK, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--amp", "fp16"], "--amp fp16 needs a GPU"),
        (["--largest", "0"], "--largest must be at least 1; got 0"),
        (["--task", "both"], "invalid choice: 'both'"),
    ],
)
def test_options_that_make_no_sense(plane, extra, message, capsys):
    with pytest.raises(SystemExit):
        train([*plane[0], *extra])
    assert message in capsys.readouterr().err


def predicted(training, images, out, *extra):
    checkpoint = str(training / "best.pt")
    return predict(["--checkpoint", checkpoint, "--images", str(images), "--out", str(out), "--device", "cpu", *extra])


def test_prediction_of_planes(plane, tmp_path, capsys):
    options, out = plane
    for largest in ("1000000", "300"):
        written = predicted(out, options[1], tmp_path, "--largest", largest)
        assert [path.name for path in written] == ["cell0.png", "cell1.png", "cell2.png"]
        assert np.asarray(Image.open(written[0])).shape == (24, 26)
    assert "cell0.png: spacing 1 x 1, class 0" in capsys.readouterr().out


def test_images_that_cannot_be_predicted_do_not_stop_the_others(plane, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    image, _ = blobs((30, 40), 0)
    Image.fromarray(image).save(images / "good.png")
    Image.fromarray(np.stack([image] * 3, -1)).save(images / "colours.png")
    (images / "broken.png").write_bytes(b"\x89PNG and nothing else")
    with pytest.raises(SystemExit) as stopped:
        predicted(plane[1], images, tmp_path / "out")
    broken, colours = stopped.value.code.splitlines()
    assert "broken.png: expected" in broken
    assert "colours.png: expected 1 channels, as in training; found 3" in colours
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["good.png"]


def test_prediction_writes_over_no_images(plane, capsys):
    options, out = plane
    with pytest.raises(SystemExit):
        predicted(out, options[1], options[1])
    assert "--out must be another folder than --images" in capsys.readouterr().err


def test_volumes_keep_their_spacing_and_place(tmp_path):
    options = write_set(tmp_path / "set", (24, 26, 25), ".nii.gz")
    train([*options, *QUICK, "--out", str(tmp_path / "out")])
    settings = read(tmp_path / "out" / "best.pt", ())["settings"]
    assert settings["spacing"] == (2.0, 0.5, 0.5)
    (path, *_) = predicted(tmp_path / "out", options[1], tmp_path / "predicted")
    original, labels = nibabel.load(Path(options[1]) / "cell0.nii.gz"), nibabel.load(path)
    assert labels.shape == original.shape
    assert np.array_equal(labels.affine, original.affine)


def test_instances(tmp_path):
    options = write_set(tmp_path / "set", (24, 26), ".png", instances=True)
    out = tmp_path / "out"
    history = train([*options, *QUICK, "--task", "instances", "--out", str(out)])
    parts = ("cross-entropy", "dice", "matched classes", "matched masks", "matched dice")
    for row in history:
        assert row["loss"] == pytest.approx(sum(row[part] for part in parts))
        assert 0 <= row["AP@0.5"] <= 1
    (path, *_) = predicted(out, options[1], tmp_path / "predicted")
    labels = np.asarray(Image.open(path))
    assert labels.shape == (24, 26)
    assert set(np.unique(labels)) == set(range(labels.max() + 1))
