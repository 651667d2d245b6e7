"""Public comparisons for preference-model pre-training (Askell et al. 2021, arXiv:2112.00861, section 4).

From the sources of a recipe to one list of comparisons: a uniform sample of each source by its weight, in
memory that does not depend on the size of the sources; then the binary form, which transfers better than the
ranked one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from rlhf.data.comparisons import Comparison, Counts, Message, OnBadRows, deduplicate, reservoir_sample
from rlhf.data.readers import Refuses, no_refusal, stream_comparisons
from rlhf.data.readers.files import HUB, paths_of
from rlhf.errors import UserError
from rlhf.recipe.reward import PmpSource
from rlhf.runs.cache import remember

NOT_DRAWN = "not drawn: the source holds more than its share"


@dataclass(frozen=True)
class Filter:
    """Which comparisons a training can use."""

    name: str
    """What the test depends on; a cached part is good for the same name only."""
    problem: Callable[[Comparison], str | None]
    """Why one cannot be used, as a fixed phrase to be counted, or None."""
    refuses: Refuses = no_refusal
    """Why a prompt cannot be rendered; such a row is a bad one."""


def sample_mixture(
    sources: Sequence[PmpSource],
    total: int,
    *,
    seed: int,
    on_bad_rows: OnBadRows,
    cache: Path | None = None,
    fits: Filter | None = None,
) -> tuple[list[Comparison], dict[str, Counts]]:
    """Draw ``total`` comparisons from the sources by their weights, without repeats, in random order.

    Every comparison of a source has the same chance (reservoir sampling); what is drawn follows from the
    seed, the rows of the source and its share. A source with fewer than its share gives all it has; nobody
    makes up for it. Repeats are removed after the drawing, those of an earlier source too, so a source can
    give a little less than its share. Counts: by source, under ``pmp.sources[index]: files``; what was read
    but not drawn is dropped as ``NOT_DRAWN``.

    fits: comparisons that do not are left out before the drawing, and counted.
    cache: a folder in which the drawn part of each finished source is kept, so that an interrupted mixture
    goes on with the next source. A part is used again when files (names, sizes, times of change), share,
    seed, on_bad_rows and ``fits`` (by its name) are the same.

    Raises UserError for sources that cannot be read, that give nothing usable (or nothing that an earlier one
    has not), or whose share is less than one comparison.
    """
    drawn: list[Comparison] = []
    counts: dict[str, Counts] = {}
    parts = shares([source.weight for source in sources], total)
    for index, (source, share) in enumerate(zip(sources, parts, strict=True)):
        place = f"pmp.sources[{index}]"
        files = ", ".join(source.files)
        if not share:
            raise UserError(
                f"{place} ({files}) has a share of less than one of {total} comparisons: raise its weight or "
                "pmp.limit"
            )
        part, tally = _drawn(source, share, seed, on_bad_rows, place, cache, fits)
        drawn = deduplicate([*drawn, *part], tally)  # the first ones are distinct: only new ones can go
        if not tally.kept:
            raise UserError(f"{place}: no usable comparison in {files}: {tally}")
        counts[f"{place}: {files}"] = tally
    _random(seed, "order").shuffle(drawn)
    return drawn, counts


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers with the sum ``total``, in proportion to the weights (largest remainder; exact)."""
    exact = [Fraction(weight) for weight in weights]
    wanted = [total * weight / sum(exact) for weight in exact]
    result = [int(share) for share in wanted]
    by_remainder = sorted(range(len(result)), key=lambda i: (result[i] - wanted[i], i))
    for index in by_remainder[: total - sum(result)]:
        result[index] += 1
    return result


