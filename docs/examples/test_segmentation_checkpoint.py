"""A checkpoint is whole or not there, and one that is not is named."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from segmentation import checkpoint
from segmentation.checkpoint import CheckpointError, fill, read, replacing, write
from torch import nn

pytestmark = pytest.mark.training

# Runs in a process of its own, whose files the system does not let grow beyond 20000 bytes.
FILLS_THE_DISK = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {examples!r})
import torch
from segmentation.checkpoint import CheckpointError, write
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    write(Path({path!r}), {{"weights": torch.zeros(100000)}})
except CheckpointError as problem:
    print(problem)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A checkpoint with the weights 0 .. 9999."""
    path = tmp_path / "last.pt"
    write(path, {"weights": torch.arange(10000.0), "epoch": 3})
    return path


def test_what_is_written_is_read(path):
    contents = read(path, ("weights", "epoch"))
    assert torch.equal(contents["weights"], torch.arange(10000.0))
    assert contents["epoch"] == 3


def test_full_disk_leaves_the_old_one(path, monkeypatch):
    before = path.read_bytes()

    def fill(contents, file):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", fill)
    with pytest.raises(CheckpointError, match=r"last.pt: .*No space left on device; the checkpoint .* is unchanged"):
        write(path, {})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows limits no sizes of files")
def test_disk_that_the_system_refuses_to_fill(path):
    before = path.read_bytes()
    program = FILLS_THE_DISK.format(examples=str(Path(__file__).parent), path=str(path))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "File too large; the checkpoint that was there is unchanged" in done.stdout
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_there_may_be_nothing_to_keep(tmp_path):
    with pytest.raises(CheckpointError, match="No such file or directory; there is no checkpoint yet"):
        write(tmp_path / "nowhere" / "last.pt", {})


def test_leftovers_of_a_killed_program_are_removed(path):
    leftover = path.with_name(".last.pt.1234.tmp")
    leftover.write_bytes(b"half of it")
    write(path, {})
    assert list(path.parent.iterdir()) == [path]


def test_interruption_leaves_the_old_contents(tmp_path):
    path = tmp_path / "history.csv"
    path.write_bytes(b"old")

    def interrupted():
        with replacing(path) as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_missing(tmp_path):
    with pytest.raises(CheckpointError, match=r"last.pt must be a checkpoint; there is no such file"):
        read(tmp_path / "last.pt", ())


@pytest.mark.parametrize("part", [0.0, 0.3, 0.99])
def test_cut_off(path, part):
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(CheckpointError, match=r"last.pt must be a checkpoint written by .* got a file of \d+ bytes"):
        read(path, ())


def test_one_wrong_bit_among_the_weights(path):
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(torch.arange(5000.0, 5010.0).numpy().tobytes())] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"must be a whole checkpoint; its part .*data/0 is damaged"):
        read(path, ())


def test_another_kind_of_file(tmp_path):
    path = tmp_path / "best.pt"
    path.write_text("a letter")
    with pytest.raises(CheckpointError, match="got a file of 8 bytes that cannot be read as one"):
        read(path, ())
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=r"must have the format .*; got None"):
        read(path, ())


def test_code_is_not_run(tmp_path):
    path = tmp_path / "best.pt"
    torch.save({"format": checkpoint.FORMAT, "weights": subprocess.Popen}, path)
    with pytest.raises(CheckpointError, match="cannot be read as one"):
        read(path, ())


def test_missing_entries_are_named(path):
    with pytest.raises(CheckpointError, match=r"must contain \['epoch', 'settings', 'weights'\]; \['settings'\] are"):
        read(path, ("weights", "epoch", "settings"))


def test_weights_of_another_network(path):
    network = nn.Linear(3, 2)
    with pytest.raises(CheckpointError, match=r"last.pt must hold the weights .* another version(.|\n)*bias"):
        fill(network, {"weight": torch.zeros(2, 3)}, path)
    fill(network, {"weight": torch.zeros(2, 3), "bias": torch.ones(2)}, path)
    assert torch.equal(network.bias, torch.ones(2))
