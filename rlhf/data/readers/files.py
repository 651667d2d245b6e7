"""From a spec (a path, a glob, a hub data set) to numbered rows; knows files, not formats of comparisons."""

from __future__ import annotations

import contextlib
import glob
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO, cast

from rlhf.data.readers import xml_dumps as xml
from rlhf.data.readers.rows import BadRow, Origin
from rlhf.data.readers.tables import delimited
from rlhf.errors import UserError

HUB = "hub:"  # hub:NAME[/FOLDER][:CONFIG][@SPLIT]
LINE_LIMIT = ContextVar("LINE_LIMIT", default=64 << 20)
"""Bytes of the longest line, or row of a .json file: the recipe's ``data.max_line_megabytes``."""
_CHUNK = 1 << 16


def origins(specs: Sequence[str], *, key: str) -> Iterator[Origin]:
    """The origins that the specs name, in order; a glob gives its files sorted by name.

    key: the recipe's key that holds the specs, named in messages. A file whose name holds glob characters
    is taken literally if it exists. Raises UserError for a spec that names nothing.
    """
    if not specs:
        raise UserError(f"{key} names no file: give a path, a glob or {HUB}NAME[:CONFIG][@SPLIT]")
    for spec in specs:
        if spec.startswith(HUB):
            yield _hub(spec, key)
        else:
            yield from map(local, paths_of(spec, key=key))


