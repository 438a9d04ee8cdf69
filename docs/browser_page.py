"""What a page must be like, at one width: found out by opening it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from playwright.sync_api import Browser, ConsoleMessage, Page, Request, Response, ViewportSize

VIEWPORTS: dict[str, ViewportSize] = {
    "desktop": {"width": 1280, "height": 800},
    "phone": {"width": 390, "height": 844},
}
TALLEST = 12000  # pixels of a screenshot
CHOSEN = {"checkbox", "combobox", "radio", "slider", "switch", "tab"}
OPERATED = {"application", "button", "link", "searchbox", "textbox", *CHOSEN}

# Links, and names that an anchor can lead to.
LINKS = """() => ({
  links: [...document.querySelectorAll('a[href]')].map(a => a.href).filter(h => h.startsWith('http')),
  anchors: [...document.querySelectorAll('[id], a[name]')].flatMap(e => [e.id, e.getAttribute('name')]).filter(Boolean),
})"""

BROKEN_IMAGES = """async () => {
  const images = [...document.images];
  images.forEach(image => image.loading = 'eager');
  await Promise.all(images.map(image => image.decode().catch(() => null)));
  return {count: images.length, broken: images.filter(i => i.naturalWidth === 0).map(i => i.currentSrc || i.outerHTML)};
}"""

TOO_WIDE = """() => {
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth <= width) return null;
  const wide = [...document.body.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right > width + 1);
  return wide.slice(0, 3).map(e => e.outerHTML.slice(0, 80));
}"""

# What Tab must reach: of radio buttons one of each group, as browsers have it.
WATCH_FOCUS = """() => {
  const kinds = 'a[href], button, input, select, textarea, summary, [tabindex]';
  const wanted = [...document.querySelectorAll(kinds)].filter(e => e.tabIndex >= 0 && !e.disabled
    && !e.closest('[inert]') && e.checkVisibility({visibilityProperty: true}) && e.getClientRects().length > 0);
  const key = e => e.type === 'radio' && e.name ? 'radio ' + e.name : e;
  window.__wanted = new Map(wanted.map(e => [key(e), e]));
  document.addEventListener('focusin', event => window.__wanted.delete(key(event.target)));
  document.activeElement?.blur();
  return window.__wanted.size;
}"""
NOT_FOCUSED = "() => [...window.__wanted.values()].map(e => e.outerHTML.slice(0, 100))"


@dataclass
class Look:
    """A page at one width: where it leads, what is wrong with it, how much was checked."""

    links: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    interactive: bool = False

    def examine(self, page: Page, shot: Path) -> None:
        """Check everything that a loaded page shows, after taking a picture of it."""
        found = page.evaluate(LINKS)
        self.links, self.anchors = found["links"], set(found["anchors"])
        images = page.evaluate(BROKEN_IMAGES)
        self.counts["images"] += images["count"]
        self.problems += [f"image does not load: {source}" for source in images["broken"]]
        wide = page.evaluate(TOO_WIDE)
        if wide is not None:
            self.problems.append(f"wider than the window: {wide}")
        take_picture(page, shot)
        self._check_names(page)
        self._check_tab(page)
        self.counts["widths of pages"] += 1

    def _check_names(self, page: Page) -> None:
        """Everything that can be operated says what it is, in the browser's own accessibility tree."""
        session = page.context.new_cdp_session(page)
        for node in session.send("Accessibility.getFullAXTree")["nodes"]:
            role = node.get("role", {}).get("value")
            if node.get("ignored") or role not in OPERATED:
                continue
            self.counts["names of controls"] += 1
            if not node.get("name", {}).get("value", "").strip():
                described = session.send("DOM.describeNode", {"backendNodeId": node["backendDOMNodeId"]})["node"]
                self.problems.append(f"{role} without a name: <{described['localName']} {described.get('attributes')}>")
        session.detach()

    def _check_tab(self, page: Page) -> None:
        """Everything that can be operated is reached by the Tab key."""
        wanted = page.evaluate(WATCH_FOCUS)
        left: list[str] = []
        for _ in range(3):  # scrolling regions take a press each, too
            for _ in range(wanted + 10):
                page.keyboard.press("Tab")
            left = page.evaluate(NOT_FOCUSED)
            if not left:
                break
        self.counts["controls reached by Tab"] += wanted - len(left)
        self.problems += [f"not reached by Tab: {element}" for element in left]


def take_picture(page: Page, path: Path) -> None:
    """The whole page, unless it is very long, as it is before anyone scrolls."""
    page.evaluate("scrollTo(0, 0)")
    height = page.evaluate("document.documentElement.scrollHeight")
    width = page.evaluate("document.documentElement.clientWidth")
    page.screenshot(path=path, full_page=True, clip={"x": 0, "y": 0, "width": width, "height": min(height, TALLEST)})


@contextmanager
def look(browser: Browser, address: str, viewport: ViewportSize, root: str) -> Iterator[tuple[Page, Look]]:
    """Open a page, and take down what goes wrong from the first request on.

    Args:
        browser: to open it with.
        address: of the page.
        viewport: size of the window.
        root: where requests may go.
    """
    seen = Look()

    def on_console(message: ConsoleMessage) -> None:
        # Responses are taken down below, with their address.
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            seen.problems.append(f"console: {message.text}")

    def on_request(request: Request) -> None:
        seen.counts["requests"] += 1
        if not request.url.startswith((root, "data:", "blob:")):
            seen.problems.append(f"request to elsewhere: {request.url}")

    def on_response(response: Response) -> None:
        if response.status >= 400:
            seen.problems.append(f"{response.status} for {response.url.removeprefix(root)}")

    context = browser.new_context(viewport=viewport)
    page = context.new_page()
    page.on("console", on_console)
    page.on("pageerror", lambda error: seen.problems.append(f"uncaught: {error}"))
    page.on("request", on_request)
    page.on("response", on_response)
    page.on("requestfailed", lambda request: seen.problems.append(f"request failed: {request.url} ({request.failure})"))
    try:
        page.goto(address, wait_until="load")
        page.wait_for_load_state("networkidle")
        yield page, seen
    finally:
        context.close()
