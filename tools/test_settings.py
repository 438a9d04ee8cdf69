"""A package's tests are run by the same rules from the repository and from its own folder."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:  # where pytest brings the same under another name
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGES = sorted((ROOT / "packages").glob("*/pyproject.toml"))
# What a place says of itself: where its tests are, and which markers they use.
OWN = {"addopts", "markers", "pythonpath", "testpaths"}


def settings(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    return loaded


def markers(path: Path) -> dict[str, str]:
    return dict(entry.split(": ", 1) for entry in settings(path)["markers"])


@pytest.mark.parametrize("path", PACKAGES, ids=lambda path: path.parent.name)
def test_a_package_has_the_repositorys_rules(path: Path) -> None:
    package, root = settings(path), settings(ROOT / "pyproject.toml")
    assert {key: package[key] for key in package.keys() - OWN} == {key: root[key] for key in root.keys() - OWN}
    assert package["addopts"][:-1] == root["addopts"][:-1]
    assert markers(path).items() <= markers(ROOT / "pyproject.toml").items()


@pytest.mark.parametrize("path", [*PACKAGES, ROOT / "pyproject.toml"], ids=lambda path: path.parent.name)
def test_what_is_marked_is_run_on_request_only(path: Path) -> None:
    assert set(re.findall(r"not (\w+)", settings(path)["addopts"][-1])) == set(markers(path))


def test_hooks_before_a_commit_run_what_lint_runs() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    pinned = set(re.findall(r"^[\w-]+==[\w.]+", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    asked = re.findall(r"additional_dependencies: \[([\w-]+==[\w.]+)\]", hooks)
    assert len(asked) == hooks.count("additional_dependencies") > 0
    assert set(asked) <= pinned