def subsample_responses(comparison: Comparison, max_responses: int) -> Comparison:
    """At most ``max_responses`` (>= 2) responses at even distances in the order of preference.

    A best and a worst one stay, so a comparison with two different ranks keeps two. Ties are in the order of
    the file; responses stay in their order, ranks become dense. Nothing is random.
    """
    if max_responses < 2:
        raise ValueError(f"max_responses must be at least 2, not {max_responses}")
    last = len(comparison.responses) - 1
    if last < max_responses:
        return comparison
    gaps = max_responses - 1
    order = sorted(range(last + 1), key=lambda k: (comparison.ranks[k], k))
    kept = sorted(order[(2 * step * last + gaps) // (2 * gaps)] for step in range(max_responses))  # rounded
    dense = {rank: place for place, rank in enumerate(sorted({comparison.ranks[k] for k in kept}))}
    return replace(
        comparison,
        responses=tuple(comparison.responses[k] for k in kept),
        ranks=tuple(dense[comparison.ranks[k]] for k in kept),
    )


def binarize(comparison: Comparison, good: str, bad: str) -> list[Comparison]:
    """Each ordered pair A > B as two binary comparisons: good+A over bad+A, and bad+B over good+B.

    That is Askell 2021, section 4.1: the model has to say whether "good" or "bad" fits a text, and learns no
    order that it would have to unlearn. Ties give nothing. K responses give one such set for every ordered
    pair, repeats included: how often a response is called good and how often bad is what is left of its place
    in the order (a middle one of three would else be called both, equally often, whatever its votes). So the
    result must not be de-duplicated.
    """
    ranked = list(zip(comparison.responses, comparison.ranks, strict=True))
    result = []
    for better, high in ranked:
        for worse, low in ranked:
            if high < low:
                for winner, loser in ((good + better, bad + better), (bad + worse, good + worse)):
                    result.append(replace(comparison, responses=(winner, loser), ranks=(0, 1)))
    return result


def check_prefixes(tokenize: Callable[[str], list[int]], unknown_id: int | None, good: str, bad: str) -> None:
    """Raise UserError unless the tokenizer can tell the two control prefixes apart.

    tokenize: text to token ids, without special tokens. unknown_id: the id of the unknown token, None where
    the tokenizer has none.
    """
    ids = {"pmp.good_prefix": tokenize(good), "pmp.bad_prefix": tokenize(bad)}
    for (name, tokens), text in zip(ids.items(), (good, bad), strict=True):
        if not tokens:
            raise UserError(f"{name} {text!r} has no tokens: choose a text that the tokenizer does not drop")
        if unknown_id is not None and unknown_id in tokens:
            raise UserError(
                f"{name} {text!r} holds characters that the tokenizer does not know: choose others"
            )
    first, second = ids.values()
    if first == second:
        raise UserError(
            f"{' and '.join(ids)} ({good!r}, {bad!r}) are the same tokens {first}: choose two different texts"
        )


def _random(seed: int, *purpose: Any) -> random.Random:
    return random.Random(json.dumps([seed, *purpose]))  # a string seeds by its SHA-512, the same everywhere


def _drawn(
    source: PmpSource,
    share: int,
    seed: int,
    on_bad_rows: OnBadRows,
    key: str,
    cache: Path | None,
    fits: Filter | None,
) -> tuple[list[Comparison], Counts]:
    """The drawn part of a source, from the cache where it has it, with the counts of its reading."""

    counts = Counts()

    def usable(comparison: Comparison) -> bool:
        reason = fits and fits.problem(comparison)
        if reason:
            counts.drop(reason)
        return not reason

    def read() -> dict[str, Any]:
        refuses = fits.refuses if fits else no_refusal
        stream = stream_comparisons(
            source.files,
            on_bad_rows=on_bad_rows,
            counts=counts,
            key=key,
            refuses=refuses,
            columns=source.columns,
        )
        kept = reservoir_sample(filter(usable, stream), share, _random(seed, "draw"))
        if counts.kept > len(kept):
            counts.drop(NOT_DRAWN, counts.kept - len(kept))
        return {"comparisons": [asdict(comparison) for comparison in kept], "counts": asdict(counts)}

    identity = {
        "files": _state(source.files, key),
        "columns": source.columns,
        "share": share,
        "seed": seed,
        "on_bad_rows": on_bad_rows,
        "fits": fits and fits.name,
    }
    found = remember(cache, "source", identity, read) if cache else read()
    return list(map(_comparison, found["comparisons"])), Counts(**found["counts"])


def _comparison(row: dict[str, Any]) -> Comparison:
    prompt = tuple(Message(**message) for message in row["prompt"])
    row = {**row, "prompt": prompt, "responses": tuple(row["responses"]), "ranks": tuple(row["ranks"])}
    return Comparison(**row)


def _state(files: Sequence[str], key: str) -> list[Any]:
    """What tells whether files have changed; of the hub only the name is known without asking it."""
    state: list[Any] = []
    for spec in files:
        if spec.startswith(HUB):
            state.append(spec)
        else:
            for path in paths_of(spec, key=key):
                status = path.stat() if path.exists() else None
                state.append([str(path), *((status.st_size, status.st_mtime_ns) if status else ())])
    return state
