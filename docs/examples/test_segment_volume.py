"""The program from an image on the disk to labels on the disk, and what may go wrong in between."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import segment_volume
import torch
import zarr
from distributed import Client, LocalCluster
from segment_volume import main
from segmentation import checkpoint, cluster
from segmentation.blocks import Blocks, tile_shape
from segmentation.ledger import Ledger, LedgerError
from segmentation.ome import Place, create_group
from segmentation.prediction import Predictor, blend
from segmentation.settings import Settings, build_network
from segmentation.volumes import open_volume

pytestmark = pytest.mark.training

# Runs in a process of its own, which kills itself when two blocks are finished.
KILLED = """
import os, signal, sys
sys.path.insert(0, {examples!r})
import segment_volume
segment_volume.BLOCK = 24 * 24
result_of, seen = segment_volume.result_of, []

def kill_after_two(future, what):
    result = result_of(future, what)
    if what.startswith("block"):
        seen.append(what)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    return result

segment_volume.result_of = kill_after_two
segment_volume.main({arguments!r})
"""

SETTINGS = Settings(
    task="semantic", preset="nano", spatial_dims=2, in_channels=1, num_classes=3, num_candidates=100,
    spacing=(0.5, 0.5), crop=(16, 16), learning_rate=1e-3, batch=2,
)  # fmt: skip
SIZE = (100, 75)  # tiles of 32 x 32, 5 x 4 blocks of one


def trained(path, weights=0, **changed):
    """A checkpoint of a network that has learned nothing."""
    torch.manual_seed(weights)
    settings = Settings(**{**SETTINGS.as_data(), **changed})
    checkpoint.write(path, {"settings": settings.as_data(), "weights": build_network(settings).state_dict()})
    return path


@pytest.fixture(scope="module")
def scheduler():
    """The address of one worker that all tests share."""
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0", silence_logs=50) as local:
        yield local.scheduler_address


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(segment_volume, "BLOCK", 24 * 24)


class Files:
    """An image, a checkpoint, and where labels go."""

    def __init__(self, folder: Path, scheduler: str) -> None:
        rng = np.random.default_rng(0)
        self.image = folder / "image.ome.zarr"
        self.pixels = rng.normal(100, 10, SIZE).astype(np.float32)
        places = [Place("y", "nanometer", 500.0, 20.0), Place("x", "nanometer", 500.0)]
        create_group(self.image, places).create_array("0", data=self.pixels, chunks=(40, 40))
        self.checkpoint = trained(folder / "best.pt")
        self.out = folder / "labels.ome.zarr"
        self.ledger = Ledger(self.out)
        self.arguments = [
            "--checkpoint", str(self.checkpoint), "--image", str(self.image), "--out", str(self.out),
            "--device", "cpu", "--scheduler", scheduler,
        ]  # fmt: skip

    @property
    def labels(self) -> np.ndarray:
        return zarr.open_array(self.out / "0", mode="r")[...]

    def expected(self, blocks: Blocks) -> np.ndarray:
        """Found here, without dask and files."""
        network = build_network(SETTINGS)
        network.load_state_dict(checkpoint.read(self.checkpoint, ())["weights"])
        predictor = Predictor(network, "semantic", "float32", 1)
        pixels = segment_volume.Intensities.of(self.pixels[None]).apply(self.pixels[None])
        labels = np.zeros(SIZE, np.uint8)
        for block in (blocks[i] for i in range(len(blocks))):
            labels[block.owned] = blend(lambda w: predictor.logits(pixels[(slice(None), *w)], (0.5, 0.5)), block)
        return labels


@pytest.fixture
def files(tmp_path, scheduler):
    return Files(tmp_path, scheduler)


@pytest.fixture(autouse=True)
def one_thread():
    """As workers have: sums of several threads may differ in the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


TILE = tile_shape(SIZE, (0.5, 0.5), 4 * 16 * 16)
BLOCKS = Blocks(SIZE, TILE, (1, 1))


def chunk_of(image: Path) -> Path:
    """A file with a part of the image."""
    return sorted(path for path in (image / "0").rglob("*") if path.is_file() and path.name != "zarr.json")[0]