def paths_of(spec: str, *, key: str) -> list[Path]:
    """The files of a spec that is not of the hub; raises UserError for a pattern that matches none."""
    path = Path(spec).expanduser()
    if path.exists() or not glob.has_magic(spec):
        return [path]
    matches = sorted(match for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
    if not matches:
        raise UserError(f"{key}: the pattern {spec!r} matches no file")
    return [Path(match) for match in matches]


def local(path: Path) -> Origin:
    """A local file; its source label is the name without the endings.

    Every site of StackExchange calls its dump Posts.xml: there the label is the name of the folder.
    """
    kind = _kind(path)
    name = _plain_name(path)[: -len(kind)]
    source = path.resolve().parent.name if (name, kind) == ("Posts", ".xml") else name
    by_line = kind in (".jsonl", ".csv", ".tsv", ".txt", ".xml")
    return Origin(str(path), source or name, rows(path), by_line, texts_only=kind in (".csv", ".tsv"))


def rows(path: Path) -> Iterator[tuple[int, object]]:
    """The rows of a .jsonl, .json, .csv, .tsv, .parquet, .xml or .txt file, each also as .gz, from 1.

    The number is that of the line on which the row starts, or of the row (.json, .parquet). A .json file
    holds a list, or an object with a list under "data" or "examples". An .xml file is a dump that
    :mod:`rlhf.data.readers.xml_dumps` knows. A .txt row is a str. Blank lines are no rows. A row that is
    broken by itself comes as a BadRow *value*, so that the rows after it can still be read.

    Raises UserError for a missing file, an unknown ending, a broken archive, or text that is not UTF-8.
    """
    return _KINDS[_kind(path)](path)


def _plain_name(path: Path) -> str:
    return path.name.removesuffix(".gz")


def _kind(path: Path) -> str:
    kind = Path(_plain_name(path)).suffix
    if path.is_dir():
        raise UserError(f"{path} is a directory: name its files, for example {path / '*.jsonl'}")
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if not path.is_file():
        raise UserError(f"{path}: a pipe or a device, which may have no end: write it to a file first")
    if kind not in _KINDS:
        raise UserError(f"{path}: unknown kind of file; known: {', '.join(_KINDS)}, each also with .gz")
    return kind


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unzipped."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            yield cast(BinaryIO, stream)
    except (EOFError, zlib.error, OSError) as error:
        damaged = path.suffix == ".gz" and not isinstance(error, PermissionError)
        what = "truncated or damaged gzip file" if damaged else "cannot be read"
        raise UserError(f"{path}: {what} ({error}){'; fetch it again' if damaged else ''}") from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends; decoded one by one, so that a bad byte has a line number."""
    limit = LINE_LIMIT.get()
    with _opened(path) as stream:
        for number, line in enumerate(iter(lambda: stream.readline(limit + 1), b""), 1):
            if len(line) > limit:
                raise UserError(f"{path}:{number}: {_too_long('line', limit)}")
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                fault = f"not UTF-8 text ({error.reason}); save it as UTF-8"
                raise UserError(f"{path}:{number}: {fault}") from None


def _bytes(path: Path) -> bytes:
    with _opened(path) as stream:
        return stream.read()


def _txt(path: Path) -> Iterator[tuple[int, object]]:
    for number, line in _lines(path):
        if line.strip():
            yield number, line.rstrip("\r\n")


def _jsonl(path: Path) -> Iterator[tuple[int, object]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line.rstrip("\r\n"))  # a line end would move the column of an error
        except json.JSONDecodeError as error:
            row = BadRow("not valid JSON", f"{error.msg} at column {error.colno}")
        except (ValueError, RecursionError) as error:  # an integer of 5,000 digits; 10,000 nested lists
            row = BadRow("not valid JSON", str(error))
        yield number, row


def _too_long(what: str, limit: int) -> str:
    return f"the {what} is longer than {limit >> 20} MB; mend the file, or raise data.max_line_megabytes"


class _JsonText:
    """A JSON text, read a value at a time: the memory does not depend on the length of a list."""

    def __init__(self, stream: BinaryIO) -> None:
        self._text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        self._buffer, self._at, self._line, self._ended = "", 0, 1, False

    def _more(self) -> bool:
        """Read on, twice as far each time; False at the end."""
        self._line += self._buffer.count("\n", 0, self._at)
        self._buffer, self._at = self._buffer[self._at :], 0
        more = self._text.read(max(_CHUNK, len(self._buffer)))
        self._buffer += more
        self._ended = not more
        return bool(more)

    def peek(self) -> str:
        """The next character that is no white space; nothing at the end."""
        while True:
            while self._at < len(self._buffer):
                if not self._buffer[self._at].isspace():
                    return self._buffer[self._at]
                self._at += 1
            if not self._more():
                return ""

    def skip(self, wanted: str) -> None:
        """Step over a character that has to come."""
        if self.peek() != wanted:
            raise json.JSONDecodeError(f"Expecting {wanted!r}", self._buffer, self._at)
        self._at += 1

    def end(self) -> None:
        """See that nothing comes any more."""
        if self.peek():
            raise json.JSONDecodeError("Extra data", self._buffer, self._at)

    def value(self) -> Any:
        """The next value, whole."""
        self.peek()
        while True:
            try:
                found, end = json.JSONDecoder().raw_decode(self._buffer, self._at)
                behind = self._buffer[end : end + 1]  # nothing of a number: 1 may be 1.5
                whole = self._ended or (behind != "" and behind in ",:]} \t\r\n")
            except json.JSONDecodeError:
                if self._ended:
                    raise
                whole, end = False, len(self._buffer)
            if end - self._at > LINE_LIMIT.get():
                raise OverflowError
            if whole:
                self._at = end
                return found
            self._more()

    def line_of(self, error: json.JSONDecodeError) -> int:
        """Where in the file an error is."""
        return self._line + error.lineno - 1

    def members(self, close: str) -> Iterator[None]:
        """Step into a list or an object and from member to member, up to the end."""
        self._at += 1
        while self.peek() != close:
            yield
            if self.peek() != close:
                self.skip(",")
        self._at += 1


def _json(path: Path) -> Iterator[tuple[int, object]]:
    with _opened(path) as stream:
        text = _JsonText(stream)
        try:
            yield from enumerate(_json_rows(path, text), 1)
            text.end()
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text ({error.reason}); save it as UTF-8") from None
        except json.JSONDecodeError as error:
            hint = "; a file with one object a line is named .jsonl" if error.msg == "Extra data" else ""
            raise UserError(f"{path}:{text.line_of(error)}: not valid JSON: {error.msg}{hint}") from None
        except OverflowError:
            raise UserError(f"{path}: {_too_long('row', LINE_LIMIT.get())}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not valid JSON: {error}") from None


def _json_rows(path: Path, text: _JsonText) -> Iterator[object]:
    """The rows of a list, or of the list under "data" or "examples" of an object."""
    found = text.peek() == "["
    if found:
        for _ in text.members("]"):
            yield text.value()
    elif text.peek() == "{":
        for _ in text.members("}"):
            name = text.value()
            text.skip(":")
            if not found and name in ("data", "examples") and text.peek() == "[":
                found = True
                for _ in text.members("]"):
                    yield text.value()
            else:
                text.value()
    else:
        text.value()
    if not found and not text.peek():
        raise UserError(f'{path}: expected a list of rows, or an object with a list "data" or "examples"')


def _csv(path: Path) -> Iterator[tuple[int, object]]:
    tabs = _kind(path) == ".tsv"
    return delimited.rows(path, lambda: _lines(path), tabs=tabs, limit=LINE_LIMIT.get())


def _parquet(path: Path) -> Iterator[tuple[int, object]]:
    # Here and not at the top: most runs read no parquet, and the import takes longer than the reading.
    import pyarrow
    from pyarrow import parquet

    try:
        source = io.BytesIO(_bytes(path)) if path.suffix == ".gz" else path
        number = 0
        for batch in parquet.ParquetFile(source).iter_batches(batch_size=256):
            for number, row in enumerate(batch.to_pylist(), number + 1):  # noqa: B020 - the count goes on
                yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({error})") from None


def _xml(path: Path) -> Iterator[tuple[int, object]]:
    with _opened(path) as stream:
        yield from xml.rows(stream, str(path))


_KINDS: dict[str, Callable[[Path], Iterator[tuple[int, object]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".xml": _xml,
    ".txt": _txt,
}


def _hub(spec: str, key: str) -> Origin:
    """A data set of the hub, or one folder of it, by ``datasets.load_dataset``; split "train" by default."""
    name_and_config, _, split = spec.removeprefix(HUB).partition("@")
    name, _, config = name_and_config.partition(":")
    if not name:
        raise UserError(f"{key}: {spec!r} names no data set; write {HUB}NAME[:CONFIG][@SPLIT]")
    owner, *rest = name.split("/", 2)
    name, folder = "/".join([owner, *rest[:1]]), rest[1:]
    options = {"data_dir": folder[0]} if folder else {}
    try:
        import datasets

        table = datasets.load_dataset(name, config or None, split=split or "train", **options)
    except Exception as error:  # the hub client raises a dozen unrelated types, and all have one remedy
        cause = (str(error).strip().splitlines() or [""])[0][:200]
        raise UserError(
            f"{spec}: cannot be loaded from the hub ({type(error).__name__}: {cause}); "
            f"download it and give local files by {key}=..."
        ) from None
    return Origin(spec, name.rsplit("/", 1)[-1], iter(enumerate(table, 1)), numbered_by_line=False)
