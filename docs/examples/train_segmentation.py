"""Train a segmentation network on a folder of images and a folder of their labels.

    python docs/examples/train_segmentation.py --images cells/images --labels cells/labels --out cells/training
    python docs/examples/train_segmentation.py --images cells/images --labels cells/labels --out cells/training --resume

See docs/train-on-your-images.md.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from segmentation import checkpoint
from segmentation.checkpoint import CheckpointError
from segmentation.crops import Crops
from segmentation.loop import DivergenceError, Training
from segmentation.losses import CRITERIA
from segmentation.options import chosen, parse
from segmentation.pairs import Sample, find_pairs, load_samples, split
from segmentation.pictures import draw
from segmentation.prediction import Predictor, largest_piece
from segmentation.readers import spatial_dims_of
from segmentation.records import Records
from segmentation.settings import TASKS, Settings, build_network, complete, differences
from segmentation.stopping import Stopped, StopRequest
from segmentation.validation import MAIN_SCORES, validate
from tqdm import tqdm

PROGRAM = Path(__file__).name
LAST, BEST = "last.pt", "best.pt"
PICTURED = 4  # validation samples in the picture of an epoch


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run the program; returns a row of numbers per epoch."""
    options = parse(arguments)
    try:
        settings, work, kept = prepare(options)
    except (OSError, TypeError, ValueError) as problem:
        sys.exit(f"{PROGRAM}: {problem}")
    torch.manual_seed(settings.seed)
    training = Training(build_network(settings), CRITERIA[settings.task], settings, options.device)
    try:
        if kept is not None:
            checkpoint.fill(training.network, kept["network"], options.out / LAST)
            training.load_state_dict(kept)
        describe(training, work.files)
        with StopRequest() as stop:
            train(training, work, stop)
    except (CheckpointError, OSError) as problem:
        sys.exit(f"{PROGRAM}: {problem}")
    print(f"{options.out / BEST} is the best network, {options.out / 'history.csv'} how it came to be")
    return training.history


@dataclass(frozen=True)
class Work:
    """What a training works on, and where it puts what comes of it."""

    crops: Crops
    unseen: list[Sample]
    files: dict[str, list[str]]
    options: argparse.Namespace


def prepare(options: argparse.Namespace) -> tuple[Settings, Work, dict[str, Any] | None]:
    """Read and check everything: settings, samples, and the state to go on from, if there is one."""
    last = options.out / LAST
    kept = take_up(last, options)
    asked = chosen(options) if kept is None else kept["settings"]
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
    seen, unseen = split(samples, settings.validation, settings.seed)
    files = {"training": [sample.name for sample in seen], "validation": [sample.name for sample in unseen]}
    if kept is not None:
        require_same_files(last, kept["files"], files)
    crops = Crops(seen, settings.crop, settings.steps * settings.batch, settings.seed, task=settings.task)
    options.out.mkdir(parents=True, exist_ok=True)
    return settings, Work(crops, unseen, files, options), None if kept is None else kept["training"]


def take_up(last: Path, options: argparse.Namespace) -> dict[str, Any] | None:
    """The checkpoint to go on from; None to begin."""
    if not options.resume:
        if last.exists():
            raise CheckpointError(f"{last} is there already: --resume goes on with it, another --out begins anew")
        return None
    kept = checkpoint.read(last, ("settings", "files", "training"))
    wrong = differences(Settings.from_data(kept["settings"]), chosen(options))
    if wrong:
        raise CheckpointError(f"{last} cannot be gone on with otherwise than it was begun: {'; '.join(wrong)}")
    return kept


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
    last = work.options.out / LAST
    records = Records(work.options.out, training.steps_done)
    try:
        while training.epoch < training.settings.epochs:
            run_epoch(training, work, records, stop)
            save(last, training, work.files)
    except Stopped:
        save(last, training, work.files)
        print(f"stopped after step {training.steps_done}; --resume goes on from {last}", file=sys.stderr)
        sys.exit(130)
    except DivergenceError as problem:
        names = ", ".join(work.files["training"][i] for i in problem.samples)
        sys.exit(
            f"{problem}; its crops are from {names}. Look at these files, or try a lower --learning-rate than "
            f"{training.settings.learning_rate:g}. {last if last.exists() else 'Nothing'} is kept of what was before"
        )
    finally:
        records.close()


def run_epoch(training: Training, work: Work, records: Records, stop: StopRequest) -> None:
    """Train, validate, and write down how good it is."""
    settings, options = training.settings, work.options
    began = time.perf_counter()
    title = f"epoch {training.epoch + 1}/{settings.epochs}"
    with tqdm(total=settings.steps, initial=training.step, desc=title, unit="step", disable=None, leave=False) as bar:

        def on_step(losses: dict[str, float]) -> None:
            records.step(training.steps_done, losses, training.schedule.get_last_lr()[0])
            bar.set_postfix(loss=f"{losses['loss']:.3f}", refresh=False)
            bar.update()
            stop.check()

        losses = training.finish_epoch(work.crops, options.workers, on_step)

    largest = largest_piece(settings.crop, options.largest)
    predictor = Predictor(training.average.module, settings.task, settings.precision, largest)
    with tqdm(total=len(work.unseen), desc=f"{title}, validation", unit="image", disable=None, leave=False) as bar:

        def on_sample() -> None:
            bar.update()
            stop.check()

        scores = validate(predictor, work.unseen, settings.num_classes, on_sample)

    figure = draw(predictor, work.unseen[:PICTURED], settings.num_classes)
    training.close_epoch({"epoch": training.epoch + 1, **losses, **scores})
    records.epoch(training.steps_done, scores, training.history, figure)
    name = MAIN_SCORES[settings.task]
    best = best_epoch(training.history, name)
    if best == training.epoch:
        weights = training.average.module.state_dict()
        checkpoint.write(options.out / BEST, {"settings": settings.as_data(), "weights": weights, "epoch": best})
    shares = ", ".join(f"{value:.0%}" for key, value in scores.items() if key.startswith("unused groups"))
    print(
        f"{title}: loss {losses['loss']:.4f}, {name} {scores[name]:.4f} (best in epoch {best}), "
        f"unused groups {shares}, {time.perf_counter() - began:.0f} s",
        flush=True,
    )


def best_epoch(history: Sequence[Mapping[str, Any]], score: str) -> int:
    """The first epoch of the highest score, counted from 1; a score that does not exist is the lowest."""
    values = [-math.inf if math.isnan(row[score]) else row[score] for row in history]
    return 1 + values.index(max(values))


def save(last: Path, training: Training, files: dict[str, list[str]]) -> None:
    """Write the checkpoint to go on from. The averaged weights have two names in it, and one place on the disk."""
    checkpoint.write(
        last,
        {
            "settings": training.settings.as_data(),
            "weights": training.average.module.state_dict(),
            "files": files,
            "training": training.state_dict(),
        },
    )


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
        f"network    {settings.preset}, {parameters} parameters, on {training.device}, {settings.precision}\n"
        f"recipe     {settings.epochs} epochs of {settings.steps} steps of {settings.batch} crops of {size} pixels, "
        f"learning rate {settings.learning_rate:g}, seed {settings.seed}"
    )
    if training.steps_done:
        print(f"resumed    after step {training.steps_done} of {settings.epochs * settings.steps}")


if __name__ == "__main__":
    main()
