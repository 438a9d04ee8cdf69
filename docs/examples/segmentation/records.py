"""What stays of a training for people to look at: TensorBoard, a table of all epochs, pictures."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from segmentation.checkpoint import replacing


class Records:
    """Files in a folder.

    Args:
        folder: ``tensorboard``, ``pictures``, ``history.csv`` and ``history.json`` are made in it.
        steps_done: what TensorBoard has of later steps, from a program that was killed, is no longer shown.
    """

    def __init__(self, folder: Path, steps_done: int) -> None:
        self.folder = folder
        (folder / "pictures").mkdir(exist_ok=True)
        self.writer = SummaryWriter(folder / "tensorboard", purge_step=steps_done)

    def step(self, steps_done: int, losses: Mapping[str, float], learning_rate: float) -> None:
        """Losses of a step."""
        for name, value in losses.items():
            self.writer.add_scalar(f"training/{name}", value, steps_done)
        self.writer.add_scalar("training/learning rate", learning_rate, steps_done)

    def epoch(
        self, steps_done: int, scores: Mapping[str, Any], history: Sequence[Mapping[str, Any]], figure: Figure
    ) -> None:
        """Scores and picture of the last epoch in the history, and the table of all."""
        for name, value in flat(scores).items():
            self.writer.add_scalar(f"validation/{name}", value, steps_done)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        self.writer.add_image("predictions", np.asarray(canvas.buffer_rgba())[..., :3], steps_done, dataformats="HWC")
        self.writer.flush()
        with replacing(self.folder / "pictures" / f"epoch_{len(history):04}.png") as file:
            canvas.print_png(file)
        write_history(self.folder, history)

    def close(self) -> None:
        """Write what is still under way."""
        self.writer.close()


def flat(row: Mapping[str, Any]) -> dict[str, float]:
    """A row whose lists, one number per class, have become columns."""
    columns: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, (list, tuple)):
            columns |= {f"{name} {i}": number for i, number in enumerate(value)}
        else:
            columns[name] = value
    return columns


def write_history(folder: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """All epochs as a table, and as JSON; numbers that do not exist, of absent classes, are empty and null."""
    rows = [{name: None if math.isnan(value) else value for name, value in flat(row).items()} for row in history]
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, rows[0])
    table.writeheader()
    table.writerows(rows)
    for name, content in (("history.csv", text.getvalue()), ("history.json", json.dumps(rows, indent=1) + "\n")):
        with replacing(folder / name) as file:
            file.write(content.encode())
