"""What calls of the GPU kernels cost in Python: processor time until all is launched, with the launches left out.

    PYTHONPATH=packages/rotary-spatial-embeddings/src:packages/spatial-grouping-attention/src \
        python benchmarks/host_report.py

Needs triton, but no GPU: tensors are on the CPU, and nothing is compiled or computed. One thread, the best of a hundred
samples.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Hashable
from typing import Any
from unittest import mock

import torch
from RoSE import kernels
from RoSE.kernels import support
from spatial_grouping_attention import Neighbourhood, functional
from spatial_grouping_attention.backends import triton as windows
from spatial_grouping_attention.backends.deformable import lattice
from spatial_grouping_attention.backends.deformable.selection import TRITON
from spatial_grouping_attention.backends.triton import launch
from torch import Tensor
from triton.runtime.jit import JITFunction

HEADS, CHANNELS = 4, 32
REPEATS, BEST_OF = 30, 100


class FirstPlans:
    """Stands in for the choice of a plan: the first one, looked up as a chosen one is."""

    def __init__(self) -> None:
        self.known: dict[Hashable, Any] = {}

    def __call__(self, key: Hashable, candidates: Callable[[], list[Any]], run: Callable[[Any], Any]) -> Any:
        if key not in self.known:
            self.known[key] = candidates()[0]
        return run(self.known[key])


def nothing(*given: Any, **options: Any) -> tuple[()]:
    """Stands in for launches, and for reasons against them; a mock of unittest's would be measured, too."""
    return ()


def rows(number: int) -> Tensor:
    """As projections leave them."""
    return torch.randn(1, number, HEADS, CHANNELS).transpose(1, 2).requires_grad_()


def cases() -> dict[str, tuple[Callable[[], Tensor], list[Tensor]]]:
    """Calls, and what gradients are taken for."""
    relation, grid = Neighbourhood((8, 8), (4, 4), 2, 3, 1, 3), lattice((4, 4))
    q, k, v = rows(16), rows(64), rows(64)
    positions, freqs = torch.rand(64, 2), torch.rand(HEADS, 8, 2).requires_grad_()
    places, shares = torch.rand(1, HEADS, 64, 9, 2), torch.rand(1, HEADS, 64, 9)
    return {
        "rotation of one tensor": (lambda: kernels.rotate_positions(k, None, positions, freqs)[0], [k, freqs]),
        "grouping": (lambda: functional.grouping_attention(q, k, v, relation, backend="triton")[0], [q, k, v]),
        "products at points": (lambda: TRITON.products(q, k, places, grid), [q, k]),
        "relative sums at points": (lambda: TRITON.relative_sums(shares, places, v, grid)[0], [v]),
    }


def differentiated(call: Callable[[], Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """A call and its gradients."""
    return torch.autograd.grad(call().sum(), leaves)


def microseconds(call: Callable[[], Any]) -> float:
    """Of a call, at best."""
    call()
    best = float("inf")
    for _ in range(BEST_OF):
        start = time.process_time()
        for _ in range(REPEATS):
            call()
        best = min(best, time.process_time() - start)
    return 1e6 * best / REPEATS


def main() -> None:
    torch.set_num_threads(1)
    print("| call | forward, us | with backward, us |\n|---|---|---|")
    with (
        mock.patch.object(JITFunction, "run", nothing),
        mock.patch.object(support, "_refusals_of_device", nothing),
        mock.patch.object(windows, "refusals_of_device", nothing),
        mock.patch.object(launch, "choose", FirstPlans()),
    ):
        for name, (call, leaves) in cases().items():
            with torch.no_grad():
                forward = microseconds(call)
            both = microseconds(functools.partial(differentiated, call, leaves))
            print(f"| {name} | {forward:.0f} | {both:.0f} |", flush=True)


if __name__ == "__main__":
    main()