def test_labels_are_those_of_every_block_with_spacing_and_unit(files, small_blocks, capsys):
    result = main(files.arguments)
    assert result.blocks == len(BLOCKS)
    assert len(BLOCKS) >= 12
    assert result.voxels == np.prod(SIZE)
    assert np.array_equal(files.labels, files.expected(BLOCKS))
    assert len(np.unique(files.labels)) > 1
    written = open_volume(files.out, 2)
    assert written.places == open_volume(files.image, 2).places
    assert not files.ledger.folder.exists()
    assert f"{len(BLOCKS)} of {len(BLOCKS)} blocks in" in capsys.readouterr().out


def test_one_block_is_what_predict_segmentation_gives(files):
    main(files.arguments)
    network = build_network(SETTINGS)
    network.load_state_dict(checkpoint.read(files.checkpoint, ())["weights"])
    predicted = Predictor(network, "semantic", "float32", 4 * 16 * 16)(files.pixels[None], (0.5, 0.5))
    assert np.array_equal(files.labels, predicted.labels)


def test_complete_output_is_not_touched(files):
    main(files.arguments)
    before = {path: path.read_bytes() for path in files.out.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match=r"labels.ome.zarr is there already and complete"):
        main(files.arguments)
    assert {path: path.read_bytes() for path in files.out.rglob("*") if path.is_file()} == before
    assert not files.ledger.folder.exists()


def test_a_network_that_becomes_better_meanwhile(files, small_blocks, monkeypatch):
    """Training goes on and writes its checkpoint; workers that come to it later must not see the new one."""
    expected = files.expected(BLOCKS)
    count = segment_volume.count

    def count_while_somebody_trains(*arguments):
        trained(files.checkpoint, weights=1)
        return count(*arguments)

    monkeypatch.setattr(segment_volume, "count", count_while_somebody_trains)
    main(files.arguments)
    assert np.array_equal(files.labels, expected)


def test_work_for_an_output_that_is_no_longer_there(files, monkeypatch):
    jobs = []
    monkeypatch.setattr(segment_volume, "label", lambda client, job, *_: jobs.append(job) or sys.exit("stopped"))
    for _ in range(2):
        with pytest.raises(SystemExit, match="stopped"):
            main(files.arguments)
        files.ledger.folder.rename(files.ledger.folder.with_name(f"begun {len(jobs)}"))
    files.ledger.folder.with_name("begun 2").rename(files.ledger.folder)
    seen = segment_volume.Intensities.of(files.pixels[None])
    with pytest.raises(LedgerError, match="must be the output that was begun"):
        segment_volume.label_block(jobs[0], seen, 0)
    assert not files.ledger.finished()
    segment_volume.label_block(jobs[1]._replace(checkpoint=files.checkpoint), seen, 0)
    assert files.ledger.finished() == {0}


def test_killed_when_all_was_done(files):
    main(files.arguments)
    files.ledger.folder.mkdir()
    with pytest.raises(SystemExit, match=r"labels.ome.zarr is there already and complete"):
        main(files.arguments)
    assert not files.ledger.folder.exists()


def test_two_programs_do_not_make_one_output(files):
    ledger = Ledger(files.out)
    with ledger.held(), pytest.raises(SystemExit, match=r"labels.ome.zarr is being made by another program now"):
        main(files.arguments)
    assert not files.out.exists()


def test_worker_that_has_seen_another_network_of_that_name(files):
    main(files.arguments)
    before = files.labels
    trained(files.checkpoint, weights=1)
    files.out.rename(files.out.with_name("before.zarr"))
    main(files.arguments)
    assert np.array_equal(files.labels, files.expected(Blocks.single(SIZE, TILE)))
    assert not np.array_equal(files.labels, before)


def kill_the_program(files):
    program = KILLED.format(examples=str(Path(__file__).parent), arguments=files.arguments)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not files.out.exists()
    return len(files.ledger.finished())


