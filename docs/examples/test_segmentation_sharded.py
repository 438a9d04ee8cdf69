"""A checkpoint that is a folder is whole or not there, and one that is damaged is named."""

import gc
import hashlib
import json
import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from segmentation import sharded
from segmentation.checkpoint import CheckpointError
from segmentation.processes import Processes
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

pytestmark = pytest.mark.training

Encoding = _MEM_FORMAT_ENCODING  # which torch names like a constant


def state(number):
    return {"network": {"weight": torch.arange(10000.0) + number}, "optimiser": {"weight": {"step": torch.tensor(3.0)}}}


def saved(folder, number):
    sharded.save(folder, state(number), {"epoch": number, "crop": (3, 4)})


def restored(folder):
    path, rest = sharded.read(folder, ("epoch",))
    tensors = state(-1)
    sharded.load(path, tensors)
    return tensors, rest


def is_whole(folder, number):
    tensors, rest = restored(folder)
    return torch.equal(tensors["network"]["weight"], state(number)["network"]["weight"]) and rest["epoch"] == number


@pytest.fixture
def folder(tmp_path):
    saved(tmp_path / "last", 1)
    return tmp_path / "last"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def part_of(folder, name):
    return folder / "00000000" / name


def sign(folder):
    """Give checksums of what is there now, as nobody does who damages a checkpoint by accident."""
    files = [path for path in (folder / "00000000").iterdir() if path.name != sharded.CHECKSUMS]
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    part_of(folder, sharded.CHECKSUMS).write_text(json.dumps(sums))


def test_what_is_written_is_read_and_takes_the_place_of_the_old_one(folder):
    assert is_whole(folder, 1)
    assert restored(folder)[1]["crop"] == (3, 4)
    saved(folder, 2)
    assert names(folder) == ["00000001"]
    assert is_whole(folder, 2)


def test_nothing_there(tmp_path):
    assert sharded.latest(tmp_path / "last") is None
    with pytest.raises(CheckpointError, match="last must be a folder with a checkpoint; there is none"):
        sharded.read(tmp_path / "last", ())
    with pytest.raises(CheckpointError, match="No such file or directory; there is no checkpoint yet"):
        saved(tmp_path / "nowhere" / "last", 1)


def test_what_killed_programs_left_does_not_count_and_is_removed(folder):
    (folder / ".00000001.tmp").mkdir()
    (folder / ".00000001.tmp" / "__0_0.distcp").write_bytes(b"half of it")
    assert is_whole(folder, 1)
    saved(folder, 2)
    # Killed before the old one was removed.
    (folder / "00000000").mkdir()
    assert is_whole(folder, 2)
    saved(folder, 3)
    assert names(folder) == ["00000002"]
    assert is_whole(folder, 3)


