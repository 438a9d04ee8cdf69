"""Use the interactive page as a reader does, and see whether it answers."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Browser, Page
from playwright.sync_api import TimeoutError as Late

STARTS = 90  # seconds that loading the runtime and running the network may take
ANSWERS = 1.0  # seconds from a click to the masks

PICTURE = "document.getElementById('picture').toDataURL()"
VALUES = "document.getElementById('values').textContent"
TEXTS = "['values', 'text1', 'text2', 'text3'].map(id => document.getElementById(id).textContent)"
MASKS = "[1, 2, 3].map(k => document.getElementById('card' + k).toDataURL())"
WAVES = "[...document.querySelectorAll('#waves canvas')].map(canvas => canvas.toDataURL())"
SPACE = "document.getElementById('space').toDataURL()"
PHASES = "document.getElementById('spacing-value').textContent + document.getElementById('phase-values').textContent"


def is_interactive(page: Page) -> bool:
    """Whether this is the interactive page."""
    return page.locator("#picture[aria-roledescription='spot picker']").count() == 1


class Reader:
    """Does something on the page, and checks that what should change changes, and nothing else.

    Args:
        page: the interactive page, ready.
        problems: what is wrong is added here.
    """

    def __init__(self, page: Page, problems: list[str]) -> None:
        self.page, self.problems = page, problems
        self.checks = 0
        self.waited: list[float] = []

    def expect(self, what: str, condition: bool) -> None:
        """Count a check, and take down its failure."""
        self.checks += 1
        if not condition:
            self.problems.append(f"interactive: {what}")

    def changes(self, what: str, action: Callable[[], object], *looked_at: str, stays: tuple[str, ...] = ()) -> None:
        """Call ``action``: every one of ``looked_at`` must be another afterwards, and ``stays`` the same."""
        before = [self.page.evaluate(expression) for expression in (*looked_at, *stays)]
        action()
        after = [self.page.evaluate(expression) for expression in (*looked_at, *stays)]
        for i, expression in enumerate((*looked_at, *stays)):
            wanted = "changes" if i < len(looked_at) else "leaves"
            self.expect(f"{what} {wanted} {expression}", (before[i] != after[i]) == (i < len(looked_at)))

    def press(self, key: str, *looked_at: str, stays: tuple[str, ...] = ()) -> None:
        """Press a key; see :meth:`changes`."""
        self.changes(f"the key {key}", lambda: self.page.keyboard.press(key), *looked_at, stays=stays)

    def click(self, row: float, column: float) -> None:
        """Click into the picture, at shares of its height and width, and wait for the answer."""
        box = self.page.locator("#picture").bounding_box()
        assert box is not None
        started = time.perf_counter()
        self.page.locator("#picture").click(position={"x": column * box["width"], "y": row * box["height"]})
        self.page.evaluate("new Promise(requestAnimationFrame)")
        self.waited.append(time.perf_counter() - started)


def use(page: Page, problems: list[str], shots: Path) -> Counter[str]:
    """Wait for the network, pick spots, move the slider; screenshots of some states go to ``shots``-*.png.

    Returns:
        How many interactions were checked.
    """
    try:
        page.wait_for_selector("body[data-ready=true], #message.error", timeout=1000 * STARTS)
    except Late:
        problems.append(f"interactive: not ready after {STARTS} s")
        return Counter()
    if page.locator("#message.error").count():
        problems.append(f"interactive: {page.locator('#message').text_content()}")
        return Counter()
    reader = Reader(page, problems)
    print(f"  network: {page.locator('#picture').get_attribute('data-milliseconds')} ms for an image")
    _pick(reader)
    page.screenshot(path=f"{shots}-picked.png")
    _choose(reader)
    page.screenshot(path=f"{shots}-chosen.png")
    _move_slider(reader)
    page.locator("#space").scroll_into_view_if_needed()
    page.screenshot(path=f"{shots}-spacing.png")
    return Counter({"interactions": reader.checks})


def _pick(reader: Reader) -> None:
    page = reader.page
    for stage in (1, 2, 3):
        text = page.locator(f"#text{stage}").text_content() or ""
        reader.expect(f"stage {stage} says which group", "belongs to it by" in text)
    for row, column in ((0.2, 0.2), (0.35, 0.5), (0.75, 0.55)):
        reader.changes("a click", lambda place=(row, column): reader.click(*place), PICTURE, TEXTS, MASKS)
    print(f"  click to masks: {', '.join(f'{1000 * seconds:.0f}' for seconds in reader.waited)} ms")
    # The quickest: what else the machine does is not the page's.
    reader.expect(f"a click is answered within {ANSWERS} s; got {reader.waited}", min(reader.waited) < ANSWERS)
    page.locator("#picture").focus()
    for key in ("ArrowLeft", "ArrowUp", "Shift+ArrowRight", "Shift+ArrowDown"):
        reader.press(key, PICTURE, VALUES)


def _choose(reader: Reader) -> None:
    page = reader.page
    for stage in (1, 2):
        chosen = page.locator(f"input[name=stage][value='{stage}']")
        reader.changes(f"stage {stage}", chosen.check, PICTURE, stays=(MASKS,))
    for box in ("input[name=border][value='2']", "#classes"):
        page.locator(box).focus()
        reader.press("Space", PICTURE, stays=(MASKS, TEXTS))
    page.locator("input[name=stage][value='3']").check()

    def other_image() -> None:
        done = "document.getElementById('picture').dataset.image"
        page.locator("input[name=image][value='1']").check()
        page.wait_for_function(f"{done} === '1'", timeout=1000 * STARTS)

    reader.changes("another image", other_image, PICTURE, MASKS)


def _move_slider(reader: Reader) -> None:
    page = reader.page
    slider = page.locator("#spacing")
    slider.focus()
    untouched = (PICTURE, MASKS)
    for key in ("ArrowRight", "End", "Home"):
        reader.press(key, WAVES, SPACE, PHASES, stays=untouched)
    slider.fill("1")
    reader.changes("another wave", page.locator("input[name=wave][value='4']").check, SPACE, PHASES, stays=(WAVES,))
    # In units the wave itself does not move: beyond the picture's frame nothing changes with the spacing.
    corner = """[...document.getElementById('space').getContext('2d').getImageData(700, 200, 60, 60).data].join()"""
    reader.changes("the slider", lambda: slider.fill("0.5"), WAVES, stays=(corner,))


def without_webassembly(browser: Browser, address: str) -> list[str]:
    """What is wrong with the message of the page in a browser that cannot run the network."""
    page = browser.new_page()
    page.add_init_script("delete window.WebAssembly")
    page.goto(address)
    message = page.locator("#message")
    message.and_(page.locator(".error")).wait_for(timeout=10_000)
    text = message.text_content() or ""
    page.close()
    return [] if "WebAssembly" in text else [f"interactive: says nothing of WebAssembly where there is none: {text}"]
