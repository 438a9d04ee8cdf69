"""Checkpoints that several processes write and read together, whole or not there.

A checkpoint is a folder with a number for its name in the folder that is given here; the highest number counts. Tensors
are in files of torch.distributed.checkpoint, so that any number of processes, each with any part of the tensors, reads
what any other wrote; all else is in one file, as in :mod:`segmentation.checkpoint`.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from enum import Enum, EnumMeta
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from segmentation import checkpoint
from segmentation.checkpoint import CheckpointError, reason, sync_folder
from segmentation.processes import ALONE, ProcessError, Processes

REST, CHECKSUMS, METADATA = "rest.pt", "checksums.json", ".metadata"

# What torch pickles of a checkpoint's metadata; to load anything else could be to run it.
KNOWN = {
    "torch": {"Size", "float16", "bfloat16", "float32", "float64", "int64", "bool"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}  # fmt: skip
KNOWN |= {module: {"PosixPath", "WindowsPath"} for module in ("pathlib", "pathlib._local")}


def _member(kind: Any, name: str) -> Enum:
    """Stands for ``getattr``, with which Python 3.11.2, say, pickles members of enumerations: it gives nothing else."""
    if not isinstance(kind, EnumMeta) or name not in kind.__members__:
        raise pickle.UnpicklingError(f"{kind}.{name} is no part of a checkpoint of tensors")
    return kind[name]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if name not in KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a checkpoint of tensors")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    """Reads tensors and nothing else, where torch's own would load any pickled object."""

    def read_metadata(self, *args: Any, **keywords: Any) -> Any:
        with Path(self.path, METADATA).open("rb") as file:
            metadata = _Unpickler(file).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def latest(folder: Path) -> Path | None:
    """The last checkpoint of a folder; None where there is none."""
    return max(_checkpoints(folder), default=None)


def save(folder: Path, tensors: dict[str, Any], rest: dict[str, Any], processes: Processes = ALONE) -> None:
    """Write a checkpoint in place of the one that is there, which stays until the new one is on the disk.

    Args:
        folder: is made where it is not; all processes see the same one.
        tensors: nested dicts of tensors, each process's own parts of them.
        rest: see :func:`segmentation.checkpoint.write`; that of the first process counts.
        processes: that take part, all of them.

    Raises:
        CheckpointError: it cannot be written; the old one is as it was.
    """
    temporary = None
    try:
        temporary = processes.first(partial(_begin, folder))
        with _single_process_is_meant():
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(temporary))
        with processes.together():
            sums = {path.name: _checksum(path) for path in temporary.glob(f"__{processes.rank}_*")}
        every = {name: each for part in processes.gather(sums) for name, each in part.items()}
        processes.first(partial(_complete, folder, temporary, rest, every))
    except (OSError, CheckpointException, CheckpointError, ProcessError) as problem:
        if processes.is_first and temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        state = "there is no checkpoint yet" if latest(folder) is None else "the checkpoint that was there is unchanged"
        with processes.together():  # all of them are here
            raise CheckpointError(f"cannot write {folder}: {_reason(problem)}; {state}") from problem


def read(folder: Path, entries: Collection[str]) -> tuple[Path, dict[str, Any]]:
    """Find the last checkpoint, and read what of it is no tensor of a network or its optimiser.

    Args:
        folder: that :func:`save` wrote into.
        entries: what must be there.

    Returns:
        The checkpoint, for :func:`load`, and its rest.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = latest(folder)
    if path is None:
        raise CheckpointError(f"{folder} must be a folder with a checkpoint; there is none")
    try:
        sums: dict[str, str] = json.loads((path / CHECKSUMS).read_text())
        damaged = [name for name in sorted(sums) if not _is_as_it_was(path / name, sums[name])]
    except (OSError, ValueError, AttributeError, TypeError) as problem:
        raise CheckpointError(f"{path} must be a whole checkpoint; {CHECKSUMS} cannot be read ({problem})") from problem
    if damaged:
        raise CheckpointError(f"{path} must be a whole checkpoint; of its files, damaged: {', '.join(damaged)}")
    return path, checkpoint.read(path / REST, entries)


def load(path: Path, tensors: dict[str, Any], processes: Processes = ALONE) -> None:
    """Fill tensors with those of a checkpoint; all processes must call it.

    Args:
        path: from :func:`read`.
        tensors: as they were saved, in any other parts.
        processes: that take part, all of them.

    Raises:
        CheckpointError: names or shapes are others, or there is something else than tensors.
    """
    reader = _Reader(path)
    with processes.together():
        try:
            reader.read_metadata()
        except (pickle.UnpicklingError, AttributeError) as problem:
            raise CheckpointError(f"{path} must hold tensors and nothing else; {problem}") from problem
    with processes.together():
        try:
            with _single_process_is_meant():
                dcp.load(tensors, storage_reader=reader)
        except CheckpointException as problem:
            raise CheckpointError(
                f"{path} must hold the weights of the network that its settings describe; another version of "
                f"spatial-grouping-attention has written it, for it holds others:\n{_reason(problem)}"
            ) from problem


def _checkpoints(folder: Path) -> list[Path]:
    # Numbers of one length, so that their order is that of their names.
    return [path for path in folder.glob("[0-9]*") if path.name.isdigit() and path.is_dir()]


def _begin(folder: Path) -> Path:
    """A folder to write into, beside what was written before."""
    folder.mkdir(exist_ok=True)
    for leftover in folder.glob(".*.tmp"):
        shutil.rmtree(leftover)
    before = latest(folder)
    temporary = folder / f".{0 if before is None else int(before.name) + 1:08}.tmp"
    temporary.mkdir()
    return temporary


def _complete(folder: Path, temporary: Path, rest: dict[str, Any], sums: dict[str, str]) -> None:
    """Write what the first process alone has to write, give the folder its name, and remove the one before."""
    missing = [name for name in sorted(sums) if not (temporary / name).is_file()]
    if missing:
        raise CheckpointError(
            f"--out must be one folder that all processes see; of their files, missing: {', '.join(missing)}"
        )
    before = _checkpoints(folder)
    checkpoint.write(temporary / REST, rest)
    sums = sums | {name: _checksum(temporary / name) for name in (METADATA, REST)}
    with checkpoint.replacing(temporary / CHECKSUMS) as file:
        file.write(json.dumps(sums, indent=1).encode())
    temporary.rename(folder / temporary.stem[1:])
    sync_folder(folder)
    for path in before:
        shutil.rmtree(path, ignore_errors=True)  # what stays counts no more, and the next time removes it


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def _is_as_it_was(path: Path, checksum: str) -> bool:
    return path.is_file() and _checksum(path) == checksum


def _reason(problem: BaseException) -> str:
    """What the system said, if it is behind an error of one of the processes."""
    if isinstance(problem, CheckpointException):
        problem = next(error for error, _ in problem.failures.values())
    return reason(problem)


@contextmanager
def _single_process_is_meant() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
