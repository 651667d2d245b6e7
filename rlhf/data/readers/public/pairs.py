"""Pairs with a verdict: two responses, and who is better. Ties are left out and counted.

The table ``_TABLE`` holds the sets with words of their own. What is like them is read by its columns: two
called response, answer, output, completion, summary, text or option with the ends _0/_1, _1/_2, _a/_b or
_left/_right, and the verdict in one of ``VERDICTS``, which names an end, a column, model_a, left, A>B or
tie. A list of verdicts, or columns annotator1, annotator2, ... are votes, counted as in
:mod:`rlhf.data.readers.public.verdicts`.
An end that is a number is named by that number: a verdict 1 is the second of _0/_1 and the first of _1/_2.
Any other number says that the verdicts are coded otherwise, and the whole file is refused. Without a verdict
the higher of two scores (score_a, score_b) decides.

PKU-SafeRLHF has two verdicts: ``better_response_id`` is read; to read by safety, the recipe says
data.columns={better_response_id: safer_response_id}, and the counts list the other one as not used.
Conversations (Chatbot Arena) that differ before the last answer share no prompt: left out and counted. Where
``turn`` says which answer was judged, as in MT-bench, what comes after that answer is cut off first.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.data.comparisons import Comparison, Message, Prompt
from rlhf.data.readers.columns import VERDICTS
from rlhf.data.readers.public.verdicts import (
    TIE,
    TIES,
    as_prompt,
    asked,
    group_of,
    named,
    not_counts,
    number,
    side,
    sign,
    text,
    voted,
)
from rlhf.data.readers.rows import BadRow, LeftOut, Reader, Row, WholeFile, messages, pair_of_dialogues
from rlhf.data.readers.tables.cells import parsed

Found = Iterator[Comparison | LeftOut]
_STEMS = (
    "response", "answer", "output", "completion", "summary", "text", "option", "conversation", "orig_response"
)  # fmt: skip
_PROMETHEUS = "orig_"
_SCORES = ("score", "rating", "grade", "reward")
_MIDS = ("_", "-", " ", "")
_ENDS = (("0", "1"), ("1", "2"), ("a", "b"), ("A", "B"), ("left", "right"))


@dataclass(frozen=True)
class Pairs:
    """One set. prompt: of a row. sides: the columns of the responses. votes: of a row, 0, 1 or TIE each."""

    format: str
    sides: tuple[str, str]
    needs: tuple[str, ...]
    votes: Callable[[Row], Sequence[int]]
    prompt: Callable[[Row], Prompt] = asked

    def parse(self, row: Row, source: str) -> Found:
        """The row's pair."""
        answers = [text(row[name]) for name in self.sides]
        yield voted(self.prompt(row), answers, self.votes(row), source, group_of(row))

    def reader(self) -> Reader[Comparison]:
        """The reader of the set."""
        return Reader(self.format, lambda row: named(row, *self.sides, *self.needs), self.parse)


def _by_strength(column: str, votes: str, strength: str) -> Callable[[Row], list[int]]:
    """Several annotators' strengths where the row has them, else the one of the set."""

    def read(row: Row) -> list[int]:
        given = row.get(votes)
        every = [x.get(strength) for x in given if isinstance(x, Mapping)] if isinstance(given, list) else []
        overall = sign(row[column], column)
        found = [sign(x, strength) for x in every if x is not None]
        # the set's own verdict stands; votes that do not give it as their majority tell nothing about it
        return found if len(found) > 1 and found.count(overall) * 2 > len(found) else [overall]

    return read


def _annotators(row: Row) -> list[int]:
    meaning = {"1": 0, "2": 1, "0": TIE}
    names = [name for name in row if re.fullmatch("annotator_?[0-9]+", name) and named(row, name)]
    return [side(row[name], name, meaning) for name in names]


def _higher(one: str, other: str) -> Callable[[Row], list[int]]:
    return lambda row: [sign(number(row[other]) - number(row[one]), one)]


def _webgpt_prompt(row: Row) -> Prompt:
    question = row["question"]
    return as_prompt(question.get("full_text") if isinstance(question, Mapping) else question)


def _webgpt_sides(row: Row, source: str) -> Found:
    """The lines of OpenAI's own file: a list of the two answers, each with its question and its score."""
    one, other = row["rows"]
    prompt = _webgpt_prompt(one)
    if _webgpt_prompt(other) != prompt:
        raise BadRow("two answers to different questions")
    vote = sign(number(other["score"]) - number(one["score"]), "score")
    yield voted(prompt, [text(x["answer"]) for x in (one, other)], [vote], source)


def _is_webgpt_sides(row: Row) -> bool:
    sides = row.get("rows")
    needs = {"question", "answer", "score"}
    return isinstance(sides, list) and len(sides) == 2 and all(needs <= x.keys() for x in sides)


