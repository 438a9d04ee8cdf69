"""Tables in Markdown, from results alone: means and standard deviations over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from frequencies import RESCALED
from networks import NETWORKS, OTSU
from positions import FREQUENCIES, PHYSICAL, POSITIONS, RESAMPLED
from reporting import markdown
from runs import Run

# Results by experiment, data and method, then by seed.
Results = Mapping[tuple[str, str, str], Mapping[int, dict[str, Any]]]

ORDER = {  # of methods
    "masks": [*NETWORKS, OTSU],
    "spacing": [*POSITIONS, *PHYSICAL, *RESAMPLED],
    "frequencies": [*FREQUENCIES, RESCALED],
}

NOT_YET = "Not recorded yet."

# The first two of each differ in how they downsample, and in widths, which make parameters equal; then the U-Net.
PAIRS = {
    "native masks - bilinear": ("grouping, native masks", "uniform twin, bilinear"),
    "fused - FPN": ("grouping, fused (nano)", "uniform twin, FPN"),
    "fused - U-Net": ("grouping, fused (nano)", "U-Net"),
}


def by_method(results: Mapping[Run, dict[str, Any]]) -> Results:
    """Results, sorted into their methods."""
    sorted_: dict[tuple[str, str, str], dict[int, dict[str, Any]]] = {}
    for run, result in sorted(results.items(), key=lambda item: item[0].seed):
        sorted_.setdefault((run.experiment, run.data, run.method), {})[run.seed] = result
    return sorted_


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard deviation."""
    if len(values) < 2:
        return f"{values[0]:{sign}.1f}" if values else ""
    return f"{mean(values):{sign}.1f} ± {stdev(values):.1f}"


def methods_of(results: Results, experiment: str, data: Sequence[str]) -> list[str]:
    """In the order in which they are defined."""
    done = {m for e, d, m in results if e == experiment and d in data}
    order = ORDER.get(experiment, [])
    return [m for m in order if m in done] + sorted(done - set(order))


def of_score(results: Results, experiment: str, data: str, method: str, score: str) -> list[float]:
    """One score of all seeds."""
    found = results.get((experiment, data, method), {}).values()
    return [result["scores"][score] for result in found if score in result["scores"]]


def scores(results: Results, experiment: str, data: str, names: Sequence[str]) -> str:
    """One set of images: methods by scores."""
    lines = []
    for method in methods_of(results, experiment, [data]):
        seeds = len(results[experiment, data, method])
        cells = [spread(of_score(results, experiment, data, method, name)) for name in names]
        lines.append([method, *cells, str(seeds) if method != OTSU else ""])
    return markdown(["", *names, "seeds"], lines) if lines else ""


def across(results: Results, experiment: str, data: Sequence[str], score: str) -> str:
    """One score: methods by sets of images."""
    there = [d for d in data if methods_of(results, experiment, [d])]
    lines = [
        [method, *(spread(of_score(results, experiment, d, method, score)) for d in there)]
        for method in methods_of(results, experiment, there)
    ]
    seeds = [f"{d} ({max(len(results[k]) for k in results if k[:2] == (experiment, d))})" for d in there]
    return markdown([f"{score} (seeds)", *seeds], lines) if lines else ""


def sizes(results: Results, experiment: str) -> str:
    """Parameters, multiply-adds and time of a step."""
    lines = []
    for method in methods_of(results, experiment, [d for _, d, _ in results]):
        rows = [row for (e, _, m), seeds in results.items() if (e, m) == (experiment, method) for row in seeds.values()]
        if rows and "parameters" in rows[0]:
            steps = sorted(row["seconds per step"] for row in rows)
            one = rows[0]
            lines.append(
                [method, f"{one['parameters']:.3f} M", f"{one['multiply-adds']:.0f} M",
                 f"{1000 * steps[len(steps) // 2]:.0f} ms"]
            )  # fmt: skip
    return markdown(["", "parameters", "multiply-adds of 96 x 96", "step of 4 crops"], lines) if lines else ""


def differences(results: Results) -> str:
    """Pairs of networks with the same seeds, which saw the same crops: the differences of their mIoU."""
    lines = []
    for data in dict.fromkeys(d for e, d, _ in results if e == "masks"):
        cells = []
        for one, other in PAIRS.values():
            ours, theirs = (results.get(("masks", data, name), {}) for name in (one, other))
            both = [ours[s]["scores"]["mIoU"] - theirs[s]["scores"]["mIoU"] for s in ours if s in theirs]
            cells.append(spread(both, "+"))
        lines.append([data, *cells])
    return markdown(["mIoU", *PAIRS], lines) if lines else ""


def segments(results: Results, stages: Sequence[str]) -> str:
    """How well segments keep to objects: accuracy that they could have, and what spills."""
    lines = []
    rows = {(d, m): seeds for (e, d, m), seeds in results.items() if e == "masks" and m.startswith("grouping")}
    for (data, method), seeds in sorted(rows.items()):
        cells = []
        for stage in stages:
            accuracy, spilled = (
                [row["scores"][f"{stage}, {kind}"] for row in seeds.values()]
                for kind in ("accuracy", "undersegmentation")
            )
            cells.append(f"{spread(accuracy)} / {spread(spilled)}")
        lines.append([f"{data}, {method.removeprefix('grouping, ')}", *cells])
    return markdown(["accuracy / spilled", *stages], lines) if lines else ""


def at_spacings(results: Results, experiment: str, data: str) -> str:
    """What was trained on a set, at every spacing that is tested; as it is / resampled to the training's."""
    lines, tests = [], []
    for method in methods_of(results, experiment, [data]):
        seeds = results[experiment, data, method]
        tests = tests or [n for n in next(iter(seeds.values()))["scores"] if not n.endswith(", resampled")]
        pairs = [
            [spread(of_score(results, experiment, data, method, n)) for n in (test, f"{test}, resampled")]
            for test in tests
        ]
        lines.append([f"{method} ({len(seeds)})", *(" / ".join(pair) for pair in pairs)])
    return markdown(["mIoU (seeds)", *tests], lines) if lines else ""


def frequencies(results: Results, data: str) -> str:
    """Every choice of frequencies: its scores, and how far wave vectors went."""
    lines, tests = [], []
    for method in methods_of(results, "frequencies", [data]):
        seeds = results["frequencies", data, method]
        tests = tests or list(next(iter(seeds.values()))["scores"])
        cells = [spread(of_score(results, "frequencies", data, method, test)) for test in tests]
        means = [mean(row["scores"].values()) for row in seeds.values()]
        drift = spread([row["drift"] for row in seeds.values()])
        lines.append([f"{method} ({len(seeds)})", spread(means), *cells, drift])
    return markdown(["mIoU (seeds)", "mean", *tests, "drift"], lines) if lines else ""
