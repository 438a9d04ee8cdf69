"""Trust in kernels that were never seen to run on the machine at hand.

A kernel that compiles may still compute something else than it should: another compiler, another GPU, another driver.
Before kernels serve calls that did not ask for them, they compute a small problem whose answer is known, once per
process and device. If the answer is wrong, or there is none, a warning says so and the plain form serves instead.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ..tracing import is_exporting


class SelfCheck:
    """Whether kernels passed their check on a device; asked as often as you like, checked once.

    The check runs in a thread of its own: there is no inference mode, autocast, function transform, tracing or default
    device there, whatever the caller is in the middle of. It must call the kernels directly, not through code that
    asks this object.

    While a CUDA graph is being captured nothing may be launched beside it: the answer is then no, and is not
    remembered; nor is it while ``torch.export`` traces, which puts other functions in Python's own places, and kernels
    that are compiled for the first time would meet them. To ``torch.compile`` the answer is a constant, found while it
    traces.

    Args:
        name: Of the kernels, for the warning: "the rotation kernels of RoSE".
        check: Computes and compares on a device; returns if all is well and raises anything if not (see
            :func:`require_agreement`).
        fallback: What serves instead, for the warning: "plain PyTorch".
    """

    def __init__(self, name: str, check: Callable[[torch.device], object], fallback: str) -> None:
        self.name = name
        self.check = check
        self.fallback = fallback
        self._answers: dict[tuple[str, int | None], bool] = {}
        self._lock = threading.Lock()

    def passed(self, device: torch.device) -> bool:
        """Whether the kernels may serve on ``device``.

        Warns:
            RuntimeWarning: Once per process and device, if they may not.
        """
        index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
        key = (device.type, index)
        answer = self._answers.get(key)
        if answer is not None:
            return answer
        if is_exporting() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return False
        with self._lock:
            if key not in self._answers:
                failure = self._run(torch.device(device.type, index))
                self._answers[key] = failure is None
                if failure is not None:
                    warnings.warn(
                        f"{self.name} failed their self-check on {device} and are not used there; {self.fallback} "
                        f"serves instead (slower, same results). {type(failure).__name__}: {failure}",
                        RuntimeWarning,
                        stacklevel=3,
                    )
            return self._answers[key]

    # The compiler calls this while it traces, and takes the answer for a constant. (Set here because the decorator
    # that does it, torch.compiler.assume_constant_result, imports the whole compiler.)
    passed._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _run(self, device: torch.device) -> BaseException | None:
        failures: list[BaseException] = []

        def run() -> None:
            try:
                self.check(device)
            except BaseException as failure:  # a compiler may exit, a driver may do anything
                failures.append(failure)

        # Reading an answer waits for the GPU, which a caller who debugs such waits may have forbidden.
        waits = torch.cuda.get_sync_debug_mode() if device.type == "cuda" else 0
        if waits:
            torch.cuda.set_sync_debug_mode(0)
        try:
            thread = threading.Thread(target=run, name="self-check of kernels")
            thread.start()
            thread.join()
        finally:
            if waits:
                torch.cuda.set_sync_debug_mode(waits)
        return failures[0] if failures else None


def require_agreement(name: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Compare in float64: the largest difference may be ``tolerance`` of the largest expected value.

    Raises:
        ArithmeticError: It is more, or not a number.
    """
    if got.shape != expected.shape:
        raise ArithmeticError(f"{name} has shape {tuple(got.shape)} instead of {tuple(expected.shape)}")
    got, expected = got.detach().double(), expected.detach().double()
    error, size = float((got - expected).abs().max()), float(expected.abs().max())
    if not error <= tolerance * size:
        raise ArithmeticError(f"{name} is off by {error:.3g}, where the largest value is {size:.3g}")
