"""That the page is what the committed JSON gives, and that tables say what rows hold."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import report
import report_tables as tables
from reporting import blocks_of
from results_of_runs import Results, Row, load, quartiles


@pytest.fixture(scope="module")
def recorded() -> dict[str, Results]:
    return load()


def test_the_page_is_what_the_json_gives(recorded: dict[str, Results]) -> None:
    page = report.PAGE.read_text()
    assert blocks_of(page) == {*report.BLOCKS, *report.OF_ALL}
    assert report.render(page, recorded) == page


def test_pictures_are_drawn_and_shown(recorded: dict[str, Results], tmp_path: Path) -> None:
    page = report.PAGE.read_text()
    for path in report.draw(recorded, tmp_path):
        assert path.stat().st_size > 10_000
        assert f"images/{path.name}" in page
        assert (report.PICTURES / path.name).exists()


def test_what_was_recorded_agreed_with_its_oracle(recorded: dict[str, Results]) -> None:
    for results in recorded.values():
        assert results.rows
        assert results.machine["threads"] == 1
        assert results.commit["id"]
        for row in results.rows:
            assert row.info["yardstick"] or row.info["error"] <= row.info["tolerance"], row.name


def row(name: str, samples: list[float], **info: Any) -> Row:
    facts = {"reference": "one", "yardstick": False, "peak_bytes": 2_000, "fraction_of_bound": 0.5, "note": ""}
    return Row("case", tables.FORWARD, name, samples, {**facts, **info})


def results_of(*rows: Row) -> dict[str, Results]:
    return {"rotation": Results("rotation", {}, {}, list(rows), [])}


def test_ratios_are_taken_round_by_round() -> None:
    results = results_of(row("one", [1.0, 2.0, 3.0]), row("two", [2.0, 4.0, 6.0]))["rotation"]
    assert results.ratio(results.rows[1]) == (2.0, 2.0, 2.0)
    assert quartiles([4.0]) == (4.0, 4.0)


def test_losses_are_said() -> None:
    mine, theirs = row("one", [2.0]), row("timm, half", [1.0])
    assert "*timm, half* is 2 times as fast as *one*" in tables.losses(results_of(mine, theirs))
    assert tables.losses(results_of(mine, row("timm, half", [3.0]))) == "None."
    assert tables.losses(results_of(mine, row("copy", [1.0], yardstick=True))) == "None."


def test_figures_are_short() -> None:
    assert [tables.seconds(x) for x in (2.5, 0.0123, 4.567e-5)] == ["2.5 s", "12.3 ms", "45.7 us"]
    assert [tables.size(x) for x in (3.21e9, 5e7, 1234.0)] == ["3.21 GB", "50 MB", "1.23 kB"]
    assert [tables.digits(x) for x in (1234.5, 12.34, 0.001)] == ["1234", "12.3", "0.0010"]