_TABLE = (
    Pairs(
        'HelpSteer 3 {"context", "response1", "response2", "overall_preference"}',
        ("response1", "response2"),
        ("context",),
        _by_strength("overall_preference", "individual_preference", "score"),
        lambda row: as_prompt(row["context"]),
    ),
    Pairs(
        'HelpSteer 2 {"prompt", "response_1", "response_2", "preference_strength"}',
        ("response_1", "response_2"),
        ("preference_strength",),
        _by_strength("preference_strength", "all_preferences_unprocessed", "strength"),
    ),
    Pairs(
        'WebGPT {"question", "answer_0", "answer_1", "score_0", "score_1"}',
        ("answer_0", "answer_1"),
        ("question", "score_0", "score_1"),
        _higher("score_0", "score_1"),
        _webgpt_prompt,
    ),
    Pairs(
        'PandaLM {"instruction", "input", "response1", "response2", "annotator1"}',
        ("response1", "response2"),
        ("instruction", "annotator1"),
        _annotators,
    ),
    Pairs(
        'Auto-J {"prompt", "response 1", "response 2", "label"}',
        ("response 1", "response 2"),
        ("prompt", "label"),
        lambda row: [side(row["label"], "label", {"0": 0, "1": 1, "2": TIE})],
    ),
)


_ARENA = {"model_a": 0, "model_b": 1} | dict.fromkeys(TIES, TIE)


def _arena(row: Row, source: str) -> Found:
    sides = [messages(row[name], name) for name in ("conversation_a", "conversation_b")]
    if named(row, "turn"):
        sides = [_until(dialogue, number(row["turn"], "turn")) for dialogue in sides]
    yield _of_dialogues(sides, side(row["winner"], "winner", _ARENA), source)


def _until(dialogue: Prompt, turn: float) -> Prompt:
    """The dialogue up to its answer number ``turn``, from 1; all of it where it has no more answers."""
    answers = [place for place, message in enumerate(dialogue, 1) if message.role == "assistant"]
    return dialogue[: answers[int(turn) - 1]] if 1 <= turn <= len(answers) else dialogue


def _of_dialogues(sides: list[Prompt], vote: int, source: str) -> Comparison | LeftOut:
    if any(not dialogue or dialogue[-1].role != "assistant" for dialogue in sides):
        raise BadRow("one of the two conversations does not end in an assistant turn")
    if sides[0][:-1] != sides[1][:-1]:
        return LeftOut("conversations that differ before the last answer", sides[0][:1])
    pair = pair_of_dialogues(sides[0], sides[1], source)
    return voted(pair.prompt, pair.responses, [vote], source)


def _arena_table(row: Row, source: str) -> Found:
    """The table of a vote per row in which prompt and responses are lists of turns, or their JSON text."""
    columns = ("winner_model_a", "winner_model_b", "winner_tie")
    won = [number(row.get(name, 0) or 0, name) for name in columns]
    if sum(map(bool, won)) != 1:
        raise BadRow("the verdict names no side", f"{columns[0]}, {columns[1]}, {columns[2]} are {won}")
    vote = (0, 1, TIE)[won.index(max(won))]
    asked_for, *answers = (_turns(row[name]) for name in ("prompt", "response_a", "response_b"))
    if any(len(side_) != len(asked_for) for side_ in answers):
        raise BadRow("not as many answers as prompts")
    sides = []
    for answer in answers:
        turns = zip(asked_for, answer, strict=True)
        sides.append(tuple(Message(r, t) for q, a in turns for r, t in (("user", q), ("assistant", a))))
    yield _of_dialogues(sides, vote, source)


def _turns(given: Any) -> list[str]:
    value = given
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parsed(value)
        if value is None:
            raise BadRow("a list of turns is not valid JSON", str(given)[:40])
    turns = [value] if isinstance(value, str) else value
    if not isinstance(turns, list) or not all(isinstance(turn, str | None) for turn in turns):
        raise BadRow("turns are not a list of texts")
    return [turn or "" for turn in turns]


def columns_of_sides(row: Row) -> tuple[str, str, tuple[str, str]] | None:
    """The columns of two responses and their ends, None where the row has no such two."""
    return next((found for found in _sides_among(frozenset(row)) if named(row, *found[:2])), None)


@functools.lru_cache(maxsize=256)
def _sides_among(columns: frozenset[str]) -> list[tuple[str, str, tuple[str, str]]]:
    """The pairs of columns that may be two responses, in the order in which they are looked for."""
    names = itertools.product(_STEMS, _ENDS, _MIDS)
    every = ((f"{stem}{mid}{ends[0]}", f"{stem}{mid}{ends[1]}", ends) for stem, ends, mid in names)
    return [found for found in every if {*found[:2]} <= columns]


