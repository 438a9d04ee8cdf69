"""What two processes do together for ``test_segmentation_processes.py``, and one alone beside them.

    torchrun --nproc-per-node 2 processes_for_tests.py programs FOLDER

Starting processes takes longer than most of what they do, so they are started once for all that tests of ``programs``
look at, and once for those of ``steps``, which take longer.
"""

import errno
import functools
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import train_segmentation
from segmentation import sharded
from segmentation.checkpoint import CheckpointError
from segmentation.crops import Crops, Item
from segmentation.loop import DivergenceError, Training
from segmentation.losses import CRITERIA
from segmentation.pairs import Sample
from segmentation.prediction import Predictor
from segmentation.processes import ProcessError, Processes, started
from segmentation.records import Records
from segmentation.settings import Settings, build_network
from segmentation.stopping import Stopped, StopRequest
from segmentation.validation import validate
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

CPU = torch.device("cpu")
STEPS = 3
SETTINGS = Settings(
    task="semantic", preset="nano", spatial_dims=2, in_channels=1, num_classes=3, num_candidates=100,
    spacing=(1.0, 1.0), crop=(24, 20), learning_rate=1e-3, batch=4, steps=STEPS, epochs=2, warmup=0.3,
)  # fmt: skip
WAYS = ("ddp", "fsdp")
EQUALS = [  # task, network's type, precision of the forward pass, recomputed blocks
    ("semantic", "float64", "float32", False),
    ("instances", "float64", "float32", True),
    ("instances", "float32", "bf16", True),
]
SHARDED = EQUALS[1]
PLAIN = ("semantic", "float32", "float32", False)


class Doubled(Crops):
    """Crops in double precision."""

    def __getitem__(self, index: int) -> Item:
        item = super().__getitem__(index)
        return {**item, "image": item["image"].double()}


def samples() -> list[Sample]:
    """Images of different sizes, smaller than a crop some of them, with one to four objects, or none."""
    made = []
    for i, size in enumerate([(40, 30), (13, 30), (40, 11), (24, 20), (15, 16)]):
        labels = np.zeros(size, np.int32)
        for number in range(i):
            start = 3 + 3 * number
            labels[start : start + 3, start : start + 5] = 1 + number
        image = np.random.default_rng(i).normal(size=(1, *size)) + 2 * (labels > 0)
        made.append(Sample(str(i), image.astype(np.float32), labels, (1.0, 1.0)))
    return made


def for_task(task: str) -> list[Sample]:
    return [s if task == "instances" else s._replace(labels=s.labels.clip(max=2)) for s in samples()]


def made(processes: Processes, way: str, task: str, dtype: str, precision: str, checkpoint: bool) -> Training:
    """A training with the first weights of all others, after which random numbers are those of a process."""
    settings = replace(SETTINGS, task=task, num_classes=2 if task == "instances" else 3, precision=precision)
    torch.manual_seed(0)
    network = build_network(settings, checkpoint).to(getattr(torch, dtype))
    # Branches that start at nothing would have next to no gradient in the few steps taken here.
    for parameter in network.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return Training(network, CRITERIA[task], settings, CPU, processes, way)


def whole(training: Training) -> dict[str, Any]:
    """Everything that a training keeps, nothing of it in parts."""
    options = StateDictOptions(full_state_dict=True)
    tensors = training.tensors()
    optimiser = {
        name: {key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in each.items()}
        for name, each in tensors["optimiser"].items()
    }
    networks = {"network": training.network, "average": training.average.module}
    weights = {name: get_model_state_dict(each, options=options) for name, each in networks.items()}
    rest = {name: value for name, value in training.state_dict().items() if name != "random"}
    copied = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, {**weights, "optimiser": optimiser})
    return {"tensors": copied, "rest": rest}


