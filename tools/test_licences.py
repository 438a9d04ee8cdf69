"""The page of licences says what bills of materials say, each library once."""

import json
from pathlib import Path
from typing import Any

import licences
import pytest


def bill(path: Path, **declared: list[dict[str, Any]]) -> Path:
    parts = [{"name": name, "licenses": entries} for name, entries in declared.items()]
    path.write_text(json.dumps({"components": parts}))
    return path


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        ([{"license": {"id": "MIT"}}], "MIT"),
        ([{"expression": "MIT AND BSD-3-Clause"}], "MIT AND BSD-3-Clause"),
        ([{"license": {"name": "License :: OSI Approved :: BSD License"}}], "BSD License"),
        ([], "none declared"),
    ],
)
def test_a_licence_is_said_as_it_is_declared(declared: list[dict[str, Any]], said: str) -> None:
    assert licences.licence(declared) == said


def test_a_library_is_listed_where_it_is_first_needed(tmp_path: Path) -> None:
    first = {"torch": [{"license": {"id": "MIT"}}], "triton": [], "rotary-spatial-embeddings": []}
    second = first | {"einops": [], "typing_extensions": []}
    bills = [bill(tmp_path / "1", **first), bill(tmp_path / "2", **second), bill(tmp_path / "3", **second)]
    page = licences.page(bills)
    assert [line for line in page.splitlines() if line.startswith(("## ", "| t", "| e", "| r"))] == [
        f"## {licences.HEADINGS[0]}",
        "| torch | MIT |",
        f"## {licences.HEADINGS[1]}",
        "| einops | none declared |",
        "| typing-extensions | none declared |",
        f"## {licences.HEADINGS[2]}",
    ]
