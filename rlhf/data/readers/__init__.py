"""Readers of public preference data: one small module per format, each yields :class:`Comparison`.

The format of each row is recognised from its fields; files of several formats may be mixed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rlhf.data.comparisons import Comparison, Counts, OnBadRows, deduplicate, problem
from rlhf.data.readers import hh, native, oasst, reddit, stackexchange, trl, wikipedia
from rlhf.data.readers.files import origins
from rlhf.data.readers.rows import Reader, sift
from rlhf.errors import UserError

# The order is that of recognition: TRL's fields are the least particular, so it comes last.
READERS: tuple[Reader[Comparison], ...] = (native, oasst, stackexchange, reddit, wikipedia, hh, trl)


def stream_comparisons(
    specs: Sequence[str], *, on_bad_rows: OnBadRows, counts: Counts, key: str = "data.comparisons"
) -> Iterator[Comparison]:
    """The comparisons that the specs name, in their order, checked, one at a time; repeats stay.

    specs and on_bad_rows as in :func:`read_comparisons`; key: the recipe's key that holds the specs, named
    in messages. ``counts`` is complete when the iterator is at its end. The memory does not depend on the
    size of the files, except for .json and for gzipped .parquet, which are read whole.
    """
    for origin in origins(specs, key=key):
        yield from sift(origin, READERS, problem, on_bad_rows, counts)


def read_comparisons(
    specs: Sequence[str], *, on_bad_rows: OnBadRows, min_confidence: float | None = None
) -> tuple[list[Comparison], Counts]:
    """Read, check and de-duplicate the comparisons that the specs name, in their order.

    specs: paths, globs (sorted) or ``hub:NAME[:CONFIG][@SPLIT]``. on_bad_rows: "stop" raises UserError with
    file and line at the first bad row, "skip" leaves bad rows out and counts them by reason. min_confidence:
    leave out comparisons whose recorded confidence is lower; those without a recorded one stay.

    Raises UserError also for specs that name nothing, unreadable files, files of an unknown format, and when
    nothing is left.
    """
    counts = Counts()
    comparisons = list(stream_comparisons(specs, on_bad_rows=on_bad_rows, counts=counts))
    if min_confidence is not None:
        sure = [c for c in comparisons if c.confidence is None or c.confidence >= min_confidence]
        if len(sure) < len(comparisons):
            counts.drop(f"confidence under {min_confidence:g}", len(comparisons) - len(sure))
        comparisons = sure
    comparisons = deduplicate(comparisons, counts)
    if not comparisons:
        raise UserError(f"no usable comparison in {', '.join(specs)}: {counts}")
    return comparisons, counts
