"""The check of the site finds what is wrong: ``pytest docs/browser_faults.py``, where a browser is installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from browser_check import executable, main

GOOD = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Good</title>
<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,"></head>
<body><h1 id="top">Good</h1><p><a href="#top">up</a> <a href="other/">other</a></p>{}</body></html>"""

FAULTS = {
    "<script>console.error('said')</script>": "console: said",
    "<script>throw new Error('thrown')</script>": "uncaught: thrown",
    "<img src='no.png' alt='none'>": "image does not load",
    "<script src='no.js'></script>": "404 for no.js",
    "<img src='http://localhost:1/a.png' alt='far'>": "request to elsewhere: http://localhost:1/a.png",
    "<a href='nowhere/'>nowhere</a>": "404 for nowhere/",
    "<a href='no.pdf'>none</a>": "no.pdf is not there",
    "<a href='other/#no'>anchor</a>": "no #no in other/",
    "<div style='width: 600px'>wide</div>": "(phone): wider than the window",
    "<button></button>": "button without a name",
    "<input type='text'>": "textbox without a name",
    "<button onkeydown='event.preventDefault()'>trap</button><button>behind</button>": "not reached by Tab",
}


def check(folder: Path, body: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status and report for a site of two pages, the first of which has ``body`` at its end."""
    (folder / "other").mkdir()
    (folder / "index.html").write_text(GOOD.format(body))
    (folder / "other" / "index.html").write_text(GOOD.format("").replace("other/", "../"))
    with pytest.raises(SystemExit) as ended:
        main([str(folder), "--out", str(folder / "shots")])
    status = ended.value.code
    assert isinstance(status, int)
    return status, capsys.readouterr().out


def test_a_good_site_has_no_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both pages at both widths."""
    status, report = check(tmp_path, "", capsys)
    assert status == 0
    assert "2 pages" in report
    assert sorted(shot.name for shot in (tmp_path / "shots").iterdir()) == [
        f"{page}-{width}.png" for page in ("index", "other") for width in ("desktop", "phone")
    ]


def test_every_fault_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All at once, for a browser's start takes longest; the one that catches the Tab key is the last."""
    status, report = check(tmp_path, "".join(FAULTS), capsys)
    assert status == 1
    missed = [fault for fault, problem in FAULTS.items() if problem not in report]
    assert not missed


def test_without_a_browser_it_says_so() -> None:
    """By name, as by looking for one."""
    with pytest.raises(SystemExit, match=r"a browser must be installed, .* got no-such-browser"):
        executable("no-such-browser")
