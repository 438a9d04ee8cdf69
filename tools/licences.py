"""Write or check the page of licences from bills of materials: ``python tools/licences.py PAGE BILL... [--write]``.

Bills are CycloneDX files, of environments that each hold all of the one before. A component is listed under the first
that has it. The session ``supply`` makes the bills.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from pathlib import Path
from typing import Any

TEXT = """\
# Licences

Both packages are under the BSD 3-Clause License. Below is what an installation brings with it, at the versions that the
tests run with, each with the licence that it declares. `nox -s supply` holds this page to what is installed (with
`-- --write` it renews the page), and makes the bill of materials (CycloneDX) of each package that goes with a release.

Not in the tables: on Linux, the wheels of torch on PyPI require NVIDIA's CUDA libraries (`nvidia-*`, which declare
LicenseRef-NVIDIA-Proprietary) and `triton` (MIT), which its CPU builds do without; the extra `natten` is NATTEN (MIT).
"""
HEADINGS = ("Required by rotary-spatial-embeddings", "Required by spatial-grouping-attention besides", "For extras")
OURS = ("rotary-spatial-embeddings", "spatial-grouping-attention")
# What torch brings with its wheels for CUDA, and not with its CPU builds: the page says so in a sentence.
CUDA = ("nvidia-", "cuda-", "triton")


def licence(declared: list[dict[str, Any]]) -> str:
    """What a component declares: an SPDX expression or identifier where there is one, otherwise a name."""
    names = {entry.get("expression") or entry["license"].get("id") or entry["license"]["name"] for entry in declared}
    return ", ".join(sorted(name.rpartition(" :: ")[2] for name in names)) or "none declared"


def components(bill: Path) -> dict[str, str]:
    """The licences of a bill's components, by their names."""
    listed = json.loads(bill.read_text(encoding="utf-8"))["components"]
    found = {part["name"].lower().replace("_", "-"): licence(part.get("licenses", [])) for part in listed}
    return {name: found[name] for name in sorted(found) if name not in OURS and not name.startswith(CUDA)}


def page(bills: list[Path]) -> str:
    """The whole page."""
    parts, seen = [TEXT], set[str]()
    for heading, bill in zip(HEADINGS, bills, strict=True):
        rows = {name: what for name, what in components(bill).items() if name not in seen}
        seen |= rows.keys()
        table = "\n".join(f"| {name} | {what} |" for name, what in rows.items())
        parts.append(f"## {heading}\n\n| library | licence |\n|---|---|\n{table}\n")
    return "\n".join(parts)


def main() -> None:
    """Write the page, or say how it differs from what is installed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("bills", type=Path, nargs=len(HEADINGS))
    parser.add_argument("--write", action="store_true", help="write the page instead of checking it")
    options = parser.parse_args()
    wanted = page(options.bills)
    if options.write:
        options.page.write_text(wanted, encoding="utf-8")
        return
    written = options.page.read_text(encoding="utf-8")
    if written != wanted:
        lines = difflib.unified_diff(written.splitlines(), wanted.splitlines(), "written", "installed", lineterm="")
        sys.exit("\n".join(lines))


if __name__ == "__main__":
    main()
