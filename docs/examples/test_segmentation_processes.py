"""Two processes train as one does, and whatever ends one of them ends both, with nothing lost."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import processes_for_tests as job
import pytest
import torch
import train_segmentation
from segmentation import sharded
from segmentation.checkpoint import CheckpointError, read
from segmentation.options import parse
from segmentation.processes import ALONE, Processes
from segmentation.settings import Settings, SettingsError, build_network
from test_segmentation_training import QUICK, assert_same_training, one_thread, write_set  # noqa: F401

pytestmark = pytest.mark.training

HERE = Path(__file__).parent
# Runs in every process in place of the program: the second one is killed in its first life, while it writes.
KILLED = """
import os, signal
import train_segmentation
from torch.distributed.checkpoint import FileSystemWriter
write = FileSystemWriter.write_data

def write_and_die(self, *arguments):
    write(self, *arguments).wait()
    os.kill(os.getpid(), signal.SIGKILL)

if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
    FileSystemWriter.write_data = write_and_die
train_segmentation.main()
"""

ROUNDINGS = 1e4  # some thousand numbers are added up in another order

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(command, **keywords):
    paths = os.pathsep.join([str(HERE), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, **keywords)


def found_by(part, folder, *more):
    """What two processes found, beside a checkpoint that one wrote, and what they said."""
    (folder / "arguments.json").write_text(json.dumps(more))
    kept_by_one = job.kept_by(ALONE, "ddp", folder / "by-one")
    done = run([*TORCHRUN, str(HERE / "processes_for_tests.py"), part, str(folder)])
    assert (folder / "found.pt").exists(), done.stderr
    return torch.load(folder / "found.pt", weights_only=True) | {"kept by one": kept_by_one}, done


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Where two processes wrote, what they found, and what they said."""
    folder = tmp_path_factory.mktemp("two")
    arguments = [*write_set(folder / "set", (24, 26), ".png"), *QUICK, "--parallel", "fsdp"]
    return folder, *found_by("programs", folder, *arguments)


@pytest.fixture(scope="module")
def stepped(tmp_path_factory):
    """Where two processes wrote, and what they found in trainings of all kinds."""
    folder = tmp_path_factory.mktemp("stepped")
    return folder, found_by("steps", folder)[0]


def leaves(state):
    return torch.utils._pytree.tree_leaves(state)


