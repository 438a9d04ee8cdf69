"""The processes that train one network together; a single one does everything of it by itself."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class ProcessError(RuntimeError):
    """Another process cannot go on; the message is its own."""


def is_of_all(problem: Exception) -> bool:
    """Whether all processes have left something with an error, this one with this; see :meth:`Processes.together`."""
    return isinstance(problem, ProcessError) or getattr(problem, "_is_of_all", False)


def is_loss_of_another(problem: RuntimeError) -> bool:
    """Whether an error says that another process is gone."""
    return isinstance(problem, dist.DistBackendError) or "gloo/transport" in str(problem)


class _Sum(torch.autograd.Function):
    """Sum over all processes, whose gradient is the sum of the gradients of all processes."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Sum.apply(gradient)


@dataclass(frozen=True)
class Processes:
    """Which of them this one is, and what they do together; every one of them must call what is not marked as local.

    Args:
        rank: of this process, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and prints (local)."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of the processes' tensors of one shape; differentiable."""
        total: Tensor = tensor if self.size == 1 else _Sum.apply(tensor)
        return total

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(int(flag))))

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def first(self, function: Callable[[], T]) -> T:
        """What the first process makes of a function, for all of them.

        Raises:
            ProcessError: it raised something, with its message; in the first process, what it raised.
        """
        result = []
        with self.together():
            if self.is_first:
                result.append(function())
        if self.size > 1:
            result = result or [None]  # type: ignore[list-item]
            dist.broadcast_object_list(result)
        return result[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """If what is done within raises something in one process, all of them leave with an error, and none waits.

        Raises:
            ProcessError: with the message of the first process that could not go on; in that one, what it raised.
        """
        problem: Exception | None = None
        try:
            yield
        except Exception as error:
            problem = error
        messages = self.gather(None if problem is None else str(problem))
        if problem is not None:
            problem._is_of_all = True  # type: ignore[attr-defined]
            raise problem
        for message in messages:
            if message is not None:
                raise ProcessError(message)

    def exit(self, message: str) -> NoReturn:
        """End the program in all processes, with one message."""
        if self.size == 1:
            sys.exit(message)
        if self.is_first:
            print(message, file=sys.stderr, flush=True)
        with suppress(RuntimeError):  # of one that had something else to end for
            dist.barrier()  # who ends sooner has torchrun end the others, which may be before they have said why
        sys.exit(1)

    def abandon(self, message: str) -> NoReturn:
        """End the program in this process (local); the others, which may wait for it, notice that it is gone."""
        if self.size == 1:
            sys.exit(message)
        print(message, file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # to end in order is to part from the others, and they are not there


ALONE = Processes()


@contextmanager
def started(device: torch.device) -> Iterator[Processes]:
    """The processes that torchrun has started, as its environment variables say; without torchrun, one.

    Args:
        device: of this process; gradients are exchanged by NCCL between GPUs, everything else by gloo.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield ALONE
        return
    # torchrun starts processes again with the store that holds the addresses of those that failed.
    store, rank, _ = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"start {restarts()}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    # Not after an error, when nobody may be there to part from.
    yield Processes(rank, size)
    # Where DDP's is the last hold on the group, its threads and this one can wait for each other without end.
    gc.collect()
    dist.destroy_process_group()


def local_rank() -> int:
    """Which process of this machine this one is."""
    return int(os.environ.get("LOCAL_RANK", 0))


def restarts() -> int:
    """How often torchrun has started this process in place of one that failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def run_name() -> str | None:
    """What torchrun calls all starts of one command; None where it was given no name, or there is no torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if name == "none" else name


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Where torch's global random numbers of this process are."""
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(
    states: Sequence[dict[str, Tensor]], device: torch.device, seed: Sequence[int], processes: Processes
) -> None:
    """Go on with random numbers; a process that has none among the states begins with others than all other processes.

    Args:
        states: of :func:`random_state`, by rank.
        device: of this process.
        seed: of those that begin.
        processes: all of them.
    """
    if processes.rank >= len(states):
        torch.manual_seed(int(np.random.SeedSequence((*seed, processes.rank)).generate_state(1, np.uint64)[0]))
        return
    state = states[processes.rank]
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
