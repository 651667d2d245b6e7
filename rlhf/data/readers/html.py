"""HTML of posts to Markdown, in which most of them were written.

No word is lost. Layout that carries meaning stays: paragraphs, headings (#), lists (-, 1.), quotations (>),
code blocks verbatim between ``` fences, `inline code`, ~~struck out~~, powers and indices (2^10, x_(ij)),
table rows (| a | b |), rules (---), links as "text (address)", images as "[image: description (address)]".
Emphasis, comments and all other attributes are layout without words and go. Entities are decoded.
"""

from __future__ import annotations

import re
from typing import Any

from bs4 import BeautifulSoup
from markdownify import ATX, MarkdownConverter


def text_of(html: str) -> str:
    """The text of a fragment of HTML, without white space at its ends; never fails, whatever the input."""
    try:
        return str(_Converter().convert(html)).strip()
    except RecursionError:  # hundreds of elements in each other: no layout that anybody could see
        return BeautifulSoup(html, _Converter.Options.bs4_options).get_text(" ").strip()


class _Converter(MarkdownConverter):
    """Markdown without escapes, with links, images, powers and indices as plain text has them."""

    class Options:
        bs4_options = "lxml"  # closes what posts leave open
        heading_style = ATX
        bullets = "-"
        escape_asterisks = escape_underscores = False
        strong_em_symbol = ""
        wrap, wrap_width = True, None  # white space of the source is one space

    def process_text(self, el: Any, parent_tags: set[str]) -> str:
        text = str(super().process_text(el, parent_tags))  # type: ignore[misc]
        if "pre" not in parent_tags:
            text = text.lstrip(" ") if getattr(el.previous_sibling, "name", "") == "br" else text
            text = text.rstrip(" ") if getattr(el.next_sibling, "name", "") == "br" else text
        return text

    def convert_a(self, el: Any, text: str, parent_tags: set[str]) -> str:
        url = (el.get("href") or "").strip()
        if "_noformat" in parent_tags or url in ("", text.strip()):
            return text
        return f"{text} ({url})" if text else f"({url})"

    def convert_br(self, el: Any, text: str, parent_tags: set[str]) -> str:
        return "\n" + text

    def convert_img(self, el: Any, text: str, parent_tags: set[str]) -> str:
        words = [el.get("alt"), f"({el['src'].strip()})" if el.get("src") else None]
        found = " ".join(filter(None, words))
        return f"[image: {found}]" if found else ""

    def convert_pre(self, el: Any, text: str, parent_tags: set[str]) -> str:
        code = el.get_text().removeprefix("\n").rstrip()
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
        return f"\n\n{fence}\n{code}\n{fence}\n\n" if code else ""

    def convert_sub(self, el: Any, text: str, parent_tags: set[str], mark: str = "_") -> str:
        words = text.strip()
        if "_noformat" in parent_tags or not words or re.search(r"\s", words):  # longer ones are small print
            return text
        return mark + (words if len(words) == 1 or words.isdecimal() else f"({words})")

    def convert_sup(self, el: Any, text: str, parent_tags: set[str]) -> str:
        return self.convert_sub(el, text, parent_tags, "^")
