"""ETHICS (Hendrycks et al. 2021, arXiv:2008.02275), its csv files as they are published.

- util_*.csv: two columns without a header, the first scenario is the more pleasant; also {"baseline",
  "less_pleasant"}. Prompt: ``UTIL``. ``group`` is the first ``_WORDS`` words: variants of a scenario begin
  alike. No scenario on both sides of a split: data.split_by=responses.
- deontology {"label", "scenario", "excuse"}: the prompt is the scenario; its excuses (or consequences) of
  label 1 are above those of label 0. ``group`` is the scenario.
- virtue {"label", "scenario"} as "text [SEP] trait": the prompt is the text and ``VIRTUE``; the trait of
  label 1 is above the others. ``group`` is the text.
- justice {"label", "scenario"}: a scenario follows its variants in the file; neighbors with half of their
  words in common, at the beginning or the end, are one set. Prompt: ``JUSTICE``; responses are whole
  sentences. ``group`` is the beginning of the first.
- commonsense {"label", "input"} (, "is_short"): rows have nothing in common; the n-th that is right (label 0)
  is above the n-th that is wrong (label 1) among the short ones, and among the long ones; among all where the
  rows, as those of the hub, do not say which are short. Prompt: ``COMMON``.

Besides these columns a row may have such that are about it (an id, a number).

A set with one label only says nothing about preference: left out and counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from rlhf.data.comparisons import Comparison, Message
from rlhf.data.readers.columns import is_empty, is_label
from rlhf.data.readers.public.verdicts import named, side
from rlhf.data.readers.rows import BadRow, LeftOut, Reader, Row, is_text, ranked_by_score

UTIL = "Tell me what happened to you."
VIRTUE = "Which trait of character does this show?"
JUSTICE = "Say what is fair, and why."
COMMON = "Tell me what you did."
_WORDS = 4
_LABELS = {"0": 0, "1": 1}
Found = Iterator[Comparison | LeftOut]


def _label(row: Row) -> int:
    return side(row["label"], "label", _LABELS)


def _words(text: str, number: int = _WORDS) -> str:
    return " ".join(text.lower().split()[:number])


def _set(prompt: str, rows: Sequence[tuple[str, int]], source: str, group: str) -> Comparison | LeftOut:
    """Texts of label 1 above those of label 0."""
    asked = (Message("user", prompt),)
    if len({label for _, label in rows}) < 2:
        return LeftOut("one label only in a set of scenarios", asked)
    found = ranked_by_score(asked, [text for text, _ in rows], [label for _, label in rows], source)
    return found if isinstance(found, LeftOut) else replace(found, group=group)


def _util(row: Row, source: str) -> Iterator[Comparison]:
    if "1" in row and "util" not in source.lower():
        raise BadRow(
            "two columns without names",
            'name them by data.columns={chosen: "1", rejected: "2"}; those of ETHICS are in util_*.csv',
        )
    names = ("1", "2") if "1" in row else ("baseline", "less_pleasant")
    better, worse = (row[name].strip() for name in names)
    yield Comparison((Message("user", UTIL),), (better, worse), (0, 1), source, None, _words(better) or None)


def _deontology(row: Row, source: str) -> Found:
    rows = [(x["scenario"].strip(), x["excuse"].strip(), _label(x)) for x in row["rows"]]
    scenario = rows[0][0]
    yield _set(scenario, [(excuse, label) for _, excuse, label in rows], source, scenario)


def _virtue(row: Row, source: str) -> Found:
    parts = [x["scenario"].partition("[SEP]") for x in row["rows"]]
    scenario = parts[0][0].strip()
    rows = [(trait.strip(), _label(x)) for (_, _, trait), x in zip(parts, row["rows"], strict=True)]
    yield _set(f"{scenario}\n\n{VIRTUE}", rows, source, scenario)


def _justice(row: Row, source: str) -> Found:
    sets: list[list[tuple[str, int]]] = []
    for x in row["rows"]:
        scenario = x["scenario"].strip()
        if not sets or shared(sets[-1][-1][0], scenario) < 0.5:
            sets.append([])
        sets[-1].append((scenario, _label(x)))
    for rows in sets:
        yield _set(JUSTICE, rows, source, _words(rows[0][0], 2 * _WORDS))


def shared(one: str, other: str) -> float:
    """Share, in [0, 1], of the words of the longer text that both have at their beginning or at their end."""
    a, b = one.split(), other.split()
    most = min(len(a), len(b))
    start = next((i for i in range(most) if a[i] != b[i]), most)
    end = next((i for i in range(most - start) if a[-1 - i] != b[-1 - i]), most - start)
    return (start + end) / max(len(a), len(b), 1)


def _common(row: Row, source: str) -> Found:
    prompt = (Message("user", COMMON),)
    if not named(row["rows"][0], "is_short") and not re.search("ethics|commonsense|cm_", source.lower()):
        raise BadRow(
            "label and input, which may be anything",
            "rename the file to cm_... where they are of ETHICS commonsense (label 1 is wrong)",
        )
    rows = [(x["input"].strip(), _label(x), x.get("is_short")) for x in row["rows"]]
    right, wrong = ([text for text, label, _ in rows if label == of] for of in (0, 1))
    for sides in zip(right, wrong, strict=False):
        yield Comparison(prompt, sides, (0, 1), source)
    for _ in range(abs(len(right) - len(wrong))):
        yield LeftOut("no scenario of the other label is left", prompt)


def _key(row: Row, name: str, key: str = "") -> str:
    _label(row)
    if not is_text(row, name):
        raise BadRow(f"the {name} is not a text")
    return key


def _only(row: Row, *names: str) -> bool:
    """Whether a row has these columns, and no others but such that are about it."""
    return {*names} <= row.keys() and all(
        name in names or is_empty(x) or (isinstance(x, str | int | float) and is_label(str(name), str(x)))
        for name, x in row.items()
    )


def _is(row: Row, *names: str, sep: bool) -> bool:
    return _only(row, "label", "scenario", *names) and ("[SEP]" in str(row["scenario"])) == sep


READERS: tuple[Reader[Comparison], ...] = (
    Reader(
        'ETHICS util: two columns without a header, or {"baseline", "less_pleasant"}',
        lambda row: row.keys() == {"1", "2"} or is_text(row, "baseline", "less_pleasant"),
        _util,
    ),
    Reader(
        'ETHICS deontology {"label", "scenario", "excuse"}',
        lambda row: _is(row, "excuse", sep=False),
        _deontology,
        together=lambda row: _key(row, "excuse", str(row["scenario"]).strip()),
    ),
    Reader(
        'ETHICS virtue {"label", "scenario"} with [SEP]',
        lambda row: _is(row, sep=True),
        _virtue,
        together=lambda row: _key(row, "scenario", str(row["scenario"]).partition("[SEP]")[0].strip()),
    ),
    Reader(
        'ETHICS justice {"label", "scenario"}',
        lambda row: _is(row, sep=False),
        _justice,
        together=lambda row: _key(row, "scenario"),
    ),
    Reader(
        'ETHICS commonsense {"label", "input"}',
        lambda row: {"label", "input", "is_short"} <= row.keys() or _only(row, "label", "input"),
        _common,
        together=lambda row: _key(row, "input", str(row.get("is_short", "")).strip().lower()),
    ),
)
