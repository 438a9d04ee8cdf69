"""Train a segmentation network on a folder of images and a folder of their labels.

    python docs/examples/train_segmentation.py --images cells/images --labels cells/labels --out cells/training
    python docs/examples/train_segmentation.py --images cells/images --labels cells/labels --out cells/training --resume
    torchrun --nproc-per-node 2 docs/examples/train_segmentation.py --images cells/images --labels cells/labels

See docs/train-on-your-images.md, and docs/training-at-scale.md for several processes.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from segmentation import checkpoint, sharded
from segmentation.checkpoint import CheckpointError
from segmentation.crops import Crops
from segmentation.loop import DivergenceError, Training
from segmentation.losses import CRITERIA
from segmentation.options import chosen, parse
from segmentation.pairs import Sample, find_pairs, load_samples, split
from segmentation.pictures import draw
from segmentation.prediction import Predictor, largest_piece
from segmentation.processes import ProcessError, Processes, is_loss_of_another, is_of_all, restarts, run_name, started
from segmentation.readers import spatial_dims_of
from segmentation.records import Records
from segmentation.settings import TASKS, Settings, SettingsError, build_network, complete, differences
from segmentation.stopping import Stopped, StopRequest
from segmentation.validation import MAIN_SCORES, validate
from torch.distributed import is_torchelastic_launched
from tqdm import tqdm

PROGRAM = Path(__file__).name
LAST, BEST = "last", "best.pt"
PICTURED = 4  # validation samples in the picture of an epoch


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run the program; returns a row of numbers per epoch."""
    options = parse(arguments)
    with started(options.device) as processes:
        try:
            history = run(options, processes)
        except (OSError, TypeError, ValueError, ProcessError) as problem:
            end = processes.exit if is_of_all(problem) else processes.abandon
            end(f"{PROGRAM}: {problem}")
        except RuntimeError as problem:
            if not is_loss_of_another(problem):
                raise
            sys.exit(
                f"{PROGRAM}: process {processes.rank} has lost another of the {processes.size} processes and cannot go "
                f"on ({str(problem).splitlines()[0]}); {options.out / LAST} is as it was last written"
            )
        if processes.is_first:
            print(f"{options.out / BEST} is the best network, {options.out / 'history.csv'} how it came to be")
        return history


def run(options: argparse.Namespace, processes: Processes) -> list[dict[str, Any]]:
    """Read, train, and leave files; returns a row of numbers per epoch."""
    with processes.together():
        settings, work, kept = prepare(options, processes)
    with processes.together():
        require_same_view(settings, work, kept, processes)
    torch.manual_seed(settings.seed)
    network = build_network(settings, options.checkpoint_activations)
    criterion = CRITERIA[settings.task]
    training = Training(network, criterion, settings, options.device, processes, options.parallel)
    if kept is not None:
        tensors = training.tensors()
        sharded.load(kept.path, tensors, processes)
        training.load_state_dict(kept.rest["training"], tensors)
    if processes.is_first:
        describe(training, work.files)
    with StopRequest(not is_torchelastic_launched(), processes.any) as stop:
        train(training, work, stop)
    return training.history


@dataclass(frozen=True)
class Work:
    """What a training works on, and where it puts what comes of it."""

    crops: Crops
    unseen: list[Sample]
    files: dict[str, list[str]]
    options: argparse.Namespace


class Kept(NamedTuple):
    """A checkpoint to go on from, and what is kept in it beside tensors."""

    path: Path
    rest: dict[str, Any]


