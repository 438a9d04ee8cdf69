"""What tests on a GPU share: modules brought there, gradients compared, and steps that are captured."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from grouping_cases import assert_near
from torch import Tensor

DEVICE = "cuda"


def on_device(module: torch.nn.Module, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return copy.deepcopy(module).to(DEVICE, dtype)


def assert_gradients_near(got: list[Tensor], want: list[Tensor], tolerance: float, names: list[str]) -> None:
    """A result and its gradients; of these the largest of all is the measure."""
    largest = max(gradient.abs().max().item() for gradient in want[1:])
    for mine, theirs, name in zip(got, want, names, strict=True):
        assert_near(mine.cpu(), theirs.cpu(), tolerance, name, size=1.0 if mine is got[0] else largest)


def assert_capturable(step: Callable[[], list[Tensor]], x: Tensor, other: Tensor, names: list[str]) -> None:
    """A replay on another input is what the step gives there, gradients included.

    Args:
        step: what is captured: a result, and gradients.
        x: its input, changed in place.
        other: the other input.
        names: of what it returns.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            results = step()
        x.copy_(other)
        graph.replay()
        torch.cuda.synchronize()
        assert_gradients_near(results, step(), 1e-5, names)
