"""Pictures, from results alone."""

from __future__ import annotations

from pathlib import Path

from report_tables import BACKWARD, FORWARD, SHORT, sides_of
from reporting import COLOURS, figure, save
from results_of_runs import Results


def curves(results: Results, what: str, path: Path) -> None:
    """Time and memory over the number of tokens; columns are axes of the grid, dashed lines forward alone."""
    titles = [title for ndim in (2, 3) if sides_of(results, title := f"curve, {what}, {ndim}-D")]
    if not titles:
        return
    made, axes = figure(2, len(titles), 5 * len(titles) + 1, 7.5)
    for column, title in enumerate(titles):
        ndim, sides = int(title[-3]), sorted(set(sides_of(results, title)))
        for colour, name in zip(COLOURS, results.names(f"{title}, side {sides[0]}"), strict=False):
            labelled = False
            for way, dashes in ((BACKWARD, "-"), (FORWARD, "--")):
                found = [(s, results.find(f"{title}, side {s}", way, name)) for s in sides]
                rows = [(s**ndim, row) for s, row in found if row]
                if not rows:
                    continue
                style = {"color": colour, "linestyle": dashes, "marker": "o", "markersize": 3}
                style["label"] = None if labelled else name
                labelled = True
                tokens = [n for n, _ in rows]
                axes[0][column].loglog(tokens, [row.median for _, row in rows], **style)
                axes[1][column].loglog(tokens, [row.info["peak_bytes"] / 1e6 for _, row in rows], **style)
        axes[0][column].set(title=f"{what}, {ndim}-D", xlabel="fine tokens", ylabel="seconds")
        axes[1][column].set(xlabel="fine tokens", ylabel="MB beyond the operands")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    axes[0][0].legend(title="solid: with backward, dashed: forward", fontsize=8, title_fontsize=8)
    save(made, path)


def bars(results: Results, case: str, path: Path) -> None:
    """The ratios of a case's entries to its reference, with their quartiles."""
    ways = results.ways(case)
    made, axes = figure(1, len(ways), 10, 0.32 * len(results.names(case)) + 1.2)
    for axis, way in zip(axes[0], ways, strict=True):
        rows = [r for r in results.rows if (r.case, r.way) == (case, way) and not r.info["yardstick"]]
        ratios = [results.ratio(row) for row in rows]
        middle = [m for m, _, _ in ratios]
        spread = [[m - low for m, low, _ in ratios], [high - m for m, _, high in ratios]]
        colours = [COLOURS[3] if row.is_peer else COLOURS[0] for row in rows]
        axis.barh([row.name for row in rows], middle, xerr=spread, color=colours)
        axis.invert_yaxis()
        axis.set(title=SHORT[way], xlabel=f"time / {rows[0].info['reference']}")
    for axis in axes[0][1:]:
        axis.set_yticklabels([])
    save(made, path)
