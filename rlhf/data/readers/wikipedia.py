"""Edits of Wikipedia that were undone, as pairs (Askell et al. 2021, arXiv:2112.00861, section 4.1).

The text that was brought back is preferred to the one that was undone; :mod:`rlhf.data.readers.xml_dumps`
finds both in the page histories of a MediaWiki export.

Articles are long, so a response is an excerpt: it begins with the line of the first difference (with the line
before, where the difference begins at a line), ends with that of the last one (or the line after), and has at
most ``MAX_EXCERPT`` characters. The lines around the difference are the same in both. The prompt is one user
message: "Wikipedia article: TITLE", a blank line, and what stands before the excerpt, at most ``MAX_BEFORE``
characters. Cuts are made at the ends of lines; only in a line that is too long, between words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from rlhf.data.comparisons import Comparison, Message
from rlhf.data.readers.rows import LeftOut, Reader, Row, is_text

MAX_EXCERPT = 2000
"""Characters of a response."""
MAX_BEFORE = 1000
"""Characters of the article in the prompt."""
MAX_CONTEXT = 300
"""Characters of shared text before, and after, the difference in a response."""
_SPACE = re.compile(r"\s+")


def parse(row: Row, source: str) -> Iterator[Comparison | LeftOut]:
    """The row's pair. A page blank on one side, and edits of white space, say nothing on writing: LeftOut."""
    title = f"Wikipedia article: {row['page']}"
    good, bad = row["restored"], row["undone"]
    if not good.strip() or not bad.strip():
        yield LeftOut("a blank page", (Message("user", title),))
        return
    before, *sides = excerpts(good, bad)
    prompt = (Message("user", f"{title}\n\n{before}".strip()),)
    words = [side.split() for side in sides]
    if words[0] == words[1] or not all(words):
        yield LeftOut("an edit without a difference of words in its excerpt", prompt)
    else:
        yield Comparison(prompt, tuple(sides), (0, 1), source)


def excerpts(good: str, bad: str) -> tuple[str, str, str]:
    """(text before, excerpt of good, excerpt of bad) of two different texts.

    Both excerpts start at one place of the shared beginning and, unless cut for their length, end at one
    place of the shared end.
    """
    prefix = _shared(good, bad)
    suffix = _shared(good[prefix:][::-1], bad[prefix:][::-1])
    start = _start(good[:prefix])
    end = _end(good[len(good) - suffix :])
    sides = [_cut(side[start : len(side) - suffix + end], prefix - start) for side in (good, bad)]
    return _before(good[:start]), sides[0], sides[1]


def _shared(a: str, b: str) -> int:
    """The length of the common beginning, by bisection: slices compare much faster than a loop."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _start(shared: str) -> int:
    """Where the last line with words starts, or a word at most MAX_CONTEXT before its end."""
    words_end = len(shared.rstrip())
    if not words_end:
        return len(shared)
    lowest = max(0, words_end - MAX_CONTEXT)
    line = shared.rfind("\n", max(0, lowest - 1), words_end)
    if line >= 0 or not lowest:
        return line + 1
    space = _SPACE.search(shared, lowest, words_end)
    return space.end() if space else lowest


def _end(shared: str) -> int:
    """Where the first line with words ends, or a word at most MAX_CONTEXT after its start."""
    words_start = len(shared) - len(shared.lstrip())
    if words_start == len(shared):
        return 0
    highest = words_start + MAX_CONTEXT
    line = shared.find("\n", words_start, highest + 1)
    if line >= 0:
        return line
    return len(shared) if len(shared) <= highest else _last_space(shared, words_start, highest)


def _cut(text: str, difference: int) -> str:
    """At most MAX_EXCERPT characters, with the one at ``difference`` where there is room for it."""
    if len(text) > MAX_EXCERPT:
        line = text.rfind("\n", max(difference + 1, MAX_EXCERPT // 2), MAX_EXCERPT + 1)
        text = text[: line if line >= 0 else _last_space(text, difference + 1, MAX_EXCERPT)]
    return text.strip("\n").rstrip()


def _last_space(text: str, low: int, high: int) -> int:
    spaces = [space.start() for space in _SPACE.finditer(text, low, high + 1)]
    return spaces[-1] if spaces else high


def _before(text: str) -> str:
    """The last lines of a text, at most MAX_BEFORE characters; words, where a line is longer."""
    piece = text[-MAX_BEFORE:]
    if len(piece) < len(text):
        lines = piece.partition("\n")[2]
        words = _SPACE.sub("\n", piece.strip(), count=1).partition("\n")[2]
        piece = lines if lines.strip() else words
    return piece.strip()


READER = Reader(
    'undone edits of a MediaWiki export, {"page", "restored", "undone"}',
    lambda row: is_text(row, "page", "restored", "undone"),
    parse,
)
