"""Remember what follows from geometry alone.

A network meets the same few grids at every step. What is derived from them (relations, index tables) is worked out
once and kept, for a bounded number of geometries. Keys are plain integers and devices, never tensors, so an entry
cannot go stale; ``functools.lru_cache`` needs no lock that a fork could leave held, and two threads that miss at once
merely do the same work twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def remembered(entries: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Remember the last ``entries`` results of a pure function of hashable arguments.

    A compiler is shown the function itself: its sizes may be symbols, which must not be kept, and its graph holds
    the result anyway. Tensors among the results are ordinary ones, whatever mode the first caller was in: autograd
    refuses to save those that are made in inference mode.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        def outside_of_modes(*args: P.args, **kwargs: P.kwargs) -> R:
            with torch.inference_mode(False), torch.no_grad():
                return function(*args, **kwargs)

        kept = functools.lru_cache(entries)(outside_of_modes)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling():
                return function(*args, **kwargs)
            return kept(*args, **kwargs)

        return call

    return decorate
