"""What is refused as a release, and what is not."""

import zipfile
from pathlib import Path

import check_release
import pytest

ROSE, GROUPING = check_release.SIBLINGS


def distribution(folder: Path, name: str, version: str, requires: str = "torch>=2.11") -> Path:
    """A folder with a wheel of metadata alone, and an sdist of nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name.replace('-', '_')}-{version}"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        text = f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\nRequires-Dist: {requires}\n"
        wheel.writestr(f"{stem}.dist-info/METADATA", text)
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")
    (folder / f"{stem}.tar.gz").touch()
    return folder


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return distribution(tmp_path / "index", ROSE, "2026.11.0")


@pytest.mark.parametrize("name", check_release.SIBLINGS)
def test_a_tag_of_the_right_name_and_version_passes(name: str, tmp_path: Path) -> None:
    check_release.check(f"{name}-2026.12.1", distribution(tmp_path, name, "2026.12.1"))


@pytest.mark.parametrize("tag", [f"{ROSE}-2026.12.0", f"{GROUPING}-2026.12.1"])
def test_another_version_or_name_is_refused(tag: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must have the tag's name and version"):
        check_release.check(tag, distribution(tmp_path, ROSE, "2026.12.1"))


@pytest.mark.parametrize("tag", ["2026.12.1", "v2026.12.1", "rose-2026.12.1", f"{ROSE}-", f"{ROSE}-latest"])
def test_a_tag_of_another_form_is_refused(tag: str) -> None:
    with pytest.raises(ValueError, match=r"tag must be|Invalid version"):
        check_release.parse_tag(tag)


def test_two_wheels_are_refused(tmp_path: Path) -> None:
    distribution(tmp_path, ROSE, "2026.12.0")
    with pytest.raises(ValueError, match="one wheel"):
        check_release.check(f"{ROSE}-2026.12.1", distribution(tmp_path, ROSE, "2026.12.1"))


def test_a_sibling_that_is_released_is_found_whatever_follows_its_zeros(index: Path, tmp_path: Path) -> None:
    dist = distribution(tmp_path / "dist", GROUPING, "2026.12.0", f"{ROSE}>=2026.11")
    check_release.check(f"{GROUPING}-2026.12.0", dist)


def test_a_sibling_that_is_not_released_is_refused(index: Path, tmp_path: Path) -> None:
    """Also where a later one is: the bound would be a version that nobody could test."""
    distribution(index, ROSE, "2027.1.0")
    dist = distribution(tmp_path / "dist", GROUPING, "2026.12.0", f"{ROSE}>=2026.12")
    with pytest.raises(ValueError, match=r"rotary-spatial-embeddings 2026\.12 must be released"):
        check_release.check(f"{GROUPING}-2026.12.0", dist)


def test_a_sibling_without_a_lower_bound_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must have one lower bound"):
        check_release.check(f"{GROUPING}-2026.12.0", distribution(tmp_path, GROUPING, "2026.12.0", f"{ROSE}<2028"))


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package's folder, with a changelog of two versions."""
    (tmp_path / "changes.d").mkdir()
    (tmp_path / "changes.d" / ".gitkeep").touch()
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 2026.12.1\n\n- New.\n\n## 2026.12.0\n\n- Old.\n")
    return tmp_path


@pytest.mark.parametrize(("version", "told"), [("2026.12.1", "- New."), ("2026.12.0", "- Old.")])
def test_notes_are_the_changelogs_section(package: Path, version: str, told: str) -> None:
    assert check_release.notes(package, check_release.Version(version)) == told


@pytest.mark.parametrize("version", ["2026.12.2", "2026.12"])
def test_a_version_that_the_changelog_does_not_tell_of_is_refused(package: Path, version: str) -> None:
    with pytest.raises(ValueError, match=rf"must tell of {version}; it tells of \['2026.12.1', '2026.12.0'\]"):
        check_release.notes(package, check_release.Version(version))


def test_a_section_without_a_word_is_refused(package: Path) -> None:
    (package / "CHANGELOG.md").write_text("# Changelog\n\n## 2026.12.1\n\n## 2026.12.0\n\n- Old.\n")
    with pytest.raises(ValueError, match=r"must tell of 2026\.12\.1"):
        check_release.notes(package, check_release.Version("2026.12.1"))


def test_fragments_that_are_left_are_refused(package: Path) -> None:
    (package / "changes.d" / "7.fixed.md").write_text("Something.")
    with pytest.raises(ValueError, match=r"left are \['7.fixed.md'\]"):
        check_release.notes(package, check_release.Version("2026.12.1"))


@pytest.mark.parametrize("name", check_release.SIBLINGS)
def test_the_changelogs_that_are_here_can_be_read(name: str, tmp_path: Path) -> None:
    text = (check_release.PACKAGES / name / "CHANGELOG.md").read_text(encoding="utf-8")
    latest = text.split("\n## ", 1)[1].partition("\n")[0]
    (tmp_path / "CHANGELOG.md").write_text(text, encoding="utf-8")
    assert len(check_release.notes(tmp_path, check_release.Version(latest))) > 100
