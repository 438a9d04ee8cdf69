"""Stopping a program where nothing is half done."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """The program was asked to stop; no error, as KeyboardInterrupt is none."""


class StopRequest:
    """Within ``with``, Ctrl-C and SIGTERM (what batch systems send) wait for :meth:`check`.

    Args:
        impatient: a second one does not wait. Under torchrun it must: Slurm sends SIGTERM to all processes of a job,
            torchrun sends it on to those that it has started, and kills them if they take too long.
        agreed: of several processes, whether any has been asked; see :meth:`segmentation.processes.Processes.any`.
    """

    def __init__(self, impatient: bool = True, agreed: Callable[[bool], bool] = bool) -> None:
        self.asked = False
        self.impatient = impatient
        self.agreed = agreed

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked and self.impatient:
            raise KeyboardInterrupt
        self.asked = True

    def check(self) -> None:
        """Raise :class:`Stopped` if somebody asked for it, in all processes or in none."""
        if self.agreed(self.asked):
            raise Stopped
