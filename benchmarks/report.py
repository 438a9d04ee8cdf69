"""Write the tables and pictures of docs/benchmarks.md from the committed JSON alone.

``python benchmarks/report.py``: what stands between ``<!-- NAME -->`` and ``<!-- end -->`` is replaced.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "tools"))

import report_plots as plots
import report_tables as tables
from report_tables import BACKWARD, FORWARD, against, share_of_bound, time_of
from reporting import fill
from results_of_runs import Results, load

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
PICTURES = ROOT / "docs" / "images"

COPY = "copy of k and v"


def windowed(results: Results) -> str:
    """Engines on windows."""
    columns = {
        "native": time_of("native"),
        "native / copy": against("native", COPY),
        "of bound": share_of_bound("native"),
        "tiled / native": against("tiled", "native"),
        "masked matrix / native": against("masked matrix", "native"),
    }
    tables_of = {way: tables.pivot(results, "grouping, ", columns, (way,)) for way in (FORWARD, BACKWARD)}
    return "\n\n".join(f"{way}:\n\n{table}" for way, table in tables_of.items() if table)


def compiled(results: Results) -> str:
    """What a compiler makes of it."""
    columns = {
        "tiled, compiled / not": against("tiled, torch.compile", "tiled"),
        "masked matrix, compiled / not": against("masked matrix, torch.compile", "masked matrix"),
    }
    return tables.pivot(results, "compiled grouping, ", columns)


def compactness_of_layers(results: Results) -> str:
    """With over without."""
    kinds = ("dense", "sparse", "deformable", "windowed self-attention")
    columns = {kind: against(f"{kind}, compactness", kind) for kind in kinds}
    return tables.pivot(results, "compactness, layers, ", columns, (BACKWARD,))


def compactness_of_calls(results: Results) -> str:
    """With over without, by how local it makes the memberships."""
    columns = {name: against(name, "without") for name in ("beta 0.1", "beta 2", "beta 10")}
    return tables.pivot(results, "compactness, dense calls, ", columns, (BACKWARD,))


def curves(results: Results, what: str) -> str:
    """Seconds and memory over the side of the grid."""
    parts = []
    for ndim in (2, 3):
        title = f"curve, {what}, {ndim}-D"
        if not tables.sides_of(results, title):
            continue
        for way in (FORWARD, BACKWARD):
            parts += [f"{what}, {ndim}-D, {way}:", tables.curve(results, title, way), tables.ends(results, title, way)]
    return "\n\n".join(part for part in parts if part)


def crossings(results: Results) -> str:
    """Where sparse overtakes dense."""
    pairs = {"calls": ("dense, fused", "sparse, native"), "layers": ("dense", "sparse")}
    lines = [
        tables.crossing(results, f"curve, {what}, {ndim}-D", way, *names)
        for what, names in pairs.items()
        for ndim in (2, 3)
        for way in (FORWARD, BACKWARD)
    ]
    return "\n".join(line for line in lines if line)


NOT_YET = "Not recorded yet."

# By name, the subject that a block is about and what it says of it.
BLOCKS: dict[str, tuple[str, Callable[[Results], str]]] = {
    "rotation": ("rotation", lambda r: tables.fulls(r, "rotation")),
    "windowed grouping": ("grouping", windowed),
    "compiled grouping": ("grouping", compiled),
    "dilation": ("grouping", lambda r: tables.fulls(r, "dilated")),
    "dense grouping": ("grouping", lambda r: tables.fulls(r, "dense")),
    "self-attention": ("grouping", lambda r: tables.fulls(r, "windowed self")),
    "layers": ("layers", lambda r: tables.fulls(r, "layers")),
    "compactness of layers": ("compactness", compactness_of_layers),
    "compactness of calls": ("compactness", compactness_of_calls),
    "networks": ("backbones", lambda r: tables.fulls(r, "")),
    "curves of calls": ("curves", lambda r: curves(r, "calls")),
    "curves of layers": ("curves", lambda r: curves(r, "layers")),
    "crossings": ("curves", crossings),
    "first call": ("first_call", tables.first_calls),
}
OF_ALL = {"environment": tables.environment, "losses": tables.losses}


def block(name: str, results: dict[str, Results]) -> str:
    """What stands between a pair of markers."""
    if name in OF_ALL:
        return OF_ALL[name](results)
    subject, write = BLOCKS[name]
    return (write(results[subject]) if subject in results else "") or NOT_YET


def render(page: str, results: dict[str, Results]) -> str:
    """The page with every marked block as the results have it."""
    return fill(page, lambda name: block(name, results))


def draw(results: dict[str, Results], folder: Path) -> list[Path]:
    """Pictures of what was recorded; where they lie."""
    made: dict[str, tuple[str, Callable[[Results, Path], None]]] = {
        "benchmarks-rotation.png": ("rotation", lambda r, path: plots.bars(r, r.cases()[0], path)),
        "benchmarks-calls.png": ("curves", lambda r, path: plots.curves(r, "calls", path)),
        "benchmarks-layers.png": ("curves", lambda r, path: plots.curves(r, "layers", path)),
    }
    drawn = []
    for name, (subject, make) in made.items():
        if subject in results:
            make(results[subject], folder / name)
            drawn += [folder / name] * (folder / name).exists()
    return drawn


def main() -> None:
    results = load()
    PAGE.write_text(render(PAGE.read_text(), results))
    draw(results, PICTURES)


if __name__ == "__main__":
    main()
