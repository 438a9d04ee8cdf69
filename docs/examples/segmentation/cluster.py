"""Many independent pieces of work on the processes of this machine, or of many, through dask."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import dask
from distributed import Client, Future, KilledWorker, LocalCluster, as_completed
from distributed.system import MEMORY_LIMIT

Item = TypeVar("Item")

PATIENCE = 30  # seconds until a scheduler or its first worker must have answered
AHEAD = 2  # pieces of work per worker that are on their way: one to work on, one to go on with
# Results are small, so nothing can be moved to the disk, and a worker that paused would never go on. What is left is
# to end a process that takes more than it may, before the system ends another one.
MEMORY = {f"distributed.worker.memory.{name}": value for name, value in (
    ("target", False), ("spill", False), ("pause", False), ("terminate", 0.95),
)}  # fmt: skip


class ClusterError(RuntimeError):
    """There is nobody to work, or those who do are killed."""


@contextmanager
def connect(scheduler: str | None, workers: int, memory: int | None) -> Iterator[Client]:
    """A client of a running scheduler, or of as many processes of one thread on this machine.

    Args:
        scheduler: address such as ``tcp://host:8786``; None for this machine.
        workers: processes on this machine.
        memory: bytes that each of them may take; None for its part of the machine's.

    Raises:
        ClusterError: nobody answers.
    """
    if scheduler is not None:
        try:
            client = Client(scheduler, timeout=PATIENCE)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ClusterError(f"--scheduler must be the address of a running dask scheduler; {reason}") from error
        with client:
            try:
                client.wait_for_workers(1, timeout=PATIENCE)
            except TimeoutError as error:
                raise ClusterError(f"{scheduler} has had no worker for {PATIENCE} s: start some") from error
            yield client
        return
    with (
        dask.config.set(MEMORY),
        LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            memory_limit=memory or int(0.9 * MEMORY_LIMIT / workers),
            dashboard_address=":0",  # a free port; None would be its usual one, which may be taken
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def memory_of_workers(client: Client) -> int | None:
    """Bytes that the smallest worker may take; None where none of them has a limit."""
    limits = [worker["memory_limit"] for worker in client.scheduler_info(n_workers=-1)["workers"].values()]
    return min((limit for limit in limits if limit), default=None)


def work(
    client: Client, function: Callable[..., Any], common: tuple[Any, ...], items: Iterable[Item]
) -> Iterator[tuple[Item, Future]]:
    """Do ``function(*common, item)`` for all items; gives each with its future as it becomes ready, in no order.

    Only a few are on their way at a time, so it does not matter how many there are. When a process dies, its work is
    given to another.
    """
    run, waiting, running = uuid.uuid4().hex, enumerate(items), as_completed()
    names: dict[str, Item] = {}
    exhausted = False
    while True:
        room = AHEAD * max(1, len(client.ncores())) - len(names)
        while room > 0 and not exhausted:
            number, item = next(waiting, (None, None))
            if number is None:
                exhausted = True
                break
            future = client.submit(function, *common, item, key=f"{function.__name__}-{run}-{number}", pure=False)
            names[future.key] = item  # type: ignore[assignment]
            running.add(future)
            room -= 1
        if not names:
            return
        future = next(running)
        yield names.pop(future.key), future


def result_of(future: Future, what: str) -> Any:
    """What was returned or raised.

    Raises:
        ClusterError: every process that tried it was killed, or cannot import the programs.
    """
    try:
        return future.result()
    except KilledWorker as error:
        raise ClusterError(
            f"{what}: every process that worked on it died, {error.allowed_failures + 1} in all. Most often they took "
            "more than --memory; what dask printed above says more"
        ) from error
    except ModuleNotFoundError as error:
        raise ClusterError(
            f"{error} on a worker; workers need the same packages as this program, and PYTHONPATH=docs/examples"
        ) from error
