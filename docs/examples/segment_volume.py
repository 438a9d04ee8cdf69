"""Segment an image that is larger than memory, block by block, with a network of ``train_segmentation.py``.

    python docs/examples/segment_volume.py --checkpoint best.pt --image brain.ome.zarr --out labels.ome.zarr

See docs/larger-than-memory.md.
"""

from __future__ import annotations

import argparse
import errno
import math
import os
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from dask.utils import format_bytes, parse_bytes
from distributed import Client
from segmentation import checkpoint
from segmentation.axes import FileError
from segmentation.blocks import Blocks, grow
from segmentation.checkpoint import CheckpointError
from segmentation.cluster import ClusterError, connect, memory_of_workers, result_of, work
from segmentation.intensities import Intensities, Search, Tally
from segmentation.ledger import Ledger, LedgerError, hash_of
from segmentation.prediction import largest_piece, tile_of
from segmentation.settings import Settings, SettingsError
from segmentation.volume_jobs import Job, begun, bytes_of_block, bytes_of_counting, count_piece, label_block, try_tile
from segmentation.volumes import Source, is_compressed, open_volume, unpack
from tqdm import tqdm

BLOCK = 2**23  # voxels of a block at the most: with memory for more, a kill would only cost more
USABLE = 0.9  # of the memory that a worker may take
SHOWN = 10  # of the problems with blocks


class Result(NamedTuple):
    """What a run has done; a run that goes on counts only what it has added."""

    blocks: int
    voxels: int
    counting: float
    """Seconds of the first pass."""
    labelling: float
    """Seconds of the second."""


def main(arguments: Sequence[str] | None = None) -> Result:
    """Run the program."""
    options = parse(arguments)
    ledger = Ledger(options.out)
    try:
        return run(options, ledger)
    except (CheckpointError, LedgerError, SettingsError) as problem:
        sys.exit(f"{Path(__file__).name}: {problem}")
    except (ClusterError, FileError, OSError) as problem:
        sys.exit(f"{Path(__file__).name}: {explained(problem)}{how_far(ledger)}")
    except KeyboardInterrupt:
        print(f"{Path(__file__).name}: stopped{how_far(ledger)}", file=sys.stderr)
        sys.exit(130)


def run(options: argparse.Namespace, ledger: Ledger) -> Result:
    """Segment, if the network can."""
    settings_of(options.checkpoint)
    with ledger.held() as identity:
        return segment(options, ledger, identity)


def settings_of(path: Path) -> Settings:
    """Those of a checkpoint of a semantic network."""
    settings = Settings.from_data(checkpoint.read(path, ("settings", "weights"))["settings"])
    if settings.task != "semantic":
        raise SettingsError(
            f"the task of {path} must be semantic; got {settings.task}: which parts in two blocks are one object does "
            "not follow from blocks. predict_segmentation.py finds objects in images that fit in memory"
        )
    return settings


def segment(options: argparse.Namespace, ledger: Ledger, identity: str) -> Result:
    """Plan, count, label, into an output that is nobody else's."""
    # A training may go on and write a better network while blocks are labelled with this one.
    network, is_new = ledger.copy("network.pt", options.checkpoint)
    settings = settings_of(network)
    source = open_source(options.image, ledger, settings)
    job = make_job(options, settings, source, network, identity)
    packed = hash_of(options.image) if is_compressed(options.image) else None
    ledger.require("begun", begun(job, source, hash_of(network if is_new else options.checkpoint), packed))
    with connect(options.scheduler, options.workers, options.memory) as client:
        job = plan(client, job, source, ledger, options.memory, settings.num_classes)
        ledger.create(job.blocks, source.places, settings.num_classes)
        start = time.perf_counter()
        intensities = Intensities(*ledger.kept("intensities", lambda: count(client, job, source)))
        counted = time.perf_counter()
        blocks, voxels = label(client, job, intensities, ledger)
    result = Result(blocks, voxels, counted - start, time.perf_counter() - counted)
    ledger.complete()
    rate = voxels / max(result.labelling, 1e-9)
    print(f"{options.out}: {blocks} of {len(job.blocks)} blocks in {result.labelling:.0f} s, {rate:.0f} voxels/s")
    return result


def open_source(path: Path, ledger: Ledger, settings: Settings) -> Source:
    """The image, unpacked first if it is a compressed NIfTI."""
    if is_compressed(path):
        unpacked = ledger.folder / "image.nii"
        unpack(path, unpacked)
        path = unpacked
    source = open_volume(path.absolute(), settings.spatial_dims)
    if source.shape[0] != settings.in_channels:
        raise FileError.of(path, f"{settings.in_channels} channels, as in training", str(source.shape[0]))
    return source


def make_job(options: argparse.Namespace, settings: Settings, source: Source, network: Path, identity: str) -> Job:
    """What processes must know; blocks are of one tile yet."""
    spacing = options.spacing or source.layout.spacing or settings.given_spacing or settings.spacing
    if len(spacing) != settings.spatial_dims:
        raise SettingsError(f"spacing must be {settings.spatial_dims} numbers; got {tuple(spacing)}")
    size = source.shape[1:]
    largest = largest_piece(settings.crop, options.largest)
    tile = tile_of(size, spacing, largest, settings.seen_spacing)
    precision = settings.precision if options.device.startswith("cuda") else "float32"
    blocks = Blocks(size, tile, (1,) * len(size))
    files = network.absolute(), source.path, options.out.absolute()
    return Job(*files, blocks, tuple(spacing), precision, options.device, identity, uuid.uuid4().hex)