def assert_same(one, other):
    for a, b in zip(leaves(one), leaves(other), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def farthest(one, other):
    """Largest difference of two states, relative to the largest number of a tensor, or 1e-3: some are all rounding."""
    found = 0.0
    for a, b in zip(leaves(one), leaves(other), strict=True):
        a, b = (torch.as_tensor(each, dtype=torch.float64) for each in (a, b))
        found = max(found, float((a - b).abs().max() / a.abs().max().clamp(min=1e-3)))
    return found


def assert_same_steps(found, want, precision):
    assert_same(found["first"], want["first"])
    assert farthest(want["first"], want["end"]["tensors"]["network"]) > 1e-2
    if precision == "bf16":  # 8 bits
        assert farthest(want["losses"], found["losses"]) < 2**-8
        return
    assert farthest(want["losses"], found["losses"]) < ROUNDINGS * torch.finfo(torch.float64).eps
    for kind, part in want["end"]["tensors"].items():
        # Adam divides by the size of a gradient, and so makes steps of a gradient that is all rounding.
        most = ROUNDINGS * torch.finfo(torch.float64).eps if kind == "optimiser" else 1e-10
        assert farthest(part, found["end"]["tensors"][kind]) < most


def test_two_processes_take_the_steps_that_one_takes(two):
    """Of a network in parts, of which some are computed again: the others are slow."""
    assert_same_steps(two[1]["trained"], job.trained(ALONE, "ddp", *job.SHARDED), job.SHARDED[2])


@pytest.fixture(scope="module")
def alone():
    """What one process makes of every case."""
    return {case: job.trained(ALONE, "ddp", *case) for case in job.EQUALS}


@pytest.mark.slow
@pytest.mark.parametrize("way", job.WAYS)
@pytest.mark.parametrize("case", job.EQUALS, ids=lambda case: "-".join(map(str, case)))
def test_all_take_the_steps_that_one_takes(stepped, alone, way, case):
    assert_same_steps(stepped[1][way]["trained"][job.EQUALS.index(case)], alone[case], case[2])


@pytest.mark.slow
@pytest.mark.parametrize("way", job.WAYS)
def test_all_take_the_steps_that_one_takes_in_single_precision(stepped, way):
    found, want = (kept["tensors"]["optimiser"] for kept in (stepped[1][way]["kept"], stepped[1]["kept by one"]))
    assert farthest(want, found) < ROUNDINGS * torch.finfo(torch.float32).eps


@pytest.mark.slow
@pytest.mark.parametrize(("way", "by"), [("ddp", "one"), ("ddp", "fsdp"), ("fsdp", "one"), ("fsdp", "ddp")])
def test_any_processes_go_on_from_what_any_others_wrote(stepped, way, by):
    wrote = stepped[1]["kept by one"] if by == "one" else stepped[1][by]["kept"]
    assert wrote["rest"]["progress"]["step"] == 2
    assert_same(wrote, stepped[1][way][f"taken up from {by}"])


@pytest.mark.slow
@pytest.mark.parametrize("by", job.WAYS)
def test_one_process_goes_on_from_what_two_wrote(stepped, by):
    folder, found = stepped
    assert_same(found[by]["kept"], job.taken_up(ALONE, "ddp", folder / f"by-{by}"))


@pytest.mark.slow
@pytest.mark.parametrize("way", job.WAYS)
def test_scores_are_those_of_one_process(stepped, way):
    found, want = stepped[1][way]["scores"], job.scores(ALONE, "ddp")
    assert found["rounds"] == [2, 2, 1]
    assert leaves(found["scores"]) == pytest.approx(leaves(want["scores"]), nan_ok=True)


def test_weights_of_another_network(two):
    training = job.made(ALONE, "ddp", "instances", "float32", "float32", False)
    path, _ = sharded.read(two[0] / "by-one", ())
    with pytest.raises(CheckpointError, match=r"must hold the weights .* another version(.|\n)*Size mismatch"):
        sharded.load(path, training.tensors())


def test_random_numbers_differ_between_processes_and_not_between_trainings(two):
    (first, again), (second, second_again) = two[1]["random"]
    assert first == again == job.random_numbers(ALONE)[0]
    assert second == second_again != first


def test_what_goes_wrong_in_one_process_ends_all_with_its_message(two):
    first, second = two[1]["troubles"]
    assert first["diverged"] == second["diverged"] == "the output is nan in step 1 (epoch 1): [0, 2, 3, 4]"
    assert first["unreadable"] == "ProcessError: c.png: expected a complete PNG file"
    assert second["unreadable"] == "ValueError: c.png: expected a complete PNG file"
    assert second["unwritable"] == first["unwritable"].replace("ValueError", "ProcessError")
    for one in (first, second):
        assert one["full"].endswith("by-one: File too large; the checkpoint that was there is unchanged")
    assert [path.name for path in (two[0] / "by-one").iterdir()] == ["00000000"]


def test_program_asked_to_stop_in_one_process_stops_in_both_and_goes_on(two):
    folder, _, done = two
    assert done.stderr.count("stopped after step 3; --resume goes on") == 1
    assert done.stdout.count("resumed    after step 3 of 4") == 1
    assert_same_training(folder / "undisturbed", folder / "stopped")


def test_best_network_is_whole(two):
    best = read(two[0] / "undisturbed" / "best.pt", ("settings", "weights"))
    build_network(Settings.from_data(best["settings"])).load_state_dict(best["weights"])
    assert all(type(value) is torch.Tensor for value in best["weights"].values())


def test_program_says_everything_once(two):
    _, _, done = two
    assert done.stdout.count("2 processes") == done.stdout.count("recipe") == 4
    assert done.stdout.count("epoch 1/2: loss") == 3
    assert done.stdout.count("epoch 2/2: loss") == 2
    assert done.stderr.count("is there already: --resume goes on with it") == 1
    assert done.stderr.count("batch must be divisible by the number of processes, 2; got 3") == 1


def test_killed_while_training_ends_the_other(two):
    _, _, done = two
    assert done.returncode == 1
    # Not always once: torchrun, which ends the first process then, can be sooner than what it says.
    assert done.stderr.count("process 0 has lost another of the 2 processes and cannot go on") <= 1
    assert "exitcode: -9) local_rank: 1" in done.stderr  # torchrun's own words


def test_error_of_one_process_alone_ends_both(two):
    (first, first_said), (second, second_said) = two[1]["one with an error"]
    assert first == second == 1  # and not None: one waits for another for half an hour
    assert first_said.count("train_segmentation.py: [Errno 28] No space left on device") == 1
    assert second_said.count("process 1 has lost another of the 2 processes and cannot go on") == 1


@pytest.mark.slow
def test_killed_while_writing_and_started_again(two):
    """After the kill above: all that was written is there, and the end is that of a training which nobody killed."""
    folder, _, _ = two
    program = folder / "killed.py"
    program.write_text(KILLED)
    arguments = json.loads((folder / "arguments.json").read_text())
    out = folder / "killed"
    command = [*TORCHRUN, "--max-restarts", "1", str(program), *arguments, "--out", str(out), "--resume"]
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("exitcode: -9) local_rank: 1") == 1
    assert done.stdout.count("resumed    after step 2 of 4") == 2
    assert_same_training(folder / "undisturbed", out)
    assert [path.name for path in (out / "last").iterdir()] == ["00000001"]


FILES = {"training": ["a"], "validation": ["b"]}
VIEW = {"files": FILES, "kept": "00000003", "parallel": "ddp", "checkpoint_activations": False}


def require_same(first, second):
    """What two processes find, as the second one looks at it."""
    seen = []

    class Second(Processes):
        def gather(self, value):
            seen.append(value)
            return [seen[0], value]

    for view in (first, second):
        options = argparse.Namespace(parallel=view["parallel"], checkpoint_activations=view["checkpoint_activations"])
        work = train_segmentation.Work(None, [], view["files"], options)
        kept = view["kept"] and train_segmentation.Kept(Path("last", view["kept"]), {})
        train_segmentation.require_same_view(job.SETTINGS, work, kept, Second())


@pytest.mark.parametrize(
    "other",
    [
        {"files": {"training": ["b"], "validation": ["a"]}},
        {"kept": None},
        {"kept": "00000002"},
        {"parallel": "fsdp"},
        {"checkpoint_activations": True},
    ],
)
def test_processes_that_find_or_do_other_things_do_not_begin(other):
    require_same(VIEW, VIEW)
    with pytest.raises(SettingsError, match=r"data, options and checkpoint must be .* got others in \[1\]"):
        require_same(VIEW, VIEW | other)


def test_what_is_started_again_goes_on_by_itself_with_its_own_checkpoint_only(tmp_path, monkeypatch):
    needed = ["--images", "", "--labels", "", "--device", "cpu", "--out", str(tmp_path)]

    def taken_up(start, name, *more):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", start)
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        return train_segmentation.take_up(parse([*needed, *more]))

    assert taken_up("0", "seven") is taken_up("1", "seven") is None  # there is nothing yet
    for run in ("seven", None):
        rest = {"settings": job.SETTINGS.as_data(), "files": FILES, "training": {}, "run": run}
        sharded.save(tmp_path / "last", {"weight": torch.zeros(3)}, rest)
        for start, name in (("0", "seven"), ("1", "eight"), ("1", "none"), *([("1", "seven")] if run is None else ())):
            with pytest.raises(CheckpointError, match="is there already: --resume goes on with it"):
                taken_up(start, name)
            assert taken_up(start, name, "--resume").rest["files"] == FILES
        if run is not None:
            assert taken_up("1", run).rest["files"] == FILES
