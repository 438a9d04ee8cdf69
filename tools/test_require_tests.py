"""A run of skipped tests is told from a run of tests."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("require_tests.py")
CASES = "import pytest\ndef test_skipped(): pytest.skip('no device')\n"


@pytest.mark.parametrize(
    ("more", "status"), [("", 1), ("def test_good(): pass\n", 0), ("def test_bad(): assert 0\n", 0)]
)
def test_only_executed_tests_count(more: str, status: int, tmp_path: Path) -> None:
    """Whether they pass is for pytest to say."""
    (tmp_path / "test_some.py").write_text(CASES + more)
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={report}", "test_some.py"]
    subprocess.run(command, cwd=tmp_path, check=False, capture_output=True)
    assert subprocess.run([sys.executable, SCRIPT, report], check=False, capture_output=True).returncode == status
