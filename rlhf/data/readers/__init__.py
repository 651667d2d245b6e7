"""Readers of public preference data: one small module per format, each yields :class:`Comparison`.

The format of each row is recognized from its fields; files of several formats may be mixed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence, Sized
from typing import TypeVar

from rlhf.data.comparisons import (
    Comparison,
    Counts,
    OnBadRows,
    Prompt,
    Repeats,
    deduplicate,
    problem,
    usable_part,
)
from rlhf.data.readers import hh, native, oasst, reddit, stackexchange, trl, wikipedia
from rlhf.data.readers.files import origins
from rlhf.data.readers.given import KEY as COLUMNS
from rlhf.data.readers.given import Columns, key_of, renamed
from rlhf.data.readers.public import PUBLIC
from rlhf.data.readers.rows import LeftOut, Origin, Reader
from rlhf.data.readers.sieve import sift
from rlhf.errors import UserError

# The order is that of recognition: TRL's fields are the least particular, so it comes last.
READERS: tuple[Reader[Comparison], ...] = (
    native.ANSWERS,
    *(module.READER for module in (native, oasst, stackexchange, reddit, wikipedia, hh)),
    *PUBLIC,
    trl.READER,
)
T = TypeVar("T")
Refuses = Callable[[Prompt], str | None]
"""Why a model's chat template cannot render a prompt, or None."""


def no_refusal(prompt: Prompt) -> None:
    """A template that refuses nothing."""


def stream_comparisons(
    specs: Sequence[str],
    *,
    on_bad_rows: OnBadRows,
    counts: Counts,
    key: str = "data.comparisons",
    refuses: Refuses = no_refusal,
    columns: Columns = {},  # noqa: B006 - never changed
) -> Iterator[Comparison]:
    """The comparisons that the specs name, in their order, checked, one at a time; repeats stay.

    specs, on_bad_rows, refuses and columns as in :func:`read_comparisons`; key: the recipe's key that holds
    the specs, named in messages. ``counts`` is complete when the iterator is at its end. The memory does not
    depend on the size of the files, except for gzipped .parquet and for formats whose comparisons span rows.
    """
    readers = [reader.then(lambda item: [_usable_part(item, counts)]) for reader in READERS]
    try:
        for origin in (renamed(origin, columns) for origin in origins(specs, key=key)):
            yield from sift(origin, readers, lambda c: problem(c) or refuses(c.prompt), on_bad_rows, counts)
    except UserError as error:
        raise UserError(str(error).replace(COLUMNS, key_of(key))) from None


def _usable_part(item: Comparison | LeftOut, counts: Counts) -> Comparison | LeftOut:
    """Without the empty and invalid responses, which are counted, where at least two others are there."""
    if isinstance(item, LeftOut) or (part := usable_part(item)) is item:
        return item
    if len(set(part.ranks)) < 2 and len(set(item.ranks)) > 1:
        return LeftOut("only ties are left without empty or invalid responses", item.prompt)
    counts.unusable_responses += len(item.responses) - len(part.responses)
    return part


def read_comparisons(
    specs: Sequence[str],
    *,
    on_bad_rows: OnBadRows,
    key: str = "data.comparisons",
    refuses: Refuses = no_refusal,
    columns: Columns = {},  # noqa: B006 - never changed
    repeats: Repeats = "once",
) -> tuple[list[Comparison], Counts]:
    """Read, check and de-duplicate the comparisons that the specs name, in their order.

    specs: paths, globs (sorted) or ``hub:NAME[:CONFIG][@SPLIT]``. on_bad_rows: "stop" raises UserError with
    file and line at the first bad row, "skip" leaves bad rows out and counts them by reason. key: the
    recipe's key that holds the specs, named in messages. refuses: why a prompt cannot be rendered; such a
    row is a bad one. repeats: as of :func:`rlhf.data.comparisons.deduplicate`.

    Raises UserError also for specs that name nothing, unreadable files, files of an unknown format, and when
    nothing is left.
    """
    counts = Counts()
    comparisons = deduplicate(
        stream_comparisons(
            specs, on_bad_rows=on_bad_rows, counts=counts, key=key, refuses=refuses, columns=columns
        ),
        counts,
        repeats,
    )
    _check_some("comparison", comparisons, specs, counts)
    return comparisons, counts


def read_distinct(
    noun: str,
    specs: Sequence[str],
    readers: Sequence[Reader[T]],
    problem: Callable[[T], str | None],
    identity: Callable[[T], Hashable],
    *,
    on_bad_rows: OnBadRows,
    key: str,
    prepare: Callable[[Origin], Origin] = lambda origin: origin,
) -> tuple[list[T], Counts]:
    """The same for items of another kind.

    Args:
        noun: what an item is called in messages.
        specs: as in :func:`read_comparisons`, on_bad_rows too.
        readers: the formats, in the order of recognition.
        problem: why an item cannot be used, or None.
        identity: of two items with an equal one the first stays.
        on_bad_rows: ``stop`` or ``skip``.
        key: the recipe's key that holds the specs, named in messages.
        prepare: changes what is read before it is parsed.
    """
    counts = Counts()
    kept: dict[Hashable, T] = {}
    for origin in origins(specs, key=key):
        for item in sift(prepare(origin), readers, problem, on_bad_rows, counts):
            if identity(item) in kept:
                counts.drop(f"duplicate {noun}")
            else:
                kept[identity(item)] = item
    _check_some(noun, kept, specs, counts)
    return list(kept.values()), counts


def _check_some(noun: str, found: Sized, specs: Sequence[str], counts: Counts) -> None:
    if not found:
        raise UserError(f"no usable {noun} in {', '.join(specs)}: {counts}")