def test_killed_program_goes_on_without_repeating_blocks_past_a_damaged_chunk(files, small_blocks, scheduler):
    finished = kill_the_program(files)
    assert 2 <= finished < len(BLOCKS)
    with Client(scheduler) as client:  # work that was on its way may still be finished
        client.run(lambda: None)
    finished = len(files.ledger.finished())

    chunk = chunk_of(files.image)
    whole = chunk.read_bytes()
    chunk.write_bytes(b"not zstd")
    with pytest.raises(SystemExit) as stopped:
        main(files.arguments)
    assert "block " in stopped.value.code
    assert str(files.image) in stopped.value.code
    assert f"found 0/{chunk.relative_to(files.image / '0')}" in stopped.value.code
    assert "blocks are finished; the same command goes on" in stopped.value.code
    damaged = len(BLOCKS) - len(files.ledger.finished())
    assert 0 < damaged == stopped.value.code.count("block ") < len(BLOCKS) - finished

    chunk.write_bytes(whole)
    result = main(files.arguments)
    assert result.blocks == damaged
    assert np.array_equal(files.labels, files.expected(BLOCKS))


def test_chunk_that_is_damaged_from_the_beginning_is_named_before_anything_is_labelled(files):
    chunk = chunk_of(files.image)
    chunk.write_bytes(b"")
    with pytest.raises(SystemExit, match=f"found 0/{chunk.relative_to(files.image / '0')}"):
        main(files.arguments)
    assert not files.ledger.finished()


def test_killed_worker_is_replaced(files, small_blocks, scheduler, monkeypatch):
    results, killed = segment_volume.result_of, []
    with Client(scheduler) as client:

        def kill_the_worker(future, what):
            if what.startswith("block") and not killed:
                killed.extend(client.run(os.getpid).values())
                os.kill(killed[0], signal.SIGKILL)
            return results(future, what)

        monkeypatch.setattr(segment_volume, "result_of", kill_the_worker)
        main(files.arguments)
        assert client.run(os.getpid) != killed
    assert np.array_equal(files.labels, files.expected(BLOCKS))


def test_disk_that_the_system_refuses_to_fill(files, small_blocks, scheduler):
    with Client(scheduler) as client:
        client.run(resource.setrlimit, resource.RLIMIT_FSIZE, (40, resource.RLIM_INFINITY))
        try:
            with pytest.raises(SystemExit, match="File too large"):
                main(files.arguments)
        finally:
            client.run(resource.setrlimit, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert not list(files.ledger.folder.rglob("*.partial"))
    assert not files.ledger.finished()
    assert main(files.arguments).blocks >= len(BLOCKS) - cluster.AHEAD  # what was on its way may have found room
    assert np.array_equal(files.labels, files.expected(BLOCKS))


def test_full_disk_is_explained():
    problem = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert segment_volume.explained(problem) == "No space left on device: make room and start again"


@pytest.mark.parametrize("what", ["checkpoint", "image", "spacing"])
def test_what_was_begun_otherwise_is_not_gone_on_with(files, monkeypatch, what):
    monkeypatch.setattr(segment_volume, "label", lambda *_: sys.exit("before the first block"))
    with pytest.raises(SystemExit, match="before the first block"):
        main(files.arguments)
    monkeypatch.undo()
    extra = ["--spacing", "0.7", "0.5"] if what == "spacing" else []
    if what == "checkpoint":
        trained(files.checkpoint, weights=1)
    if what == "image":
        zarr.open_array(files.image / "0", mode="r+")[:] += 1
    with pytest.raises(SystemExit, match=rf"was begun otherwise and cannot be gone on with: .*{what}"):
        main([*files.arguments, *extra])


def test_first_pass_is_not_repeated(files, monkeypatch):
    monkeypatch.setattr(segment_volume, "label", lambda *_: sys.exit("before the first block"))
    with pytest.raises(SystemExit, match="before the first block"):
        main(files.arguments)
    monkeypatch.undo()
    monkeypatch.setattr(segment_volume, "count", lambda *_: pytest.fail("counted again"))
    main(files.arguments)


def test_too_little_memory_is_refused_with_a_number(files):
    with pytest.raises(SystemExit, match=r"--memory must be at least \d+.* MiB per worker, .*; got 97.66 kiB"):
        main([*files.arguments, "--memory", "100kB"])
    assert main(files.arguments).blocks == 1  # and blocks are not small for having been refused


def test_nobody_answers(files, monkeypatch):
    monkeypatch.setattr(cluster, "PATIENCE", 0.3)
    with pytest.raises(SystemExit, match=r"--scheduler must be the address of a running dask scheduler; .*127.0.0.1:9"):
        main([*files.arguments, "--scheduler", "tcp://127.0.0.1:9"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"task": "instances", "num_classes": 2}, "best.pt must be semantic; got instances"),
        ({"in_channels": 2}, "expected 2 channels, as in training; found 1"),
        ({"spatial_dims": 3, "spacing": (1.0,) * 3, "crop": (16,) * 3}, "expected 3 axes of space; found y 100, x 75"),
    ],
)
def test_checkpoints_for_other_images(files, changed, message):
    settings = Settings(**{**SETTINGS.as_data(), **changed})
    checkpoint.write(files.checkpoint, {"settings": settings.as_data(), "weights": {}})
    with pytest.raises(SystemExit, match=message):
        main(files.arguments)