def trained(processes: Processes, way: str, *case: Any) -> dict[str, Any]:
    """First weights, losses of every step, and all that there is at the end."""
    training = made(processes, way, *case)
    first = whole(training)["tensors"]["network"]
    crops_of = Doubled if case[1] == "float64" else Crops
    crops = crops_of(for_task(case[0]), SETTINGS.crop, STEPS * SETTINGS.batch, 0, task=case[0])
    losses: list[dict[str, float]] = []
    training.finish_epoch(crops, 0, losses.append)
    return {"first": first, "losses": losses, "end": whole(training)}


def kept_by(processes: Processes, way: str, folder: Path) -> dict[str, Any]:
    """Train half an epoch and write a checkpoint."""
    training = made(processes, way, *PLAIN)
    crops = Crops(for_task("semantic"), SETTINGS.crop, STEPS * SETTINGS.batch, 0)
    with StopRequest(False, processes.any) as stop:

        def on_step(_: dict[str, float]) -> None:
            # Only the last process is asked to stop.
            stop.asked = training.step == 2 and processes.rank == processes.size - 1
            stop.check()

        try:
            training.finish_epoch(crops, 0, on_step)
        except Stopped:
            sharded.save(folder, training.tensors(), {"training": training.state_dict()}, processes)
    return whole(training)


def taken_up(processes: Processes, way: str, folder: Path) -> dict[str, Any]:
    """All that a checkpoint makes of a training that began otherwise."""
    training = made(processes, way, *PLAIN)
    with torch.no_grad():
        for parameter in training.network.parameters():
            parameter.add_(1.0)
    path, rest = sharded.read(folder, ("training",))
    tensors = training.tensors()
    sharded.load(path, tensors)
    training.load_state_dict(rest["training"], tensors)
    return whole(training)


def scores(processes: Processes, way: str) -> dict[str, Any]:
    """Of five images, which two processes cannot share out evenly, in tiles, of which some have more."""
    training = made(processes, way, *PLAIN)
    predictor = Predictor(training.averaged(), "semantic", "float32", 400)
    rounds: list[int] = []
    found = validate(predictor, for_task("semantic"), 3, processes, rounds.append)
    return {"scores": found, "rounds": rounds}


def outcome(function: Callable[[], Any]) -> Any:
    """What a function returns, or which error it ends with."""
    try:
        return function()
    except (CheckpointError, DivergenceError, ProcessError, ValueError) as problem:
        return f"{type(problem).__name__}: {problem}"


def troubles(processes: Processes, folder: Path) -> dict[str, Any]:
    """What goes wrong in the second process alone, as it is noticed in every process."""
    last = processes.rank == processes.size - 1

    def diverged() -> str:
        training = made(processes, "ddp", *EQUALS[1])
        crops = Doubled(for_task("instances"), SETTINGS.crop, SETTINGS.batch * STEPS, 0, task="instances")
        share = SETTINGS.batch // processes.size
        batch = torch.utils.data.default_collate([crops[processes.rank * share + i] for i in range(share)])
        if last:
            batch["image"][0, 0, 0, 0] = torch.nan
        try:
            training.take_step(batch)
        except DivergenceError as problem:
            return f"{problem}: {problem.samples}"
        return "went on"

    def unreadable() -> None:
        with processes.together():
            if last:
                raise ValueError("c.png: expected a complete PNG file")

    def unwritable() -> None:
        processes.first(functools.partial(int, "nothing"))

    def full() -> None:
        training = made(processes, "fsdp", *PLAIN)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if last:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20000, before[1]))
        try:
            sharded.save(folder, training.tensors(), {}, processes)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return {function.__name__: outcome(function) for function in (diverged, unreadable, unwritable, full)}


def random_numbers(processes: Processes) -> list[list[float]]:
    """What the processes draw once they train, twice over."""
    drawn = []
    for _ in range(2):
        made(processes, "ddp", *PLAIN)
        drawn.append(torch.rand(3).tolist())
    return drawn


def ended(arguments: list[str]) -> Any:
    """The exit status of the program."""
    try:
        train_segmentation.main(arguments)
    except SystemExit as end:
        return end.code
    return 0


