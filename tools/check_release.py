"""Refuse a release whose parts disagree: ``python tools/check_release.py TAG DIST NOTES``.

A tag is a distribution's name, a hyphen and a version (``rotary-spatial-embeddings-2026.11.0``). DIST must hold one
wheel and one sdist, both of that name and version. Where the wheel requires a package of this repository, the lowest
version that it admits must be on the index already: otherwise nobody could install what is released.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_sdist_filename, parse_wheel_filename
from packaging.version import Version

SIBLINGS = ("rotary-spatial-embeddings", "spatial-grouping-attention")
PACKAGES = Path(__file__).parents[1] / "packages"


def parse_tag(tag: str) -> tuple[str, Version]:
    """The distribution and the version that a tag names."""
    name, _, version = tag.rpartition("-")
    if name not in SIBLINGS:
        raise ValueError(f"tag must be one of {SIBLINGS}, a hyphen and a version; got {tag!r}")
    return name, Version(version)


def only(found: list[Path], kind: str) -> Path:
    """The one file of its kind."""
    if len(found) != 1:
        raise ValueError(f"there must be one {kind} to release; got {[path.name for path in found]}")
    return found[0]


def metadata(wheel: Path) -> Message:
    """What a wheel says of itself."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def sibling_bounds(wheel: Path) -> list[tuple[str, str]]:
    """Packages of this repository that a wheel requires, with the lowest versions that it admits."""
    bounds = []
    for requirement in map(Requirement, metadata(wheel).get_all("Requires-Dist", [])):
        if canonicalize_name(requirement.name) not in SIBLINGS:
            continue
        lowest = [clause.version for clause in requirement.specifier if clause.operator == ">="]
        if len(lowest) != 1:
            raise ValueError(f"a requirement on a sibling must have one lower bound; got {requirement}")
        bounds.append((requirement.name, lowest[0]))
    return bounds


def is_released(name: str, version: str) -> bool:
    """Whether pip finds this version on its index."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            folder,
            f"{name}=={version}",
        ]
        return subprocess.run(command, check=False).returncode == 0


def check(tag: str, dist: Path) -> None:
    """Raise ValueError for the first thing that is wrong."""
    wheel, sdist = only([*dist.glob("*.whl")], "wheel"), only([*dist.glob("*.tar.gz")], "sdist")
    for path, got in (
        (wheel, parse_wheel_filename(wheel.name)[:2]),
        (sdist, parse_sdist_filename(sdist.name)),
    ):
        if got != parse_tag(tag):
            raise ValueError(f"{path.name} must have the tag's name and version; got {tag!r}")
    for name, version in sibling_bounds(wheel):
        if not is_released(name, version):
            raise ValueError(f"{name} {version} must be released before {tag}; the index does not have it")


def notes(package: Path, version: Version) -> str:
    """What the changelog of a package tells of a version.

    Raises:
        ValueError: nothing, or fragments are left that it should tell of.
    """
    changelog = package / "CHANGELOG.md"
    if left := sorted(path.name for path in (package / "changes.d").glob("[!.]*")):
        raise ValueError(f"{changelog.name} must have collected all of changes.d (towncrier build); left are {left}")
    sections = changelog.read_text(encoding="utf-8").split("\n## ")[1:]
    told = {heading.strip(): text.strip() for heading, _, text in (section.partition("\n") for section in sections)}
    if not told.get(str(version)):
        raise ValueError(f"{changelog.name} must tell of {version}; it tells of {[*told]}")
    return told[str(version)]


def main() -> None:
    """Check what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tag")
    parser.add_argument("dist", type=Path)
    parser.add_argument("notes", type=Path)
    options = parser.parse_args()
    try:
        check(options.tag, options.dist)
        name, version = parse_tag(options.tag)
        options.notes.write_text(notes(PACKAGES / name, version) + "\n", encoding="utf-8")
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