def meaning_of(one: str, other: str, ends: tuple[str, str]) -> dict[str, int]:
    """What the words of a verdict about two columns mean."""
    a, b = (end.lower() for end in ends)
    words = {a: 0, b: 1, one.lower(): 0, other.lower(): 1, f"model_{a}": 0, f"model_{b}": 1}
    words |= {f"{a}>{b}": 0, f"{b}>{a}": 1, f"response_{a}": 0, f"response_{b}": 1, "left": 0, "right": 1}
    return words | {tie: TIE for tie in TIES - {"c"} if tie not in words}


def votes_in(value: object, column: str, meaning: Mapping[str, int]) -> list[int]:
    """The votes of a verdict: one, or a list; an object holds it under "value" or "selected"."""
    if isinstance(value, list):
        submitted = [x for x in value if not isinstance(x, Mapping) or x.get("status") != "discarded"]
        not_counts(submitted, 2, column)
        return [vote for x in submitted if x is not None for vote in votes_in(x, column, meaning)]
    if isinstance(value, Mapping):
        value = next((value[name] for name in ("value", "selected") if name in value), value)
    try:
        return [side(value, column, meaning)]
    except BadRow as fault:
        raise _other_coding(value, column, meaning) or fault from None


def _other_coding(value: object, column: str, meaning: Mapping[str, int]) -> WholeFile | None:
    """What a number that is no end of two columns says of all verdicts: 1 is another side."""
    ends = sorted(word for word in meaning if word.isdigit())
    if isinstance(value, bool) or not ends or not re.fullmatch(r"\s*-?[0-9]+(\.0)?\s*", str(value)):
        return None
    first, second = ("0", "1") if ends[0] == "1" else ("1", "2")
    return WholeFile(
        "a verdict that no column has",
        f"{column} is {value}, the columns end in {' and '.join(ends)}, so that {ends[0]} is the first; if "
        f"{first} is the first and {second} the second, say data.columns={{response_{first}: ..., "
        f"response_{second}: ...}}, else mend the file (it is refused as a whole: 1 is another side there)",
    )


def _verdict_of(row: Row) -> str:
    return next((name for name in VERDICTS if named(row, name)), "")


def _scores_of(row: Row, ends: tuple[str, str]) -> tuple[str, str] | None:
    """The columns of the scores of two responses, by their ends."""
    every = ((f"{stem}{mid}{ends[0]}", f"{stem}{mid}{ends[1]}") for stem in _SCORES for mid in _MIDS)
    return next((names for names in every if named(row, *names)), None)


def _pair(row: Row, source: str) -> Found:
    found = columns_of_sides(row)
    if found is None:
        raise BadRow("no two responses")
    one, other, ends = found
    answers = [text(row[one]), text(row[other])]
    verdict = _verdict_of(row)
    scores = _scores_of(row, ends)
    if verdict:
        votes = votes_in(row[verdict], verdict, meaning_of(*found))
    elif scores:
        votes = _higher(*scores)(row)
    else:
        votes = _annotators(row)
    if one.startswith(_PROMETHEUS):  # whose column "instruction" holds both responses, too
        if not named(row, f"{_PROMETHEUS}instruction"):
            raise BadRow("no prompt", f"responses in {one} were asked for by {_PROMETHEUS}instruction")
        prompt = as_prompt(row[f"{_PROMETHEUS}instruction"])
    else:
        prompt = asked(row)
    yield voted(prompt, answers, votes, source, group_of(row))


READERS: tuple[Reader[Comparison], ...] = (
    *(pairs.reader() for pairs in _TABLE),
    Reader('WebGPT [{"question", "answer", "score"}, ...]', _is_webgpt_sides, _webgpt_sides),
    Reader(
        'Chatbot Arena {"conversation_a", "conversation_b", "winner"}',
        lambda row: {"conversation_a", "conversation_b", "winner"} <= row.keys(),
        _arena,
    ),
    Reader(
        'Chatbot Arena {"prompt", "response_a", "response_b", "winner_model_a", "winner_model_b"}',
        lambda row: named(row, "prompt", "response_a", "response_b") and "winner_model_a" in row,
        _arena_table,
    ),
    Reader(
        'a pair {"prompt", "response_a", "response_b", "winner"} or PKU-SafeRLHF {"prompt", "response_0", '
        '"response_1", "better_response_id"} or LLMBar {"input", "output_1", "output_2", "label"}',
        lambda row: (
            "rejected" not in row
            and columns_of_sides(row) is not None
            and (bool(_verdict_of(row)) or named(row, "annotator1"))
        ),
        _pair,
    ),
    Reader(
        'a pair with scores {"prompt", "response_a", "response_b", "score_a", "score_b"}',
        lambda row: (
            "rejected" not in row
            and (found := columns_of_sides(row)) is not None
            and _scores_of(row, found[2]) is not None
        ),
        _pair,
    ),
)
