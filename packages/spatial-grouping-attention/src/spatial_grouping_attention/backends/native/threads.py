"""Threads of our own for kernels that leave Python's lock alone.

Numba's own threading layers abort on calls from two threads at once, or after a fork. Here whoever calls works too, and
helpers only take what is left, so calls may come from anywhere: none waits for a helper that has not started.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class _Helpers:
    """The threads of this process, as many as were ever asked for at once."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start anew: a forked process has the objects of its parent's threads, but not the threads."""
        self.lock = threading.Lock()
        self.pool: ThreadPoolExecutor | None = None
        self.size = 0

    def get(self, size: int) -> ThreadPoolExecutor:
        """At least so many threads."""
        with self.lock:
            if self.pool is None or self.size < size:
                if self.pool is not None:
                    self.pool.shutdown(wait=False)  # what it has begun is finished
                self.pool, self.size = ThreadPoolExecutor(size, "spatial_grouping_attention"), size
            return self.pool

    def submit(self, count: int, function: Callable[[], None]) -> list[Any]:
        """Let ``count`` threads call a function."""
        while True:
            pool = self.get(count)
            try:
                return [pool.submit(function) for _ in range(count)]
            except RuntimeError:  # between the two lines, another caller replaced it by a larger one
                if pool is self.pool:
                    return []  # the interpreter is shutting down: the caller works alone


_HELPERS = _Helpers()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_HELPERS.forget)


def for_each(worker: Callable[[], Callable[[Any], int]], items: Sequence[Any], threads: int) -> int:
    """Work through items in any order, in several threads.

    Args:
        worker: called once by every thread; what it returns is called for every item.
        items: of work.
        threads: how many, with the one that calls.

    Returns:
        The sum of the items' results.
    """
    threads = min(threads, len(items))
    if threads <= 1:
        return sum(map(worker(), items))
    numbers = itertools.count()
    results = [0] * len(items)

    def work() -> None:
        number = next(numbers)  # one thread at a time counts
        if number < len(items):
            function = worker()
            while number < len(items):
                results[number] = function(items[number])
                number = next(numbers)

    helpers = _HELPERS.submit(threads - 1, work)
    work()
    for helper in helpers:
        if not helper.cancel():
            helper.result()
    return sum(results)
