"""What a process does for a volume: count in a piece, label a block, or try how much memory that takes."""

from __future__ import annotations

import contextlib
import functools
import math
import resource
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr
from torch import Tensor, nn

from segmentation import checkpoint
from segmentation.blocks import Blocks, Window
from segmentation.intensities import Intensities, Question, Tally, count
from segmentation.ledger import Ledger
from segmentation.prediction import Predictor, blend
from segmentation.settings import Settings, build_network
from segmentation.volumes import PIECE, Source, open_volume

# Chunks that are decoded at the same time: what a block needs must not depend on how many it touches.
READING = {"async.concurrency": 2, "threading.max_workers": 2}


class Job(NamedTuple):
    """All that a process must know; it opens the files itself, so they must have these names there too."""

    checkpoint: Path
    image: Path
    out: Path
    blocks: Blocks
    spacing: tuple[float, ...]
    precision: str
    device: str
    output: str
    """Which one it is, of those that were begun under its name."""
    run: str
    """A word of its own for every run: files may have changed since a worker has seen them in another one."""


class Network(NamedTuple):
    """A network, and what it was trained with."""

    settings: Settings
    predictor: Predictor


@functools.lru_cache(maxsize=1)
def _load_network(path: Path, device: str, precision: str, run: str) -> Network:
    """The network with its averaged weights, once per process and run."""
    kept = checkpoint.read(path, ("settings", "weights"), device)
    settings = Settings.from_data(kept["settings"])
    network: nn.Module = build_network(settings)
    checkpoint.fill(network, kept["weights"], path)
    predictor = Predictor(network.to(device), settings.task, precision, sys.maxsize, settings.seen_spacing)
    return Network(settings, predictor)


def _network(job: Job) -> Network:
    return _load_network(job.checkpoint, job.device, job.precision, job.run)


@functools.lru_cache(maxsize=1)
def _open_volume(path: Path, spatial_dims: int, run: str) -> Source:
    return open_volume(path, spatial_dims)


def _source(job: Job) -> Source:
    return _open_volume(job.image, len(job.spacing), job.run)


def count_piece(job: Job, question: Question, window: Window) -> list[Tally]:
    """One pass over one piece."""
    with zarr.config.set(READING):
        return count(_source(job).read(window), question)


def label_block(job: Job, intensities: Intensities, number: int) -> int:
    """Write the labels of a block and mark it as finished; returns its voxels."""
    block = job.blocks[number]
    ledger = Ledger(job.out)
    corner = [part.start for part in block.window]
    with zarr.config.set(READING):
        region = _source(job).read(block.window)

        predictor = _network(job).predictor

        def look(window: Window) -> Tensor:
            part = tuple(slice(w.start - c, w.stop - c) for w, c in zip(window, corner, strict=True))
            return predictor.logits(intensities.apply(region[(slice(None), *part)]), job.spacing)

        labels = blend(look, block)
        ledger.require_identity(job.output)
        ledger.open()[block.owned] = labels
    ledger.finish(number, job.blocks.place(number), job.output)
    return labels.size


def try_tile(job: Job) -> int:
    """Show a tile of noise to the network; returns the bytes that this process has taken at the most."""
    forget_peak()
    settings, predictor = _network(job)
    noise = np.random.default_rng(0).normal(size=(settings.in_channels, *job.blocks.tile)).astype(np.float32)
    predictor.logits(Intensities.of(noise).apply(noise), job.spacing)
    return peak_memory()


def forget_peak() -> None:
    """Begin anew with what this process has taken at the most, where the system can; a worker may live long."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Bytes that this process has taken at the most."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def bytes_of_block(blocks: Blocks, source: Source, classes: int) -> int:
    """What a block adds to a process that has a network and has shown it a tile.

    The image as it is in the file, logits and labels in memory, labels once more while they are packed, and two chunks
    of the file that are being unpacked.
    """
    seen, owned = (
        math.prod(blocks.looked_at),
        math.prod(min(e, n) for e, n in zip(blocks.extent, blocks.size, strict=True)),
    )
    image = seen * source.shape[0] * source.dtype.itemsize
    return image + owned * (4 * classes + 3) + 2 * bytes_of_chunk(source)


def bytes_of_counting(source: Source) -> int:
    """What counting adds to a process: a piece, and the numbers that the values of a channel become."""
    values = max(PIECE, math.prod(source.chunks) * source.shape[0])
    return values * source.dtype.itemsize + values // source.shape[0] * 24 + 2 * bytes_of_chunk(source)


def bytes_of_chunk(source: Source) -> int:
    """A chunk of all channels, unpacked."""
    return math.prod(source.chunks) * source.shape[0] * source.dtype.itemsize


def begun(job: Job, source: Source, checkpoint_hash: str, packed_hash: str | None) -> dict[str, Any]:
    """What must be the same when a run goes on; a packed image is known by its file, and not by what was unpacked."""
    return {
        "checkpoint": checkpoint_hash,
        "image": {"shape": source.shape, "type": str(source.dtype)},
        "contents of the image": source.sample() if packed_hash is None else packed_hash,
        "spacing": job.spacing,
        "precision": job.precision,
        "tile": job.blocks.tile,
    }