def prepare(options: argparse.Namespace, processes: Processes) -> tuple[Settings, Work, Kept | None]:
    """Read and check everything: settings, samples, and the state to go on from, if there is one."""
    kept = take_up(options)
    asked = chosen(options) if kept is None else kept.rest["settings"]
    task = asked.get("task", TASKS[0])
    samples = load_samples(
        options.images,
        options.labels,
        spatial_dims=asked.get("spatial_dims") or spatial_dims_of(find_pairs(options.images, options.labels)[0][2]),
        task=task,
        num_classes=asked.get("num_classes") if task == "semantic" else None,
        spacing=asked.get("given_spacing"),
    )
    settings = complete(asked, samples)
    if settings.batch % processes.size:
        raise SettingsError(
            f"batch must be divisible by the number of processes, {processes.size}; got {settings.batch}"
        )
    seen, unseen = split(samples, settings.validation, settings.seed)
    files = {"training": [sample.name for sample in seen], "validation": [sample.name for sample in unseen]}
    if kept is not None:
        require_same_files(kept.path, kept.rest["files"], files)
    length = settings.steps * settings.batch
    crops = Crops(seen, settings.crop, length, settings.seed, task=settings.task, spacing=settings.seen_spacing)
    options.out.mkdir(parents=True, exist_ok=True)
    return settings, Work(crops, unseen, files, options), kept


def take_up(options: argparse.Namespace) -> Kept | None:
    """The checkpoint to go on from; None to begin."""
    last = options.out / LAST
    if sharded.latest(last) is None and not options.resume:
        return None
    already = CheckpointError(f"{last} is there already: --resume goes on with it, another --out begins anew")
    # What torchrun starts again goes on by itself, but not with what it was refused the first time.
    if not (options.resume or (restarts() and run_name())):
        raise already
    path, rest = sharded.read(last, ("settings", "files", "training", "run"))
    if not options.resume and rest["run"] != run_name():
        raise already
    wrong = differences(Settings.from_data(rest["settings"]), chosen(options))
    if wrong:
        raise CheckpointError(f"{last} cannot be gone on with otherwise than it was begun: {'; '.join(wrong)}")
    return Kept(path, rest)


def require_same_view(settings: Settings, work: Work, kept: Kept | None, processes: Processes) -> None:
    """Processes of several machines must find the same files, options and checkpoint."""
    options, name = work.options, None if kept is None else kept.path.name
    views = processes.gather((settings, work.files, name, options.parallel, options.checkpoint_activations))
    others = [rank for rank, view in enumerate(views) if view != views[0]]
    if others:
        raise SettingsError(
            "data, options and checkpoint must be those of process 0 in all processes; got others in "
            f"{others}: do their machines see the same folders?"
        )


def require_same_files(last: Path, kept: dict[str, list[str]], files: dict[str, list[str]]) -> None:
    """What was kept for validation must not have been trained on."""
    before, now = (set(part["training"] + part["validation"]) for part in (kept, files))
    if kept != files:
        raise CheckpointError(
            f"{last} must be gone on with on the files that it was begun with; "
            f"missing: {', '.join(sorted(before - now)) or 'none'}; new: {', '.join(sorted(now - before)) or 'none'}"
        )


def train(training: Training, work: Work, stop: StopRequest) -> None:
    """All epochs that are left; whatever ends them, a checkpoint says where."""
    last, processes = work.options.out / LAST, training.processes
    with processes.together():
        records = Records(work.options.out, training.steps_done) if processes.is_first else None
    try:
        while training.epoch < training.settings.epochs:
            run_epoch(training, work, records, stop)
            save(last, training, work.files)
    except Stopped:
        save(last, training, work.files)
        if processes.is_first:
            print(f"stopped after step {training.steps_done}; --resume goes on from {last}", file=sys.stderr)
        sys.exit(130)
    except DivergenceError as problem:
        names = ", ".join(work.files["training"][i] for i in problem.samples)
        processes.exit(
            f"{problem}; its crops are from {names}. Look at these files, or try a lower --learning-rate than "
            f"{training.settings.learning_rate:g}. {last if sharded.latest(last) else 'Nothing'} is kept of what was "
            "before"
        )
    finally:
        if records is not None:
            records.close()


