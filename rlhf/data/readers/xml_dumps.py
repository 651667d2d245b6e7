"""Rows of XML dumps, streamed: the memory depends neither on the size of the file nor on its number of rows.

Two dumps are known by their root element. ``<posts>`` is the Posts.xml of a StackExchange site: one row a
question, with its answers (:mod:`rlhf.data.readers.stackexchange`). ``<mediawiki>`` is a MediaWiki export
with the history of its pages: one row a revision that was undone (:mod:`rlhf.data.readers.wikipedia`).

Neither has a document type or entities of its own, which can blow up a small file or read another one; a file
that declares them is refused.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple
from xml.parsers import expat

from rlhf.data.readers.rows import BadRow, LeftOut
from rlhf.errors import UserError

Numbered = tuple[int, object]

CHUNK = 1 << 18  # bytes parsed at once
CACHE_KIB = 4096  # of the database in which answers wait for their questions; what is more lies on disk
MAX_DEPTH = 16  # of elements; real dumps have 5
UNDONE_WITHIN = 5
"""A revision counts as undone when one of the next 5 brings an earlier text back. Later returns are rather a
change of mind, and take good edits along."""

_KNOWN = "<posts> of a StackExchange Posts.xml or <mediawiki> of a MediaWiki export with page histories"
_NUMBER = re.compile(r"[0-9]{1,18}")  # fits the integers of the database


def rows(stream: BinaryIO, name: str) -> Iterator[Numbered]:
    """The rows of a dump with the lines on which they start; name: of the file, for messages.

    XML that breaks off or is malformed comes as one BadRow value; the rows before it are all given. Raises
    UserError for another root element, for a document type or entities, and for a full temporary folder.
    """
    events = _events(stream, name)
    try:
        root = next(events).path[0]
        if root == "posts":
            yield from _questions(events, name)
        elif root == "mediawiki":
            yield from _undone(events)
        else:
            raise UserError(f"{name}: the root element is <{root}>; expected {_KNOWN}")
    except expat.ExpatError as error:
        yield error.lineno, _broken(error)


def _broken(error: expat.ExpatError) -> BadRow:
    """The XML cannot be read beyond this place."""
    reason = expat.ErrorString(error.code) or "unknown error"
    return BadRow("truncated or malformed XML", reason, error.offset + 1)


class _Event(NamedTuple):
    """The start or the end of an element."""

    path: tuple[str, ...]  # names from the root to this element, without name spaces
    starts: bool
    attributes: Mapping[str, str]
    text: str  # at the end: what stands after the last child
    line: int


def _events(stream: BinaryIO, name: str) -> Iterator[_Event]:
    """Starts and ends of elements in their order; raises ExpatError after the last one that can be read."""
    parser = expat.ParserCreate(namespace_separator=" ")
    parser.buffer_text = True
    path: list[str] = []
    attributes: list[Mapping[str, str]] = []
    text: list[str] = []
    found: list[_Event] = []

    def start(tag: str, values: dict[str, str]) -> None:
        if len(path) == MAX_DEPTH:
            raise UserError(f"{name}:{parser.CurrentLineNumber}: elements nested too deep; expected {_KNOWN}")
        path.append(tag.rpartition(" ")[2])
        attributes.append(values)
        text.clear()
        found.append(_Event(tuple(path), True, values, "", parser.CurrentLineNumber))

    def end(_: str) -> None:
        line = parser.CurrentLineNumber
        found.append(_Event(tuple(path), False, attributes.pop(), "".join(text), line))
        path.pop()
        text.clear()

    def refuse(*_: object) -> None:
        raise UserError(
            f"{name}:{parser.CurrentLineNumber}: declares a document type or entities, which no dump does "
            "and which can expand without limit; remove the <!DOCTYPE ...>"
        )

    parser.StartElementHandler = start
    parser.EndElementHandler = end
    parser.CharacterDataHandler = text.append
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    broken: expat.ExpatError | None = None
    last = False
    while not last and broken is None:
        chunk = stream.read(CHUNK)
        last = not chunk
        try:
            parser.Parse(chunk, last)
        except expat.ExpatError as error:
            broken = error
        yield from found
        found.clear()
    if broken is not None:
        raise broken


# --- StackExchange ---------------------------------------------------------------------------------------

_TABLES = """
CREATE TABLE question (id INTEGER PRIMARY KEY, line INTEGER, title TEXT, body TEXT, accepted TEXT);
CREATE TABLE answer (parent INTEGER, line INTEGER, id TEXT, score TEXT, body TEXT);
"""


def _questions(events: Iterator[_Event], name: str) -> Iterator[Numbered]:
    """One row a question in the order of their ids: {"Id", "Title", "Body", "AcceptedAnswerId", "answers"}.

    An answer is {"Id", "Score", "Body"}. The values are texts as in the file, None where it has none. An
    answer can stand anywhere after (or before) its question, so all posts wait in a temporary database, which
    needs as much room on disk as the file has; the system removes it even if the process is killed. Bad rows
    come first. Answers whose question is not in the file come last, as one LeftOut a question.
    """
    with closing(sqlite3.connect("", isolation_level=None)) as db:  # "": a private file in TMPDIR
        try:
            for pragma in ("journal_mode = OFF", "synchronous = OFF", "temp_store = FILE"):
                db.execute(f"PRAGMA {pragma}")
            db.execute(f"PRAGMA cache_size = {-CACHE_KIB}")
            db.executescript(_TABLES)
            db.execute("BEGIN")
            try:
                yield from _store(events, db, name)
            except expat.ExpatError as error:
                yield error.lineno, _broken(error)
            db.execute("CREATE INDEX of_question ON answer (parent, line)")
            db.execute("COMMIT")
            yield from _grouped(db)
        except sqlite3.OperationalError as error:
            raise UserError(
                f"{name}: its posts do not fit the temporary folder, in which answers are brought to their "
                f"questions ({error}): set TMPDIR to a folder with as much free room as the file has"
            ) from None


def _store(events: Iterator[_Event], db: sqlite3.Connection, name: str) -> Iterator[Numbered]:
    """Put questions and answers into the database; yields what can be neither."""
    first = True
    for path, starts, post, _, line in events:
        if not starts:
            continue
        if path != ("posts", "row"):
            raise UserError(
                f"{name}:{line}: found <{'><'.join(path)}>; a StackExchange Posts.xml holds <row .../>"
            )
        if first and not {"Id", "PostTypeId"} <= set(post):
            fields = ", ".join(sorted(post)) or "no field"
            raise UserError(
                f"{name}:{line}: a <row> with {fields}; the rows of a StackExchange Posts.xml have Id, "
                "PostTypeId, ParentId, Score, Title and Body"
            )
        first = False
        if reason := _put(post, db, line):
            yield line, reason


def _put(post: Mapping[str, str], db: sqlite3.Connection, line: int) -> BadRow | None:
    kind, own, parent = post.get("PostTypeId"), post.get("Id", ""), post.get("ParentId", "")
    if kind is None or not _NUMBER.fullmatch(own):
        return BadRow("a post without PostTypeId or without a number as its Id", f"Id {own[:20]!r}")
    if kind == "1":
        values = (int(own), line, post.get("Title"), post.get("Body"), post.get("AcceptedAnswerId"))
        try:
            db.execute("INSERT INTO question VALUES (?, ?, ?, ?, ?)", values)
        except sqlite3.IntegrityError:
            return BadRow("a question whose Id is taken by an earlier one", f"Id {own}")
    elif kind == "2":
        if not _NUMBER.fullmatch(parent):
            return BadRow("an answer without a number as its ParentId", f"Id {own}, ParentId {parent[:20]!r}")
        answer = (int(parent), line, own, post.get("Score"), post.get("Body"))
        db.execute("INSERT INTO answer VALUES (?, ?, ?, ?, ?)", answer)
    else:
        return LeftOut("a post that is neither a question nor an answer")
    return None


def _grouped(db: sqlite3.Connection) -> Iterator[Numbered]:
    questions = db.execute("SELECT id, line, title, body, accepted FROM question ORDER BY id")
    for own, line, title, body, accepted in questions:
        answers: list[dict[str, Any]] = [
            {"Id": answer, "Score": score, "Body": text}
            for answer, score, text in db.execute(
                "SELECT id, score, body FROM answer WHERE parent = ? ORDER BY line", (own,)
            )
        ]
        row = {"Id": str(own), "Title": title, "Body": body, "AcceptedAnswerId": accepted, "answers": answers}
        yield line, row
    orphans = db.execute(
        "SELECT min(line) FROM answer WHERE parent NOT IN (SELECT id FROM question) GROUP BY parent"
    )
    for (line,) in orphans:
        yield line, LeftOut("answers to a question that is not in the file")


# --- MediaWiki -------------------------------------------------------------------------------------------


@dataclass
class _Revision:
    number: str
    line: int
    text: str | None = None  # None: the file does not have it
    sha1: bytes = b""
    undone: bool = False


def _undone(events: Iterator[_Event]) -> Iterator[Numbered]:
    """One row a revision that a later one undid exactly: {"page", "revision", "restored", "undone"}.

    Exactly: one of the next ``UNDONE_WITHIN`` revisions has the text of a revision before it, to the byte
    (SHA-1). Pages outside the name space 0 (talk, users, ...) come as one LeftOut a page, revisions whose
    text the file does not have (deleted, or a dump of stubs) as one each.
    """
    other_namespaces: set[str] = set()  # exports before version 0.6 name them in the titles only
    title, namespace = "", "0"
    recent: deque[_Revision] = deque(maxlen=UNDONE_WITHIN + 1)
    revision = _Revision("", 0)
    for path, starts, attributes, value, line in events:
        element = "/".join(path[1:])
        if starts:
            if element == "page":
                title, namespace = "", "0"
                recent.clear()
            elif element == "page/revision":
                revision = _Revision("", line)
        elif element == "siteinfo/namespaces/namespace" and attributes.get("key") != "0":
            other_namespaces.add(value)
        elif element == "page/title":
            title = value
            if ":" in value and value.partition(":")[0] in other_namespaces:
                namespace = "other"
        elif element == "page/ns":
            namespace = value.strip()
        elif element == "page/revision/id":
            revision.number = value.strip()
        elif element == "page/revision/text":
            lost = "deleted" in attributes or (not value and attributes.get("bytes", "0") != "0")
            revision.text = None if lost else value
        elif element == "page/revision" and namespace == "0":
            yield from _undone_by(revision, recent, title)
        elif element == "page" and namespace != "0":
            yield line, LeftOut("a page outside the name space of articles")


def _undone_by(revision: _Revision, recent: deque[_Revision], title: str) -> Iterator[Numbered]:
    """The rows of the recent revisions that this one undoes, which it then joins."""
    if revision.text is None:
        yield revision.line, LeftOut("a revision whose text is not in the file")
        return
    revision.sha1 = hashlib.sha1(revision.text.encode(), usedforsecurity=False).digest()
    earlier = list(recent)
    recent.append(revision)
    same = [index for index, one in enumerate(earlier) if one.sha1 == revision.sha1]
    if not same:
        return
    revision.undone = earlier[same[-1]].undone
    if revision.undone:  # A, B, A, B: to call B good would contradict what was said before
        yield revision.line, LeftOut("a text brought back that had been undone itself")
        return
    for one in earlier[same[-1] + 1 :]:
        if not one.undone:
            one.undone = True
            texts = {"restored": revision.text, "undone": one.text}
            yield one.line, {"page": title, "revision": one.number, **texts}
