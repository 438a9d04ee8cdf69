"""Process groups of tests: begun and ended so that no thread waits for another."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def process_group(store: dist.Store | None = None, rank: int = 0, size: int = 1) -> Iterator[None]:  # type: ignore[name-defined]
    """Take part in a group of gloo; of one process where nothing else is said.

    Modules that hold the group must be out of reach when this is left: where one of them is its last hold, the
    interpreter waits, with its lock, for a thread that may need the lock to drop the state of the last collective. What
    an error holds of them is let go here.
    """
    dist.init_process_group("gloo", store=store or dist.HashStore(), rank=rank, world_size=size)
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        gc.collect()
        dist.destroy_process_group()