def programs(processes: Processes, folder: Path, arguments: list[str]) -> None:
    """The whole program, left alone; and asked to stop in one process, and gone on with."""
    train_segmentation.started = lambda _: nullcontext(processes)  # type: ignore[assignment]
    train_segmentation.main([*arguments, "--out", str(folder / "undisturbed")])
    finish = Training.take_step

    def asked_in_one(self: Training, batch: Any) -> dict[str, float]:
        losses = finish(self, batch)
        if self.steps_done == 2 and processes.rank == 1:
            for _ in range(2):  # Slurm's, and torchrun's
                os.kill(os.getpid(), signal.SIGTERM)
        return losses

    Training.take_step = asked_in_one  # type: ignore[method-assign]
    stopped = [*arguments, "--out", str(folder / "stopped")]
    assert ended(stopped) == 130
    Training.take_step = finish  # type: ignore[method-assign]
    train_segmentation.main([*stopped, "--resume"])
    for other in (["--out", str(folder / "undisturbed")], ["--batch", "3"]):
        assert ended([*arguments, *other]) == 1


def killed(processes: Processes, arguments: list[str]) -> None:
    """The second process is killed in the second epoch; what that is to the first ends the program."""
    finish = Training.take_step

    def last_step(self: Training, batch: Any) -> dict[str, float]:
        losses = finish(self, batch)
        if self.epoch == 1 and processes.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return losses

    Training.take_step = last_step  # type: ignore[method-assign]
    train_segmentation.main(arguments)


def without_room(rank: int, port: int, said: Path, arguments: list[str]) -> None:
    """The program in one of two processes, of which the first has no room for the numbers of a step."""
    for name in [name for name in os.environ if name.startswith("TORCHELASTIC")]:
        del os.environ[name]
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with said.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    Records.step = full  # type: ignore[method-assign]
    train_segmentation.main(arguments)


def one_with_an_error(folder: Path, arguments: list[str]) -> list[tuple[int | None, str]]:
    """How two other processes end, and what they say; nobody else ends them. They fork, before there are threads."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = [folder / f"said-{rank}.txt" for rank in range(2)]
    arguments = [*arguments, "--parallel", "ddp", "--out", str(folder / "full")]
    fork = multiprocessing.get_context("fork").Process
    both = [fork(target=without_room, args=(rank, port, said[rank], arguments)) for rank in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join(60)
    ends = [each.exitcode for each in both]
    for each in both:
        each.kill()
    return [(end, file.read_text()) for end, file in zip(ends, said, strict=True)]


def run_programs(folder: Path) -> None:
    """Whole programs, what goes wrong in them, and one of the trainings that are compared with those of one process."""
    arguments = json.loads((folder / "arguments.json").read_text())
    ends = one_with_an_error(folder, arguments) if os.environ["RANK"] == "0" else None
    with started(CPU) as processes:
        programs(processes, folder, arguments)
        found = {
            "one with an error": ends,
            "random": processes.gather(random_numbers(processes)),
            "trained": trained(processes, "fsdp", *SHARDED),
            "troubles": processes.gather(troubles(processes, folder / "by-one")),
        }
        if processes.is_first:
            torch.save(found, folder / "found.pt")
        killed(processes, [*arguments, "--out", str(folder / "killed")])


def take_steps(folder: Path) -> None:
    """Trainings of all kinds, and what they make of what others wrote."""
    found: dict[str, Any] = {}
    with started(CPU) as processes:
        for way in WAYS:
            found[way] = {
                "trained": [trained(processes, way, *case) for case in EQUALS],
                "kept": kept_by(processes, way, folder / f"by-{way}"),
                "scores": scores(processes, way),
            }
        for way, other in (WAYS, WAYS[::-1]):
            for by in ("one", other):
                found[way][f"taken up from {by}"] = taken_up(processes, way, folder / f"by-{by}")
        if processes.is_first:
            torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"programs": run_programs, "steps": take_steps}[sys.argv[1]](Path(sys.argv[2]))
