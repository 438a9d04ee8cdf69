"""What programs share that write parts of pages from committed results: marked blocks, tables and figures."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

MARKED = re.compile(r"(<!-- (?!end)([a-z -]+) -->\n)(.*?)(<!-- end -->)", flags=re.DOTALL)

# Colours that the colour-blind tell apart (Okabe and Ito, jfly.uni-koeln.de/color).
COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#E69F00")


def blocks_of(page: str) -> set[str]:
    """Names of the marked blocks of a page."""
    return {name for _, name, _, _ in MARKED.findall(page)}


def fill(page: str, block: Callable[[str], str]) -> str:
    """A page with what a function of its name says in every marked block, ``<!-- NAME -->`` to ``<!-- end -->``."""
    return MARKED.sub(lambda found: f"{found[1]}\n{block(found[2])}\n\n{found[4]}", page)


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table; the first column is text."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines))


def figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure that needs no display, and its axes (rows, columns)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made, made.subplots(rows, columns, squeeze=False)


def save(made: Any, path: Path) -> None:
    """Without the date and versions that would change a file whose picture stays."""
    made.savefig(path, dpi=110, metadata={"Software": None})
