"""Checkpoints that are either whole or not there."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

FORMAT = "spatial-grouping-attention segmentation, version 2"


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written; the message names it, what was expected and what was found."""


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write into, which takes the place of ``path`` when all of it is on the disk, and not before.

    Whenever the program or the machine stops, ``path`` holds either its old contents or its new ones, whole. A
    program that is killed leaves a temporary file beside it, which :func:`remove_leftovers` removes.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Write a folder's own entries to the disk; Windows cannot, and does not need it."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(path: Path) -> None:
    """Remove what killed programs left of writing ``path``."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink()


def write(path: Path, contents: dict[str, Any]) -> None:
    """Write a checkpoint in place of the one that is there.

    Args:
        path: file; its folder exists.
        contents: tensors, numbers, strings, None, and lists, tuples and dicts of them.

    Raises:
        CheckpointError: the file cannot be written; the old one is as it was.
    """
    remove_leftovers(path)
    try:
        with replacing(path) as file:
            torch.save({"format": FORMAT, **contents}, file)
    # torch reports an error of the file as a RuntimeError of its own where it has begun to write.
    except (OSError, RuntimeError) as problem:
        state = "the checkpoint that was there is unchanged" if path.exists() else "there is no checkpoint yet"
        raise CheckpointError(f"cannot write {path}: {reason(problem)}; {state}") from problem


def reason(problem: BaseException) -> str:
    """What the system said, if it is behind an error of torch."""
    cause: BaseException | None = problem
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return str(problem) if cause is None else cause.strerror or str(cause)


def read(path: Path, entries: Collection[str], device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint, without running anybody's code.

    Args:
        path: file that :func:`write` wrote.
        entries: what it must contain.
        device: where to put its tensors.

    Raises:
        CheckpointError: it is not there, damaged, or no checkpoint of a training.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} must be a checkpoint; there is no such file")
    try:
        # Every part of the file has a checksum, which torch does not look at.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"{path} must be a whole checkpoint; its part {damaged} is damaged")
        contents = torch.load(path, map_location=device, weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as problem:
        size = path.stat().st_size
        raise CheckpointError(
            f"{path} must be a checkpoint written by train_segmentation.py; got a file of {size} bytes that cannot be "
            f"read as one ({str(problem).splitlines()[0]})"
        ) from problem
    found = contents.get("format") if isinstance(contents, dict) else None
    if found != FORMAT:
        raise CheckpointError(f'{path} must have the format "{FORMAT}"; got {found!r}')
    missing = sorted(set(entries) - set(contents))
    if missing:
        raise CheckpointError(f"{path} must contain {sorted(entries)}; {missing} are missing")
    return contents


def fill(network: nn.Module, weights: dict[str, Any], path: Path) -> None:
    """Put the weights of a checkpoint into the network that its settings describe.

    Raises:
        CheckpointError: they do not fit, because presets have changed since.
    """
    try:
        network.load_state_dict(weights)
    except RuntimeError as problem:
        raise CheckpointError(
            f"{path} must hold the weights of the network that its settings describe; another version of "
            f"spatial-grouping-attention has written it, for it holds others:\n{problem}"
        ) from problem