def plan(client: Client, job: Job, source: Source, ledger: Ledger, memory: int | None, classes: int) -> Job:
    """Blocks that fit; those of an earlier run if there was one.

    Raises:
        ClusterError: they do not fit.
    """
    ((_, tried),) = work(client, try_tile, (), [job])
    taken = result_of(tried, "a tile by itself")
    limit = memory or memory_of_workers(client) or math.inf

    def needed(blocks: Blocks) -> int:
        return taken + max(bytes_of_block(blocks, source, classes), bytes_of_counting(source))

    def fits(blocks: Blocks) -> bool:
        return needed(blocks) <= USABLE * limit and math.prod(blocks.extent) <= BLOCK

    def require(blocks: Blocks) -> None:
        if needed(blocks) > USABLE * limit:
            raise ClusterError(
                f"--memory must be at least {format_bytes(math.ceil(needed(blocks) / USABLE))} per worker, for blocks "
                f"of {' x '.join(map(str, blocks.extent))} voxels ({format_bytes(taken)} of it for a process with the "
                f"network and one tile); got {format_bytes(int(limit))}"
            )

    def chosen() -> Sequence[int]:
        require(job.blocks)
        return (grow(job.blocks.size, job.blocks.tile, job.spacing, fits) or job.blocks).per_block

    blocks = Blocks(job.blocks.size, job.blocks.tile, tuple(ledger.kept("blocks", chosen)))
    require(blocks)
    voxels = " x ".join(map(str, blocks.size))
    tqdm.write(
        f"{voxels} voxels, {len(blocks)} blocks of {' x '.join(map(str, blocks.extent))}, tiles of "
        f"{' x '.join(map(str, blocks.tile))}; {format_bytes(needed(blocks))} per worker"
    )
    return job._replace(blocks=blocks)


def count(client: Client, job: Job, source: Source) -> Intensities:
    """The first pass: what normalisation must know of the whole image.

    Raises:
        FileError: pieces that cannot be read, all of them: every label would depend on them.
    """
    search = Search(source.dtype, source.shape[0], math.prod(source.shape[1:]))

    def passes() -> Iterator[Iterator[list[Tally]]]:
        for question in search.questions():
            yield tallies(question.level, work(client, count_piece, (job, question), source.pieces()))

    def tallies(level: int, done) -> Iterator[list[Tally]]:
        problems = []
        name = f"counting {level + 1} of {search.passes}"
        for window, future in tqdm(done, name, sum(1 for _ in source.pieces()), unit="piece", disable=None):
            try:
                tally = result_of(future, f"voxels {window}")
            except FileError as problem:
                problems.append(str(problem))
                continue
            if unreal := sum(channel.unreal for channel in tally):
                raise FileError.of(source.path, "finite numbers", f"{unreal} that are not, in voxels {window}")
            yield tally
        if problems:
            raise FileError("\n".join(shortened(problems)))

    return search.run(passes())


def label(client: Client, job: Job, intensities: Intensities, ledger: Ledger) -> tuple[int, int]:
    """The second pass: all blocks that are not finished; returns how many, and their voxels.

    Raises:
        FileError: blocks that cannot be read; all others are finished.
    """
    finished = ledger.finished()
    missing = (number for number in range(len(job.blocks)) if number not in finished)
    blocks, voxels, problems = 0, 0, []
    with tqdm(total=len(job.blocks), initial=len(finished), unit="block", disable=None) as bar:
        for number, future in work(client, label_block, (job, intensities), missing):
            try:
                voxels += result_of(future, f"block {number}")
            except FileError as problem:
                problems.append(f"block {number}: {problem}")
                continue
            blocks += 1
            bar.update()
    if problems:
        raise FileError("\n".join(shortened(problems)))
    return blocks, voxels


def shortened(problems: Sequence[str]) -> list[str]:
    """The first of them, and how many more there are."""
    more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return [*problems[:SHOWN], *more]


def explained(problem: Exception) -> str:
    """What went wrong, and what to do where that is not said yet."""
    if isinstance(problem, OSError) and problem.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{os.strerror(problem.errno)}: make room and start again"
    return str(problem)


def how_far(ledger: Ledger) -> str:
    """How many blocks the disk has; the end of a message."""
    done = len(ledger.finished()) if ledger.marks.exists() else 0
    return f"\n{done} blocks are finished; the same command goes on with the others" if done else ""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options; ends the program with a message where they make no sense."""
    parser = argparse.ArgumentParser(description="Segment an image that is larger than memory.")
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="best.pt of a training for classes")
    add("--image", type=Path, required=True, help="OME-Zarr (a folder) or NIfTI")
    add("--out", type=Path, required=True, help="OME-Zarr to write; the same command goes on with an unfinished one")
    add("--workers", type=int, help="processes of one thread (default: as many as processors, 1 with a GPU)")
    add("--scheduler", help="address of a running dask scheduler, whose workers are used instead of processes here")
    add("--memory", type=parse_bytes, help="that a worker may take, such as 2GB (default: its part of the machine's)")
    add("--spacing", type=float, nargs="+", help="distance of voxels along every axis (default: as the file says, or "
        "as in training where it does not)")  # fmt: skip
    add("--largest", type=int, help="voxels that the network sees at once (default: those of four crops of training)")
    add("--device", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.workers = options.workers or (1 if options.device.startswith("cuda") else os.cpu_count())
    numbers = (options.largest, options.workers, options.memory, *(options.spacing or ()))
    if not all(number > 0 for number in numbers if number is not None):
        parser.error("--workers, --memory, --spacing and --largest must be positive")
    if options.out.suffix != ".zarr":
        parser.error(f"--out must end in .ome.zarr or .zarr; got {options.out}")
    return options


if __name__ == "__main__":
    main()
