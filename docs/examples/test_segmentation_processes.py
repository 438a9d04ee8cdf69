"""Two processes train as one does, and whatever ends one of them ends both, with nothing lost."""

import json
import os
import subprocess
import sys
from pathlib import Path

import processes_for_tests as job
import pytest
import torch
from segmentation import sharded
from segmentation.checkpoint import CheckpointError
from segmentation.processes import ALONE
from test_segmentation_training import QUICK, assert_same_training, kept, one_thread, write_set  # noqa: F401

pytestmark = pytest.mark.training

HERE = Path(__file__).parent
# Runs in every process in place of the program: the second one is killed in its first life after it has taken three
# steps, with one checkpoint written, and in its second life while it writes the next one.
KILLED = """
import os, signal, sys
import train_segmentation
from segmentation import sharded
from segmentation.loop import Training
from torch.distributed.checkpoint import FileSystemWriter
life, is_last = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), os.environ["RANK"] == "1"
take_step, write = Training.take_step, FileSystemWriter.write_data

def step_and_die(self, batch):
    losses = take_step(self, batch)
    if self.steps_done == 2:  # counted before the third
        os.kill(os.getpid(), signal.SIGKILL)
    return losses

def write_and_die(self, *arguments):
    done = write(self, *arguments)
    done.wait()
    os.kill(os.getpid(), signal.SIGKILL)

if is_last and life == 0:
    Training.take_step = step_and_die
if is_last and life == 1:
    FileSystemWriter.write_data = write_and_die
train_segmentation.main()
"""

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(command, **keywords):
    paths = os.pathsep.join([str(HERE), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, **keywords)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes found, what they wrote, and what they said."""
    folder = tmp_path_factory.mktemp("two")
    arguments = [*write_set(folder / "set", (24, 26), ".png"), *QUICK]
    (folder / "arguments.json").write_text(json.dumps(arguments))
    kept_by_one = job.kept_by(ALONE, "ddp", folder / "by-one")
    done = run([*TORCHRUN, str(HERE / "processes_for_tests.py"), str(folder)])
    assert done.returncode == 0, done.stderr
    found = torch.load(folder / "found.pt", weights_only=True)
    return folder, found | {"kept by one": kept_by_one}, done


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


@pytest.fixture(scope="module")
def alone():
    """What one process makes of every case."""
    return {case: job.trained(ALONE, "ddp", *case) for case in job.EQUALS}


@pytest.mark.parametrize("way", job.WAYS)
@pytest.mark.parametrize("case", job.EQUALS, ids=lambda case: "-".join(map(str, case)))
def test_two_processes_take_the_steps_that_one_takes(two, alone, way, case):
    found, want = two[1][way]["trained"][job.EQUALS.index(case)], alone[case]
    assert_same(found["first"], want["first"])
    assert farthest(want["first"], want["end"]["tensors"]["network"]) > 1e-2
    _, dtype, precision, _ = case
    if precision == "bf16":  # 8 bits
        assert farthest(want["losses"], found["losses"]) < 2**-8
        return
    # Sums in another order, of some thousand numbers; what stands behind it is that of the longest way there is.
    rounding = 1e4 * torch.finfo(getattr(torch, dtype)).eps
    assert farthest(want["losses"], found["losses"]) < rounding
    assert farthest(want["end"]["tensors"]["optimiser"], found["end"]["tensors"]["optimiser"]) < rounding
    if dtype == "float64":
        # Adam divides by the size of a gradient, and so makes steps of a gradient that is all rounding.
        for kind in ("network", "average"):
            assert farthest(want["end"]["tensors"][kind], found["end"]["tensors"][kind]) < 1e-10


@pytest.mark.parametrize("way", job.WAYS)
@pytest.mark.parametrize("by", ["one", *job.WAYS])
def test_any_processes_go_on_from_what_any_others_wrote(two, way, by):
    wrote = two[1]["kept by one"] if by == "one" else two[1][by]["kept"]
    assert wrote["rest"]["progress"]["step"] == 2
    assert_same(wrote, two[1][way][f"taken up from {by}"])


@pytest.mark.parametrize("by", job.WAYS)
def test_one_process_goes_on_from_what_two_wrote(two, by):
    folder, found, _ = two
    assert_same(found[by]["kept"], job.taken_up(ALONE, "ddp", folder / f"by-{by}"))


def test_weights_of_another_network(two):
    training = job.made(ALONE, "ddp", "instances", "float32", "float32", False)
    path, _ = sharded.read(two[0] / "by-fsdp", ())
    with pytest.raises(CheckpointError, match=r"must hold the weights .* another version(.|\n)*Size mismatch"):
        sharded.load(path, training.tensors())


@pytest.mark.parametrize("way", job.WAYS)
def test_scores_are_those_of_one_process(two, way):
    found, want = two[1][way]["scores"], job.scores(ALONE, "ddp")
    assert found["rounds"] == [2, 2, 1]
    assert leaves(found["scores"]) == pytest.approx(leaves(want["scores"]), nan_ok=True)


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
        assert one["full"].endswith("by-ddp: File too large; the checkpoint that was there is unchanged")
    assert [path.name for path in (two[0] / "by-ddp").iterdir()] == ["00000000"]


def test_program_asked_to_stop_in_one_process_stops_in_both_and_goes_on(two):
    folder, _, done = two
    assert done.stderr.count("stopped after step 3; --resume goes on") == 1
    assert done.stdout.count("resumed    after step 3 of 4") == 1
    assert_same_training(folder / "undisturbed", folder / "stopped")


def test_program_says_everything_once(two):
    _, _, done = two
    assert done.stdout.count("2 processes") == done.stdout.count("recipe") == 3
    assert done.stdout.count("epoch 1/2: loss") == 2
    assert done.stdout.count("epoch 2/2: loss") == 2
    assert done.stderr.count("is there already: --resume goes on with it") == 1
    assert done.stderr.count("batch must be divisible by the number of processes, 2; got 3") == 1


def test_killed_while_training_and_while_writing_and_started_again(two):
    folder, _, _ = two
    program = folder / "killed.py"
    program.write_text(KILLED)
    arguments = json.loads((folder / "arguments.json").read_text())
    out = folder / "killed"
    done = run([*TORCHRUN, "--max-restarts", "2", str(program), *arguments, "--out", str(out)])
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("process 0 has lost another of the 2 processes and cannot go on") == 2
    assert done.stderr.count("exitcode: -9) local_rank: 1") == 2  # torchrun's own words
    assert done.stdout.count("resumed    after step 2 of 4") == 2
    assert_same_training(folder / "undisturbed", out)
    assert [path.name for path in (out / "last").iterdir()] == ["00000001"]