def run_epoch(training: Training, work: Work, records: Records | None, stop: StopRequest) -> None:
    """Train, validate, and write down how good it is."""
    began = time.perf_counter()
    settings, processes = training.settings, training.processes
    title = f"epoch {training.epoch + 1}/{settings.epochs}"
    shown: dict[str, Any] = {"disable": None if processes.is_first else True, "leave": False}
    with tqdm(total=settings.steps, initial=training.step, desc=title, unit="step", **shown) as bar:

        def on_step(losses: dict[str, float]) -> None:
            if records is not None:
                records.step(training.steps_done, losses, training.schedule.get_last_lr()[0])
            bar.set_postfix(loss=f"{losses['loss']:.3f}", refresh=False)
            bar.update()
            stop.check()

        losses = training.finish_epoch(work.crops, work.options.workers, on_step)

    largest = largest_piece(settings.crop, work.options.largest)
    predictor = Predictor(training.averaged(), settings.task, settings.precision, largest, settings.seen_spacing)
    with tqdm(total=len(work.unseen), desc=f"{title}, validation", unit="image", **shown) as bar:

        def on_round(samples: int) -> None:
            bar.update(samples)
            stop.check()

        scores = validate(predictor, work.unseen, settings.num_classes, processes, on_round)

    training.close_epoch({"epoch": training.epoch + 1, **losses, **scores})
    with processes.together():
        if records is not None:
            write_down(training, work, records, predictor, scores)
            print(f"{title}: {summary(training, losses, scores)}, {time.perf_counter() - began:.0f} s", flush=True)


def write_down(
    training: Training, work: Work, records: Records, predictor: Predictor, scores: Mapping[str, Any]
) -> None:
    """Scores, a picture, and the network, if no epoch before had a better one."""
    settings = training.settings
    figure = draw(predictor, work.unseen[:PICTURED], settings.num_classes)
    records.epoch(training.steps_done, scores, training.history, figure)
    if best_epoch(training.history, MAIN_SCORES[settings.task]) == training.epoch:
        contents = {"settings": settings.as_data(), "weights": predictor.network.state_dict(), "epoch": training.epoch}
        checkpoint.write(work.options.out / BEST, contents)


def summary(training: Training, losses: Mapping[str, float], scores: Mapping[str, Any]) -> str:
    """An epoch in a line."""
    name = MAIN_SCORES[training.settings.task]
    shares = ", ".join(f"{value:.0%}" for key, value in scores.items() if key.startswith("unused groups"))
    best = best_epoch(training.history, name)
    return f"loss {losses['loss']:.4f}, {name} {scores[name]:.4f} (best in epoch {best}), unused groups {shares}"


def best_epoch(history: Sequence[Mapping[str, Any]], score: str) -> int:
    """The first epoch of the highest score, counted from 1; a score that does not exist is the lowest."""
    values = [-math.inf if math.isnan(row[score]) else row[score] for row in history]
    return 1 + values.index(max(values))


def save(last: Path, training: Training, files: dict[str, list[str]]) -> None:
    """Write the checkpoint to go on from."""
    rest = {
        "settings": training.settings.as_data(),
        "files": files,
        "training": training.state_dict(),
        "run": run_name(),
    }
    sharded.save(last, training.tensors(), rest, training.processes)


def describe(training: Training, files: dict[str, list[str]]) -> None:
    """Say what is learned from what."""
    settings = training.settings
    parameters = sum(p.numel() for p in training.network.parameters())
    seen, unseen = (len(files[part]) for part in ("training", "validation"))
    size, spacing = (" x ".join(f"{n:g}" for n in numbers) for numbers in (settings.crop, settings.spacing))
    print(
        f"data       {seen} images to train on, {unseen} for validation: {', '.join(files['validation'][:5])}"
        f"{' ...' if unseen > 5 else ''}\n"
        f"           {settings.spatial_dims}-D, channels: {settings.in_channels}, typical spacing {spacing}\n"
        f"task       {settings.task}, {settings.num_classes} classes\n"
        f"network    {settings.preset}, {parameters} parameters, on {training.device}, {settings.precision}, "
        f"{training.processes.size} process{'es' if training.processes.size > 1 else ''}\n"
        f"recipe     {settings.epochs} epochs of {settings.steps} steps of {settings.batch} crops of {size} pixels, "
        f"learning rate {settings.learning_rate:g}, seed {settings.seed}"
    )
    if training.steps_done:
        print(f"resumed    after step {training.steps_done} of {settings.epochs * settings.steps}")


if __name__ == "__main__":
    main()
