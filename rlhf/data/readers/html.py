"""HTML of posts to plain text in the manner of Markdown, in which most of them were written.

No word is lost. Layout that carries meaning stays: paragraphs, headings (#), lists (-, 1.), quotations (>),
code blocks verbatim between ``` fences, `inline code`, ~~struck out~~, powers and indices (2^10, x_(ij)),
table rows (a | b), rules (---), links as "text (address)", images as "[image: description (address)]".
Emphasis, comments and all other attributes are layout without words and go. Entities are decoded.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser

_SPACE = re.compile(r"[ \t\r\n\f]+")  # HTML's own; a non-breaking space stays
_HEADINGS = frozenset(("h1", "h2", "h3", "h4", "h5", "h6"))
_LINES = frozenset(("ul", "ol", "table", "thead", "tbody", "tfoot"))  # their blocks are lines, not paragraphs
_BLOCKS = _HEADINGS | _LINES | {"p", "div", "pre", "blockquote", "li", "tr", "td", "th", "dl", "dt", "dd"}
_BLOCKS |= {"article", "aside", "details", "figcaption", "figure", "footer", "header", "section", "summary"}
_INLINE = frozenset(("a", "code", "sup", "sub", "del", "s", "strike"))
_CLOSED_BY = {  # an end tag that may be left out: start tag -> (open element that it ends, as far as these)
    "p": (("p",), ("li", "blockquote", "div", "td", "th")),
    "li": (("li",), ("ul", "ol")),
    "tr": (("tr",), ("table",)),
    "td": (("td", "th"), ("tr", "table")),
    "th": (("td", "th"), ("tr", "table")),
}


def text_of(html: str) -> str:
    """The text of a fragment of HTML, without white space at its ends; never fails, whatever the input."""
    parser = _Parser()
    parser.feed(html)
    parser.close()
    return parser.text()


class _Element:
    """An open element: finished blocks (paragraphs, lists, ...) and the running text after them."""

    def __init__(self, tag: str, attributes: dict[str, str | None]) -> None:
        self.tag = tag
        self.attributes = attributes
        self.blocks: list[str] = []
        self.running: list[str] = []

    def flush(self) -> None:
        """Make the running text a block."""
        lines = "".join(self.running).split("\n")
        block = "\n".join(re.sub("  +", " ", line).strip(" ") for line in lines).strip("\n")
        self.running.clear()
        if block:
            self.blocks.append(block)

    def content(self) -> str:
        self.flush()
        return "\n\n".join(self.blocks)


class _Parser(HTMLParser):
    """Keeps the open elements on a stack; an element that ends is written into the one around it."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._open = [_Element("", {})]

    def text(self) -> str:
        while len(self._open) > 1:
            self._end()
        return self._open[0].content().strip()

    def handle_data(self, data: str) -> None:
        self._open[-1].running.append(data if self._verbatim() else _SPACE.sub(" ", data))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if tag == "br":
            self._open[-1].running.append("\n")
        elif tag == "img":
            words = " ".join(filter(None, (attributes.get("alt"), _address(attributes.get("src")))))
            self._open[-1].running.append(f"[image: {words}]" if words else "")
        elif tag == "hr" and not self._verbatim():
            self._open[-1].flush()
            self._open[-1].blocks.append("---")
        elif (tag in _BLOCKS or tag in _INLINE) and not self._verbatim():
            if tag in _CLOSED_BY:
                self._end_last(*_CLOSED_BY[tag])
            if tag in _BLOCKS:
                self._open[-1].flush()
            self._open.append(_Element(tag, attributes))

    def handle_endtag(self, tag: str) -> None:
        if tag == "pre" or not self._verbatim():
            self._end_last((tag,), ())

    def unknown_decl(self, data: str) -> None:
        """Keep the words of <![CDATA[...]]>, which HTML has not, but posts may."""
        self.handle_data(data.removeprefix("CDATA["))

    def _verbatim(self) -> bool:
        """Whether this is code: all tags but the one that ends it are decoration."""
        return self._open[-1].tag == "pre"

    def _end_last(self, tags: tuple[str, ...], within: tuple[str, ...]) -> None:
        """End the innermost element of one of the tags and all inside it, looking no further than within."""
        for depth in range(len(self._open) - 1, 0, -1):
            if self._open[depth].tag in tags:
                while len(self._open) > depth:
                    self._end()
                return
            if self._open[depth].tag in within:
                return

    def _end(self) -> None:
        element = self._open.pop()
        around = self._open[-1]
        if element.tag == "pre":
            code = "".join(element.running)
            around.blocks += [_fenced(code)] if code.strip() else []
        elif element.tag in _INLINE:
            around.running.append(_inline(element))
        elif block := _block(element, around):
            around.blocks.append(block)


def _address(url: str | None) -> str:
    return f"({url.strip()})" if url and url.strip() else ""


def _inline(element: _Element) -> str:
    raw = "".join(element.running)
    words = element.content()
    before, after = raw[:1].isspace() * " ", raw[-1:].isspace() * " "
    match element.tag:
        case "a":
            url = (element.attributes.get("href") or "").strip()
            words = words if url in ("", words) else f"{words} {_address(url)}".strip()
        case "code" if words:
            ticks = "``" if "`" in words else "`"
            words = f"{ticks}{words}{ticks}"
        case "sup" | "sub" if words and not re.search(r"\s", words):  # longer ones are small print
            mark = "^" if element.tag == "sup" else "_"
            words = mark + (words if len(words) == 1 or words.isdecimal() else f"({words})")
        case "del" | "s" | "strike" if words:
            words = f"~~{words}~~"
    return f"{before}{words}{after}"


def _block(element: _Element, around: _Element) -> str:
    words = element.content()
    if element.tag in _LINES:
        words = "\n".join(element.blocks)
    elif element.tag in _HEADINGS and words:
        words = "#" * int(element.tag[1]) + " " + words
    elif element.tag == "blockquote":
        words = "\n".join(f"> {line}".rstrip() for line in words.split("\n") if words)
    elif element.tag == "tr":
        words = " | ".join(element.blocks)
    elif element.tag == "li" and words:
        mark = f"{_number(around)}. " if around.tag == "ol" else "- "
        words = mark + re.sub(r"\n(?!\n)", "\n" + " " * len(mark), words)
    return words


def _number(items: _Element) -> int:
    start = items.attributes.get("start") or "1"
    return (int(start) if re.fullmatch("[0-9]{1,9}", start) else 1) + len(items.blocks)


def _fenced(code: str) -> str:
    """A block of code; the fence is longer than every row of back ticks in the code."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    lines = code.removeprefix("\n").rstrip()
    return f"{fence}\n{lines}\n{fence}"
