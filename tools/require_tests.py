"""Fail where a run of pytest executed nothing: ``python tools/require_tests.py REPORT.xml``.

Pytest fails where it collects no test, but is content where it skips every one of them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree


def executed(report: Path) -> int:
    """How many tests of a JUnit report ran to an end, good or bad."""
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    return sum(int(suite.attrib["tests"]) - int(suite.attrib["skipped"]) for suite in suites)


if __name__ == "__main__":
    number = executed(Path(sys.argv[1]))
    print(f"{number} tests were executed")
    sys.exit(number == 0)