@pytest.mark.filterwarnings("ignore:.*NoCloseWriter:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.skipif(sys.platform == "win32", reason="Windows limits no sizes of files")
@pytest.mark.parametrize("limit", [20, 4000, 42000])
def test_full_disk_leaves_the_old_one(folder, limit):
    """At the first file, among metadata of tensors, and at the last."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    more = {"filler": torch.zeros(20000)} if limit > 40000 else {}
    try:
        with pytest.raises(CheckpointError, match="File too large; the checkpoint that was there is unchanged"):
            sharded.save(folder, state(2), more)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    gc.collect()  # torch leaves open what it could not write; Python 3.13 tells of it, here and in no other test
    assert names(folder) == ["00000000"]
    assert is_whole(folder, 1)


def test_old_one_that_cannot_be_removed_is_no_error_and_does_not_count(folder, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", refused)
        saved(folder, 2)
    assert names(folder) == ["00000000", "00000001"]
    assert is_whole(folder, 2)
    saved(folder, 3)
    assert names(folder) == ["00000002"]


class Apart(Processes):
    """The first of two, of which the other writes into a folder of the same name on a machine of its own."""

    def gather(self, value):
        return [value, {"__1_0.distcp": "its checksum"}] if isinstance(value, dict) else [value, None]


def test_folder_that_not_all_processes_see(folder):
    wanted = "last: --out must be one folder that all processes see; of their files, missing: __1_0.distcp; the check"
    with pytest.raises(CheckpointError, match=wanted):
        sharded.save(folder, state(2), {}, Apart())
    assert names(folder) == ["00000000"]
    assert is_whole(folder, 1)


@pytest.mark.parametrize("name", ["__0_0.distcp", sharded.METADATA, sharded.REST])
def test_damage_is_named(folder, name):
    path = part_of(folder, name)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:100] + bytes([whole[100] ^ 1]) + whole[101:], b""):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"must be a whole checkpoint; of its files, damaged: {name}"):
            sharded.read(folder, ())
    path.unlink()
    with pytest.raises(CheckpointError, match=f"damaged: {name}"):
        sharded.read(folder, ())


@pytest.mark.parametrize("content", [None, "", "[1]", "{"])
def test_damaged_checksums(folder, content):
    path = part_of(folder, sharded.CHECKSUMS)
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointError, match=r"must be a whole checkpoint; checksums.json cannot be read"):
        sharded.read(folder, ())


def test_missing_entries_are_named(folder):
    with pytest.raises(CheckpointError, match=r"must contain \['epoch', 'settings'\]; \['settings'\] are missing"):
        sharded.read(folder, ("epoch", "settings"))


@pytest.mark.parametrize("tensors", [{"network": {"bias": torch.zeros(3)}}, {"network": {"weight": torch.zeros(3)}}])
def test_tensors_of_another_network(folder, tensors):
    with pytest.raises(CheckpointError, match=r"must hold the weights .* another version(.|\n)*(Missing key|mismatch)"):
        sharded.load(sharded.read(folder, ())[0], tensors)


def test_code_is_not_run(folder):
    part_of(folder, sharded.METADATA).write_bytes(pickle.dumps(subprocess.Popen))
    sign(folder)
    with pytest.raises(CheckpointError, match=r"must hold tensors and nothing else; subprocess.Popen is no part"):
        restored(folder)


@pytest.mark.parametrize("early", [True, False])
def test_members_of_enumerations_are_read_however_they_were_pickled(folder, monkeypatch, early):
    """By ``getattr`` in early releases of Python 3.11, by their value in all others."""
    by_name, by_value = (lambda it, _: (getattr, (Encoding, it.name))), (lambda it, _: (Encoding, (it.value,)))
    monkeypatch.setattr(Encoding, "__reduce_ex__", by_name if early else by_value)
    saved(folder, 2)
    assert (b"getattr" in (folder / "00000001" / sharded.METADATA).read_bytes()) == early
    assert is_whole(folder, 2)


@pytest.mark.parametrize(("kind", "name"), [(torch.Size, "numel"), (Path, "cwd"), (Encoding, "__class__")])
def test_getattr_gives_nothing_but_members(folder, kind, name):
    class Attribute:
        def __reduce__(self):
            return getattr, (kind, name)

    part_of(folder, sharded.METADATA).write_bytes(pickle.dumps(Attribute()))
    sign(folder)
    with pytest.raises(CheckpointError, match=r"must hold tensors and nothing else; .* is no part of a checkpoint"):
        restored(folder)


def test_pickled_objects_in_place_of_tensors_are_refused(folder):
    tensors = state(1)
    tensors["network"]["weight"] = "no tensor"
    sharded.save(folder, tensors, {"epoch": 2})
    with pytest.raises(CheckpointError, match=r"must hold tensors and nothing else; .*BytesStorageMetadata is no part"):
        restored(folder)


def test_paths_are_plain_files(folder):
    assert names(folder / "00000000") == sorted([sharded.METADATA, "__0_0.distcp", sharded.CHECKSUMS, sharded.REST])
    assert isinstance(sharded.latest(folder), Path)
