"""Held-out language-model loss: how well a model predicts plain text, in nats a token and a byte.

A text is cut into windows of some two thousand characters at white space; each window is read alone, behind
the fixed text or BOS (EOS where the tokenizer has no BOS). Windows do not depend on the tokenizer, so models
with different tokenizers meet the same items; only the loss a byte compares such models.

- ``nats_per_byte``: -log P(window) / bytes of its UTF-8 text; stands for the task;
- ``nats_per_token``: -log P(window) / its tokens;
- aggregates of the same names: sums over all windows divided by each other; ``perplexity``: exp of the
  aggregate loss a token.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rlhf.data.readers.files import HUB, paths_of
from rlhf.data.readers.rows import Row
from rlhf.errors import UserError
from rlhf.evals.items import Place, missing, parsed
from rlhf.evals.outcome import Outcome
from rlhf.evals.tasks.lambada import perplexity

if TYPE_CHECKING:
    from rlhf.evals.model import LanguageModel

TASK = "lm_loss"
EXPECTED = 'a .txt file, or rows with a field "text"'
WINDOW = 2000  # characters


class Item(NamedTuple):
    """One window of a text."""

    id: str
    """Label of the file, of the row in it where it has rows, and the number of the window."""
    group: str
    """Label of the file."""
    text: str
    """The window."""


def read(files: Sequence[str], *, key: str = "tax.tasks.lm_loss.files", window: int = WINDOW) -> list[Item]:
    """The windows of .txt files (each one text) and of rows with a field ``text``.

    Raises:
        UserError: a file or a row cannot be used (file and line), or there is no text at all.
    """
    items: list[Item] = []
    for spec in (one for many in files for one in _single(many, key)):
        if spec.endswith((".txt", ".txt.gz")):
            label = Path(spec).name.removesuffix(".gz").removesuffix(".txt")
            items += _windows(label, label, _text(Path(spec)), window)
            continue
        for name, source, text in parsed([spec], _parse, key=key, expected=EXPECTED):
            items += _windows(name, source, text, window)
    if not items:
        raise UserError(f"{key}: no text in {', '.join(files) or 'no file'}; expected {EXPECTED}")
    return _distinct(items)


def _parse(row: Row, place: Place) -> tuple[str, str, str]:
    """Name of the row, label of its file, text, which may be empty."""
    if not isinstance(row.get("text"), str):
        raise missing(row, "text", "text")
    return place.name, place.origin.source, row["text"]


def _single(spec: str, key: str) -> list[str]:
    """The files of a spec, each by its path; a hub data set stays as it is."""
    return [spec] if spec.startswith(HUB) else [str(path) for path in paths_of(spec, key=key)]


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8 text ({error.reason}); save it as UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{path}: cannot be read ({reason}); check the path, or fetch the file again"
        ) from None


def _windows(name: str, group: str, text: str, size: int) -> Iterator[Item]:
    for number, piece in enumerate(windows(text, size), 1):
        if piece.strip():
            yield Item(f"{name}:{number}", group, piece)


def _distinct(items: Sequence[Item]) -> list[Item]:
    seen: dict[str, int] = {}
    found = []
    for item in items:
        seen[item.id] = seen.get(item.id, 0) + 1
        found.append(item if seen[item.id] == 1 else item._replace(id=f"{item.id}({seen[item.id]})"))
    return found


def windows(text: str, size: int) -> Iterator[str]:
    """Pieces of at most ``size`` characters whose concatenation is the text.

    A piece ends before white space where there is some in its second half, so that words stay whole and take
    the space before them along, as tokenizers want it.
    """
    start = 0
    while start < len(text):
        end = min(start + size, len(text))
        if end < len(text) and not text[end].isspace():
            spaces = [m.start() for m in re.finditer(r"\s", text[start:end])]
            if spaces and spaces[-1] >= max(1, size // 2):
                end = start + spaces[-1]
        yield text[start:end]
        start = end


def run(lm: LanguageModel, items: Sequence[Item]) -> Outcome:
    """Score every window from its first token on.

    Raises:
        UserError: a window is too long for the model's.
    """
    scored = lm.score([([], lm.encode(item.text)) for item in items], names=[item.id for item in items])
    nats, tokens = [-s.log_prob for s in scored], [s.tokens for s in scored]
    sizes = [len(item.text.encode()) for item in items]
    per_token = sum(nats) / sum(tokens)
    return Outcome.of(
        TASK,
        "nats_per_byte",
        items,
        [
            {"nats_per_byte": n / size, "nats_per_token": n / count}
            for n, size, count in zip(nats, sizes, tokens, strict=True)
        ],
        higher_is_better=False,
        aggregate={
            "nats_per_byte": sum(nats) / sum(sizes),
            "nats_per_token": per_token,
            "perplexity": perplexity([per_token]),
            "tokens": float(sum(tokens)),
            "bytes": float(sum(sizes)),
        },
    )
