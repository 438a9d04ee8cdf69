"""LaTeX in pages, ``$...$`` and ``$$...$$``, as MathML: browsers draw it without scripts and read it aloud."""

from __future__ import annotations

import re
import unicodedata
from typing import Any
from xml.etree import ElementTree

from latex2mathml.converter import convert_to_element
from markdown import Markdown
from markdown.blockprocessors import BlockProcessor
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor

INLINE = r"(?<![\\$])\$(?![\s$])([^$]*[^$\s])\$(?![\w$])"
BLOCK = re.compile(r"^\$\$(.+?)\$\$$", re.DOTALL)


def element(formula: str, display: str) -> ElementTree.Element:
    """One formula. Browsers do not look at ``mathvariant``, so bold letters become those of mathematics in Unicode."""
    math = convert_to_element(" ".join(formula.split()), display=display)
    for letter in math.iter("mi"):
        kind, text = letter.attrib.pop("mathvariant", ""), letter.text or ""
        if kind in ("bold", "double-struck") and len(text) == 1 and text.isascii() and text.isalpha():
            letter.text = variant(kind.upper(), "CAPITAL" if text.isupper() else "SMALL", text.upper())
    return math


def variant(kind: str, size: str, letter: str) -> str:
    """A letter by its name; some of the double-struck ones are older than the rest, and have shorter names."""
    try:
        return unicodedata.lookup(f"MATHEMATICAL {kind} {size} {letter}")
    except KeyError:
        return unicodedata.lookup(f"{kind} {size} {letter}")


class _Inline(InlineProcessor):
    def handleMatch(self, m: re.Match[str], data: str) -> tuple[ElementTree.Element, int, int]:  # noqa: N802
        return element(m[1], "inline"), m.start(0), m.end(0)


class _Block(BlockProcessor):
    def test(self, parent: ElementTree.Element, block: str) -> bool:
        return BLOCK.match(block.strip()) is not None

    def run(self, parent: ElementTree.Element, blocks: list[str]) -> None:
        match = BLOCK.match(blocks.pop(0).strip())
        assert match is not None
        holder = ElementTree.SubElement(parent, "div", {"class": "formula"})
        holder.append(element(match[1], "block"))


class Formulas(Extension):
    """For Python-Markdown."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        """Add both kinds, before escapes and emphasis."""
        md.inlinePatterns.register(_Inline(INLINE, md), "formula", 185)
        md.parser.blockprocessors.register(_Block(md.parser), "formulas", 175)


def makeExtension(**options: Any) -> Formulas:  # noqa: N802
    """What Python-Markdown looks for."""
    return Formulas(**options)
