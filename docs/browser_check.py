"""Look at a built site in a real browser, and say what is wrong with it.

    python docs/browser_check.py SITE --out SCREENSHOTS [--start PATH ...] [--browser EXECUTABLE]

Every page that internal links lead to, from the start pages on, is opened at desktop and at phone width. It must load
without errors and without requests to anyone else; links and their anchors must lead somewhere; nothing may be wider
than a phone; everything that can be operated must have a name and be reachable by the Tab key. The interactive page,
where there is one, is used as a reader would (``browser_interactive.py``). Needs Playwright for Python and an installed
Chromium or Chrome; exits with 1 where something is wrong, or where there is no browser.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar
from urllib.parse import unquote, urldefrag, urljoin

from browser_interactive import is_interactive, use, without_webassembly
from browser_page import VIEWPORTS, Look, look
from playwright.sync_api import Browser, sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


class Files(SimpleHTTPRequestHandler):
    """Files of a folder; a folder without a page is not found, as on the hosts that serve such sites."""

    extensions_map: ClassVar = {
        **SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "text/javascript",
        ".js": "text/javascript",
        ".wasm": "application/wasm",
    }

    def list_directory(self, path: object) -> None:
        """No listing."""
        self.send_error(404)

    def log_message(self, *message: object) -> None:
        """Quiet: what matters is seen from the browser's side."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on this machine; the address of its root."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Files, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()


class Visit:
    """A walk through a site: pages seen, what is wrong, how much was checked.

    Args:
        browser: to look with.
        root: address of the site.
        shots: folder for screenshots.
    """

    def __init__(self, browser: Browser, root: str, shots: Path) -> None:
        self.browser, self.root, self.shots = browser, root, shots
        self.seen: dict[str, Look] = {}
        self.problems: list[str] = []
        self.counts: Counter[str] = Counter()

    def walk(self, start: Sequence[str]) -> None:
        """Open the start pages, and all pages that they lead to."""
        waiting = [urljoin(self.root, path) for path in start]
        while waiting:
            address = waiting.pop(0)
            if address in self.seen:
                continue
            found = self._open(address)
            self.seen[address] = found
            for link in found.links:
                target, _ = urldefrag(link)
                if self._is_page(target) and target not in self.seen:
                    waiting.append(target)
        self._check_links()

    def _is_page(self, address: str) -> bool:
        return address.startswith(self.root) and (address.endswith(("/", ".html")) or "." not in address.split("/")[-1])

    def _open(self, address: str) -> Look:
        """A page at every width; what the widest shows of it."""
        name = address.removeprefix(self.root) or "index.html"
        looks = []
        for width, viewport in VIEWPORTS.items():
            with look(self.browser, address, viewport, self.root) as (page, seen):
                seen.interactive = is_interactive(page)
                if seen.interactive:
                    self.counts.update(use(page, seen.problems, self.shots / f"interactive-{width}"))
                seen.examine(page, self.shots / f"{_file_name(name)}-{width}.png")
            self.problems += [f"{name} ({width}): {problem}" for problem in seen.problems]
            self.counts.update(seen.counts)
            looks.append(seen)
        if looks[0].interactive:
            self.problems += [f"{name}: {problem}" for problem in without_webassembly(self.browser, address)]
            self.counts["interactions"] += 1
        self.counts["pages"] += 1
        print(f"{name}: {sum(len(seen.problems) for seen in looks)} problems", flush=True)
        return looks[0]

    def _check_links(self) -> None:
        """Internal links lead to pages that were seen, or to files; anchors to places in them."""
        files: dict[str, bool] = {}
        for address, page in self.seen.items():
            name = address.removeprefix(self.root) or "index.html"
            for link in page.links:
                target, anchor = urldefrag(link)
                if not target.startswith(self.root):
                    self.counts["links to elsewhere (not opened)"] += 1
                    continue
                self.counts["internal links"] += 1
                if target in self.seen:
                    if anchor and unquote(anchor) not in self.seen[target].anchors:
                        self.problems.append(f"{name}: no #{anchor} in {target.removeprefix(self.root)}")
                elif not files.setdefault(target, answers(target)):
                    self.problems.append(f"{name}: {target.removeprefix(self.root)} is not there")


def _file_name(page: str) -> str:
    return page.strip("/").replace("/", "--").removesuffix(".html")


def answers(address: str) -> bool:
    """Whether a file of the site is there."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=10) as response:
            return bool(response.status == 200)
    except urllib.error.URLError:
        return False


def executable(named: str | None) -> str:
    """The browser to use.

    Raises:
        SystemExit: there is none.
    """
    for name in (named,) if named else BROWSERS:
        path = shutil.which(name)
        if path is not None:
            return path
    sys.exit(f"a browser must be installed, one of {', '.join(BROWSERS)}, or named by --browser; got {named or 'none'}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Walk through a site and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path, help="folder of the built site")
    parser.add_argument("--out", type=Path, required=True, help="folder for screenshots")
    parser.add_argument("--start", nargs="+", default=[""], metavar="PATH", help="pages to start from (the first page)")
    parser.add_argument("--browser", help="name or path of its program")
    options = parser.parse_args(arguments)
    if not options.site.is_dir():
        parser.error(f"SITE must be a folder; got {options.site}")
    program = executable(options.browser)
    options.out.mkdir(parents=True, exist_ok=True)
    with served(options.site) as root, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program)
        visit = Visit(browser, root, options.out)
        visit.walk(options.start)
        browser.close()
    for problem in visit.problems:
        print(f"PROBLEM  {problem}")
    print(", ".join(f"{count} {what}" for what, count in visit.counts.items()))
    print(f"{len(visit.problems)} problems; screenshots in {options.out}")
    sys.exit(1 if visit.problems else 0)


if __name__ == "__main__":
    main()
