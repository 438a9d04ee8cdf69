"""What is finished of a volume that takes long, on the disk: the plan, the first pass, and a mark for every block.

All of it lies in a folder beside the output, ``.<output>.unfinished``, and the output itself is made there; it takes
its name when it is complete. So whatever has that name is whole, and a run that was killed goes on from its folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from segmentation.blocks import Blocks
from segmentation.checkpoint import remove_leftovers, replacing, sync_folder
from segmentation.ome import Place, create_group


class LedgerError(ValueError):
    """An output is there already, or was begun otherwise."""


def hash_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Ledger:
    """The folder of an unfinished output.

    Args:
        out: the output, an OME-Zarr.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out.with_name(f".{out.name}.unfinished")
        self.labels = self.folder / "labels.zarr"
        self.marks = self.folder / "finished"

    @contextmanager
    def held(self) -> Iterator[str]:
        """Make the folder, if there is none to go on with, and keep others out until this is left, or killed.

        Gives a word of its own for every output that is begun, which :meth:`require_identity` compares.

        Raises:
            LedgerError: the output is there already, or another program is making it.
        """
        complete = LedgerError(f"{self.out} is there already and complete: another --out, or remove it")
        taken = LedgerError(f"{self.out} is being made by another program now")
        if self.out.exists() and not self.folder.exists():
            raise complete
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            lock = (self.folder / "lock").open("w")
        except FileNotFoundError:  # the other program has just completed it
            raise taken from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise taken from None
            if self.out.exists():
                if not self.labels.exists():
                    self.clear()  # killed when all was done
                raise complete
            self.marks.mkdir(exist_ok=True)
            identity: str = self.kept("identity", lambda: uuid.uuid4().hex)
            yield identity

    def copy(self, name: str, source: Path) -> tuple[Path, bool]:
        """A file as it was when the output was begun, whatever becomes of the original; and whether it is made now."""
        target = self.folder / name
        if target.exists():
            return target, False
        remove_leftovers(target)
        with replacing(target) as file, source.open("rb") as original:
            shutil.copyfileobj(original, file, 2**20)
        return target, True

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """Plain data under a name: that of an earlier run, or what is made now."""
        path = self.folder / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text())
        data = make()
        with replacing(path) as file:
            file.write(json.dumps(data, indent=2).encode())
        return json.loads(path.read_text())

    def require(self, name: str, data: dict[str, Any]) -> None:
        """Keep data, or compare it with that of an earlier run.

        Raises:
            LedgerError: it is not the same; names what differs.
        """
        now = json.loads(json.dumps(data))
        before = self.kept(name, lambda: now)
        differing = [key for key in now if not _same(before.get(key), now[key])]
        if differing:
            lines = "; ".join(f"{key} was {_short(before.get(key))}, is {_short(now[key])}" for key in differing)
            raise LedgerError(
                f"{self.out} was begun otherwise and cannot be gone on with: {lines}. Another --out begins anew; so "
                f"does removing {self.folder}"
            )

    def create(self, blocks: Blocks, places: Sequence[Place], classes: int) -> None:
        """The output, without contents, if it is not there. A file of it is a block, so a block is written at once."""
        if self.labels.exists():
            return
        partial = self.folder / "labels.partial"
        shutil.rmtree(partial, ignore_errors=True)
        group = create_group(partial, places)
        shards = blocks.extent
        group.create_array(
            "0",
            shape=blocks.size,
            dtype=np.min_scalar_type(classes - 1),
            chunks=blocks.stride,
            shards=shards,
            fill_value=0,
        )
        for path in partial.rglob("*.json"):
            _sync(path, partial)
        os.replace(partial, self.labels)
        sync_folder(self.folder)

    def open(self) -> zarr.Array:
        """The output, to write into."""
        return zarr.open_array(self.labels / "0", mode="r+")

    def finished(self) -> set[int]:
        """Numbers of the blocks whose labels are on the disk."""
        return {int(entry.name) for entry in os.scandir(self.marks)}

    def finish(self, number: int, place: Sequence[int], identity: str) -> None:
        """Mark a block, once its labels are on the disk also if the power fails.

        Raises:
            LedgerError: the output that the block was for is no longer there.
        """
        array = self.open()
        written = self.labels / "0" / array.metadata.encode_chunk_key(tuple(place))
        if written.exists():  # there is none where all labels are 0
            _sync(written, self.labels)
        self.require_identity(identity)
        (self.marks / str(number)).touch()

    def require_identity(self, identity: str) -> None:
        """Whether the output is still that which was begun: a worker may outlive its program.

        Raises:
            LedgerError: it is not.
        """
        path = self.folder / "identity.json"
        if not path.exists() or json.loads(path.read_text()) != identity:
            raise LedgerError(f"{self.out} must be the output that was begun; another one is there, or none")

    def complete(self) -> None:
        """Give the output its name, and remove everything else."""
        for leftover in self.labels.rglob("*.partial"):  # zarr's, of processes that were killed while writing
            leftover.unlink()
        os.replace(self.labels, self.out)
        sync_folder(self.out.parent)
        shutil.rmtree(self.folder, ignore_errors=True)  # whatever stays does no harm

    def clear(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder)


def _sync(path: Path, top: Path) -> None:
    """Bring a file to the disk, and the folders that lead to it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    for folder in path.parents:
        sync_folder(folder)
        if folder == top:
            return


def _same(before: Any, now: Any) -> bool:
    """Equal; what could not be read at one of the times, None in a list, is no difference."""
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return all(None in (a, b) or a == b for a, b in zip(before, now, strict=True))
    return bool(before == now)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