def test_options_that_make_no_sense(files, capsys):
    for extra, message in (
        (["--workers", "-1"], "must be positive"),
        (["--out", "labels.tif"], "must end in .ome.zarr"),
    ):
        with pytest.raises(SystemExit):
            main([*files.arguments, *extra])
        assert message in capsys.readouterr().err


def test_numbers_that_are_none_stop_the_first_pass(files):
    zarr.open_array(files.image / "0", mode="r+")[3, 4] = np.nan
    with pytest.raises(SystemExit, match="expected finite numbers; found 1 that are not"):
        main(files.arguments)


def test_another_compressed_volume_of_that_name(tmp_path, scheduler, monkeypatch):
    """What was unpacked of the first one is still there."""
    trained(tmp_path / "best.pt", spatial_dims=3, spacing=(1.0, 1.0, 1.0), crop=(16, 16, 16))
    arguments = [
        "--checkpoint", str(tmp_path / "best.pt"), "--image", str(tmp_path / "image.nii.gz"), "--device", "cpu",
        "--out", str(tmp_path / "labels.zarr"), "--scheduler", scheduler,
    ]  # fmt: skip
    monkeypatch.setattr(segment_volume, "label", lambda *_: sys.exit("stopped"))
    for seed, message in ((0, "stopped"), (0, "stopped"), (1, "was begun otherwise .* contents of the image was")):
        volume = np.random.default_rng(seed).normal(100, 10, (20, 20, 20)).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "image.nii.gz")
        with pytest.raises(SystemExit, match=message):
            main(arguments)


def test_compressed_volume_with_processes_of_its_own(tmp_path):
    trained(tmp_path / "best.pt", spatial_dims=3, spacing=(2.0, 0.5, 0.5), crop=(4, 16, 16))
    volume = np.random.default_rng(0).normal(100, 10, (20, 40, 25)).astype(np.int16)
    affine = np.array([[2.0, 0, 0, -7], [0, 0.5, 0, 3], [0, 0, 0.5, 0], [0, 0, 0, 1]])
    image = nibabel.Nifti1Image(volume, affine)
    image.header.set_xyzt_units("mm")
    nibabel.save(image, tmp_path / "image.nii.gz")
    main([
        "--checkpoint", str(tmp_path / "best.pt"), "--image", str(tmp_path / "image.nii.gz"), "--device", "cpu",
        "--out", str(tmp_path / "labels.zarr"), "--workers", "1",
    ])  # fmt: skip
    attributes = json.loads((tmp_path / "labels.zarr" / "zarr.json").read_text())["attributes"]["ome"]
    (multiscale,) = attributes["multiscales"]
    assert [axis["name"] for axis in multiscale["axes"]] == ["x", "y", "z"]
    assert {axis["unit"] for axis in multiscale["axes"]} == {"millimeter"}
    scale, translation = multiscale["datasets"][0]["coordinateTransformations"]
    assert scale["scale"] == [2.0, 0.5, 0.5]
    assert translation["translation"] == [-7.0, 3.0, 0.0]
    assert zarr.open_array(tmp_path / "labels.zarr" / "0").shape == volume.shape
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "image.nii.gz", "labels.zarr"]
