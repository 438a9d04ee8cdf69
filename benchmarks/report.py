"""Write the tables and pictures of docs/benchmarks.md from the committed JSON alone.

``python benchmarks/report.py``: what stands between ``<!-- NAME -->`` and ``<!-- end -->`` is replaced.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import report_plots as plots
import report_tables as tables
from report_tables import BACKWARD, FORWARD, against, share_of_bound, time_of
from results_of_runs import Results, load

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
PICTURES = ROOT / "docs" / "images"

MARKED = re.compile(r"(<!-- (?!end)([a-z -]+) -->\n)(.*?)(<!-- end -->)", flags=re.DOTALL)

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
    return "\n\n".join(
        f"{way}:\n\n{tables.pivot(results, 'grouping, ', columns, (way,))}" for way in (FORWARD, BACKWARD)
    )


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
        for way in (FORWARD, BACKWARD):
            parts += [f"{what}, {ndim}-D, {way}:", tables.curve(results, title, way), tables.ends(results, title, way)]
    return "\n\n".join(part for part in parts if part)


def crossings(results: Results) -> str:
    """Where sparse overtakes dense."""
    pairs = {"calls": ("dense, fused", "sparse, native"), "layers": ("dense", "sparse")}
    return "\n".join(
        tables.crossing(results, f"curve, {what}, {ndim}-D", way, *names)
        for what, names in pairs.items()
        for ndim in (2, 3)
        for way in (FORWARD, BACKWARD)
    )


BLOCKS: dict[str, Callable[[dict[str, Results]], str]] = {
    "environment": tables.environment,
    "losses": tables.losses,
    "rotation": lambda r: tables.fulls(r["rotation"], "rotation"),
    "windowed grouping": lambda r: windowed(r["grouping"]),
    "compiled grouping": lambda r: compiled(r["grouping"]),
    "dilation": lambda r: tables.fulls(r["grouping"], "dilated"),
    "dense grouping": lambda r: tables.fulls(r["grouping"], "dense"),
    "self-attention": lambda r: tables.fulls(r["grouping"], "windowed self"),
    "layers": lambda r: tables.fulls(r["layers"], "layers"),
    "compactness of layers": lambda r: compactness_of_layers(r["compactness"]),
    "compactness of calls": lambda r: compactness_of_calls(r["compactness"]),
    "networks": lambda r: tables.fulls(r["backbones"], ""),
    "curves of calls": lambda r: curves(r["curves"], "calls"),
    "curves of layers": lambda r: curves(r["curves"], "layers"),
    "crossings": lambda r: crossings(r["curves"]),
    "first call": lambda r: tables.first_calls(r["first_call"]),
}


def render(page: str, results: dict[str, Results]) -> str:
    """The page with every marked block as the results have it."""
    return MARKED.sub(lambda found: f"{found[1]}\n{BLOCKS[found[2]](results)}\n\n{found[4]}", page)


def draw(results: dict[str, Results], folder: Path) -> list[Path]:
    """All pictures; where they lie."""
    made = {
        "benchmarks-rotation.png": lambda path: plots.bars(results["rotation"], results["rotation"].cases()[0], path),
        "benchmarks-calls.png": lambda path: plots.curves(results["curves"], "calls", path),
        "benchmarks-layers.png": lambda path: plots.curves(results["curves"], "layers", path),
    }
    for name, make in made.items():
        make(folder / name)
    return [folder / name for name in made]


def main() -> None:
    results = load()
    PAGE.write_text(render(PAGE.read_text(), results))
    draw(results, PICTURES)


if __name__ == "__main__":
    main()
