"""The committed JSON as rows: what the tables and pictures of the page are made of, and nothing else."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent / "results"
SUBJECTS = ("rotation", "grouping", "layers", "compactness", "backbones", "curves", "first_call")

# Entries that are not ours, by how their names begin.
PEERS = (
    "naive", "timm", "rotary-embedding-torch", "x-transformers", "Liger", "FlexAttention", "masked", "matrix", "MONAI",
    "NATTEN", "dense, on the index", "dense, matrix", "sparse, masked",
)  # fmt: skip

# Whom a peer is compared with, where that is not the fastest of ours.
COUNTERPARTS = {"dense, on the index": "dense"}

# Ours, but there to be compared with.
BASELINES = ("its twin",)


class Row(NamedTuple):
    """An entry, one way."""

    case: str
    way: str
    name: str
    samples: list[float]
    """Seconds of a call, round by round."""
    info: dict[str, Any]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Distance of the quartiles as a share of the median."""
        low, high = quartiles(self.samples)
        return (high - low) / self.median

    @property
    def is_peer(self) -> bool:
        """Whether somebody else's."""
        return self.name.startswith(PEERS)


class Results(NamedTuple):
    """One file."""

    subject: str
    machine: dict[str, Any]
    commit: dict[str, Any]
    rows: list[Row]
    absent: list[dict[str, str]]

    def cases(self) -> list[str]:
        """Titles, in the order in which they were measured."""
        return list(dict.fromkeys(row.case for row in self.rows))

    def ways(self, case: str) -> list[str]:
        """Of a case."""
        return list(dict.fromkeys(row.way for row in self.rows if row.case == case))

    def names(self, case: str) -> list[str]:
        """Of the entries of a case."""
        return list(dict.fromkeys(row.name for row in self.rows if row.case == case))

    def find(self, case: str, way: str, name: str) -> Row | None:
        """A row, if it was measured."""
        return next((r for r in self.rows if (r.case, r.way, r.name) == (case, way, name)), None)

    def ratio(self, row: Row, to: str | None = None) -> tuple[float, float, float] | None:
        """Median and quartiles of the ratios to an entry, the case's reference by default, round by round."""
        other = self.find(row.case, row.way, to or row.info["reference"])
        if other is None:
            return None
        ratios = [mine / theirs for mine, theirs in zip(row.samples, other.samples, strict=True)]
        return statistics.median(ratios), *quartiles(ratios)


def quartiles(values: list[float]) -> tuple[float, float]:
    """The first and the third."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def load(folder: Path = FOLDER, device: str = "cpu") -> dict[str, Results]:
    """Every subject that was recorded on a kind of device."""
    found = {}
    for subject in SUBJECTS:
        path = folder / f"{device}-{subject}.json"
        if path.exists():
            found[subject] = read(subject, json.loads(path.read_text()))
    return found


def read(subject: str, recorded: dict[str, Any]) -> Results:
    """pytest-benchmark's JSON as rows."""
    rows = []
    for record in recorded["benchmarks"]:
        info = record["extra_info"]
        case = record["group"].removesuffix(f", {info['way']}")
        rows.append(Row(case, info["way"], record["name"], record["stats"]["data"], info))
    return Results(subject, recorded["machine_info"], recorded["commit_info"], rows, recorded["absent"])
