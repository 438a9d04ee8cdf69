"""Remember what follows from plain numbers alone, such as the geometry of a grid.

A network meets the same few grids at every step. What is derived from them (relations, index tables) is worked out
once and kept, for a bounded number of geometries. Keys are plain integers and devices, never tensors, so an entry
cannot go stale; ``functools.lru_cache`` needs no lock that a fork could leave held, and two threads that miss at once
merely do the same work twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_FAKE = torch._C._TorchDispatchModeKey.FAKE


class Remembered(Generic[P, R]):
    """A pure function of hashable arguments, and its last results.

    A compiler is shown the function itself: its sizes may be symbols, which must not be kept, and its graph holds
    the result anyway. So is a function transform, which wraps the tensors made inside of it, and a fake
    tensor mode, whose tensors are of no use to anyone else. Tensors among what is
    kept are ordinary ones, whatever mode the first caller was in: autograd refuses to save those that are made in
    inference mode.
    """

    def __init__(self, function: Callable[P, R], entries: int) -> None:
        """Remember the last ``entries`` results of ``function``."""
        functools.update_wrapper(self, function)
        self._function = function
        self._kept = functools.lru_cache(entries)(self._outside_of_modes)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The function's result."""
        if torch.compiler.is_compiling() or (
            torch._C._functorch.peek_interpreter_stack() is not None or torch._C._get_dispatch_mode(_FAKE) is not None
        ):
            return self._function(*args, **kwargs)
        return self._kept(*args, **kwargs)  # type: ignore[arg-type]

    def forget(self) -> None:
        """Drop all results."""
        self._kept.cache_clear()

    def _outside_of_modes(self, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), torch.no_grad():
            return self._function(*args, **kwargs)


def remembered(entries: int) -> Callable[[Callable[P, R]], Remembered[P, R]]:
    """Decorate a function to be :class:`Remembered`."""

    def decorate(function: Callable[P, R]) -> Remembered[P, R]:
        return Remembered(function, entries)

    return decorate
