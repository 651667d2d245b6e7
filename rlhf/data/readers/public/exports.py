"""What annotation tools export: Label Studio's JSON and Argilla's records. Several annotators are votes.

Label Studio {"data", "annotations"}: a ``pairwise`` result selects left or right, and so does a ``choices``
result whose words name a side (left, Response 1, A); a ``ranker`` result lists the ids of data's items, the
best first. The flat exports (JSON_MIN, CSV) are pairs with a verdict, see
:mod:`rlhf.data.readers.public.pairs`.

Argilla {"fields", "responses"}, and the flat tables on the hub: of version 1 a column a question with
[{"value", "status"}, ...], of version 2 the columns QUESTION.responses, .users and .status. Read is the first
question that ranks the responses, else the ratings where each response has a question of its own (called
like the response or ending like it), else the first question whose answers name a response. A ranking is
[{"value", "rank"}, ...], {"value": [...], "rank": [...]} or the names in their order. Rankings and ratings of
several annotators are averaged. Work that is discarded, canceled or a draft does not count.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf.data.comparisons import Comparison, Prompt
from rlhf.data.readers.columns import is_empty
from rlhf.data.readers.public.pairs import columns_of_sides, meaning_of, votes_in
from rlhf.data.readers.public.verdicts import (
    TIE,
    TIES,
    asked,
    graded,
    group_of,
    named,
    number,
    side,
    text,
    voted,
)
from rlhf.data.readers.rows import BadRow, LeftOut, Reader, Row

Found = Iterator[Comparison | LeftOut]
Questions = dict[str, dict[str, Any]]
"""Question -> annotator -> value."""
_RESPONSES = ("response", "answer", "completion", "output")
_RESPONSE = re.compile(rf"({'|'.join(_RESPONSES)}|generation|text|summary|option)[-_ ]?([0-9]+|[a-z])")
_UNDONE = ("discarded", "draft", "pending")


# --- Label Studio ----------------------------------------------------------------------------------------


def _label_studio(row: Row, source: str) -> Found:
    data = row["data"]
    done = [x for x in row["annotations"] if isinstance(x, Mapping) and not x.get("was_cancelled")]
    results = [x for of in done for x in of.get("result") or () if isinstance(x, Mapping)]
    rankings = [_order(x) for x in results if x.get("type") == "ranker"]
    if rankings:
        yield _averaged(asked(data), _items(data), rankings, source)
        return
    found = columns_of_sides(data)
    if found is None:
        raise BadRow("no two responses", f"data has {', '.join(map(str, data))}"[:80])
    sides = [text(data[name]) for name in found[:2]]
    meaning = meaning_of(*found)
    chosen = [x.get("value") for x in results if x.get("type") == "pairwise"]
    votes = votes_in(chosen, "selected", meaning) if chosen else _choices(results, _words(meaning, found[2]))
    yield voted(asked(data), sides, votes, source)


def _choices(results: Sequence[Row], meaning: Mapping[str, int]) -> list[int]:
    """The votes of the first question whose choices all name a side."""
    questions: dict[str, list[str]] = {}
    for x in results:
        value = x.get("value")
        words = value.get("choices") if isinstance(value, Mapping) else None
        if x.get("type") == "choices" and isinstance(words, list) and len(words) == 1:
            questions.setdefault(str(x.get("from_name")), []).append(_plain(words[0]))
    for words in questions.values():
        if all(word in meaning for word in words):
            return [meaning[word] for word in words]
    if results:
        kinds = ", ".join(sorted({str(x.get("type")) for x in results}))[:60]
        shown = ", ".join(sorted({word for words in questions.values() for word in words}))[:60]
        raise BadRow(
            "no result names a response",
            f"results are {kinds}{f' ({shown})' if shown else ''}; read are pairwise, ranker, and choices "
            "such as left, Response 1 or A",
        )
    return []


def _plain(word: object) -> str:
    return " ".join(re.split(r"[\s_-]+", str(word).strip().lower()))


def _words(meaning: Mapping[str, int], ends: tuple[str, str]) -> dict[str, int]:
    """The words of a verdict, and what people call two responses on a screen."""
    words = {_plain(word): place for word, place in meaning.items()}
    sides = (("a", "b"),) if ends == ("0", "1") else (("1", "2"), ("a", "b"))
    for pair in (tuple(end.lower() for end in ends), *sides):
        for place, end in enumerate(pair):
            for noun in (*_RESPONSES, "model", "option", "summary", "text", "assistant", ""):
                words.setdefault(f"{noun} {end}".strip(), place)
    return words


def _order(result: Mapping[str, Any]) -> list[str]:
    value = (result.get("value") or {}).get("ranker")
    if isinstance(value, Mapping):
        value = value.get("rank") or next(iter(value.values()), None)
    if not isinstance(value, list):
        raise BadRow("a ranking is not a list of ids")
    return list(map(str, value))


def _items(data: Row) -> dict[str, str]:
    lists = [x for x in data.values() if isinstance(x, list) and x and isinstance(x[0], Mapping)]
    items = next((x for x in lists if all("id" in item for item in x)), [])
    body = ("body", "text", "content", "html")
    return {str(x["id"]): text(next((x[name] for name in body if name in x), None)) for x in items}


def _averaged(
    prompt: Prompt, answers: Mapping[str, str], rankings: Sequence[Sequence[str]], source: str
) -> Comparison | LeftOut:
    if any(sorted(ranking) != sorted(answers) for ranking in rankings):
        raise BadRow("a ranking does not name every response once")
    grades = [[-float(ranking.index(name)) for ranking in rankings] for name in answers]
    return graded(prompt, list(answers.values()), grades, source)


# --- Argilla ---------------------------------------------------------------------------------------------


def _argilla(row: Row, source: str) -> Found:
    fields = row["fields"]
    prompt = asked({name: x for name, x in fields.items() if not _is_response(name)})
    names = [name for name in fields if _is_response(name) and named(fields, name)]
    yield _said(prompt, fields, names, _questions(row["responses"]), source, group_of(row))


def _flat(row: Row, source: str) -> Found:
    given: dict[str, Any] = {}
    for name in _columns(row):
        for more in ("", ".users", ".status", "-suggestion", "-suggestion-metadata"):
            row.get(f"{name}{more}")
        given[name.removesuffix(".responses")] = _listed(row, name)
    yield _said(asked(row), row, _names(row), _questions(given), source, group_of(row))


def _names(row: Row) -> list[str]:
    return [name for name in row if _RESPONSE.fullmatch(name.lower()) and named(row, name)]


def _columns(row: Row) -> list[str]:
    """The columns with the answers to questions."""
    return [
        name
        for name, value in row.items()
        if (name.endswith(".responses") and f"{name}.users" in row)
        or (f"{name}-suggestion" in row and (is_empty(value) or isinstance(value, list)))
        or (isinstance(value, list) and value and all(_is_answer(x) for x in value))
    ]


def _is_answer(value: object) -> bool:
    return isinstance(value, Mapping) and "value" in value and ("status" in value or "user_id" in value)


def _listed(row: Row, name: str) -> list[Any]:
    """The answers to the question of a column as a list of rows."""
    if not name.endswith(".responses"):
        return row[name] or []
    values = row[name] or []
    users, status = (row.get(f"{name}.{of}") or [None] * len(values) for of in ("users", "status"))
    if not len(values) == len(users) == len(status):
        raise BadRow("not as many users or statuses as answers", name)
    columns = zip(values, users, status, strict=True)
    return [{"value": value, "user_id": user, "status": state} for value, user, state in columns]


def _is_response(name: str) -> bool:
    return name.lower().startswith(_RESPONSES)


def _questions(responses: Any) -> Questions:
    """The values that count: of a list of users' answers to all questions, or of a list per question."""
    if isinstance(responses, Mapping):
        flat = [(name, x) for name, of in responses.items() for x in of or ()]
    else:
        flat = [
            (name, {"user_id": of.get("user_id"), "status": of.get("status"), **answer})
            for of in responses
            if isinstance(of, Mapping)
            for name, answer in (of.get("values") or {}).items()
        ]
    found: Questions = {}
    place: Counter[str] = Counter()
    for name, x in flat:
        place[name] += 1
        if isinstance(x, Mapping) and x.get("value") is not None and x.get("status") not in _UNDONE:
            user = x.get("user_id")
            found.setdefault(name, {})[str(place[name]) if user is None else f"user {user}"] = x["value"]
    return found


def _said(
    prompt: Prompt, fields: Row, names: Sequence[str], questions: Questions, source: str, group: str | None
) -> Comparison | LeftOut:
    if not questions:
        return LeftOut("no votes", prompt)
    sides = columns_of_sides(fields)
    names = names if len(names) > 1 else list(sides[:2]) if sides else []
    if len(names) < 2:
        raise BadRow("no two responses", f"fields are {', '.join(map(str, fields))}"[:80])
    answers = [text(fields[name]) for name in names]
    every = list(questions.values())
    for rankings in map(_rankings, every):
        if rankings and all(of.keys() == set(map(_plain, names)) for of in rankings):
            grades = [[-of[_plain(name)] for of in rankings] for name in names]
            return graded(prompt, answers, grades, source, group)
    ratings = [_rating(name, names, questions) for name in names]
    if all(of is not None for of in ratings):
        users = sorted(set.intersection(*(set(of or ()) for of in ratings)))
        grades = [[number((of or {})[user]) for user in users] for of in ratings]
        return graded(prompt, answers, grades, source, group) if users else LeftOut("no votes", prompt)
    of_two = sides is not None and set(names) == {*sides[:2]}
    meaning = _words(meaning_of(*sides), sides[2]) if sides and of_two else _places(names)
    votes = next((of for of in sorted(every, key=_is_numbers) if _all_name(of, meaning)), None)
    if votes is None and any(map(_rankings, every)):
        raise BadRow("a ranking does not name every response once")
    if votes is None and len(questions) > 1:
        raise BadRow("no question names a response", f"questions are {', '.join(questions)}"[:90])
    values = (every[0] if votes is None else votes).values()
    return voted(prompt, answers, [side(_word(x), "value", meaning) for x in values], source, group)


def _rankings(of_question: Mapping[str, Any]) -> list[dict[str, float]]:
    """The rank of each name by each annotator, the lowest the best; nothing where they are no rankings."""
    found = []
    for value in of_question.values():
        if isinstance(value, Mapping):
            names, ranks = value.get("value"), value.get("rank")
        elif isinstance(value, list) and all(isinstance(x, Mapping) for x in value):
            names, ranks = ([x.get(name) for x in value] for name in ("value", "rank"))
        else:
            names, ranks = value, list(range(len(value))) if isinstance(value, list) else None
        if not isinstance(names, list) or not isinstance(ranks, list) or None in ranks:
            return []
        if len(names) != len(ranks):
            raise BadRow("a ranking does not name every response once")
        found.append({_plain(name): number(rank, "a rank") for name, rank in zip(names, ranks, strict=True)})
    return found


def _rating(name: str, names: Sequence[str], questions: Questions) -> dict[str, Any] | None:
    """The ratings of a response: of the question that has its name in it, or ends as it ends."""
    others = [_plain(other) for other in names if other != name]
    own, end = _plain(name), _end(name)
    for question, of in questions.items():
        called = _plain(question)
        named_so = own in called and not any(other in called and own in other for other in others)
        if (named_so or _end(question) == end) and _is_numbers(of):
            return of
    return None


def _end(name: str) -> str:
    found = re.search(r"([0-9]+|(?<=[-_ ])[a-z])$", name.strip().lower())
    return found[1] if found else name


def _is_numbers(values: Mapping[str, Any]) -> bool:
    return all(isinstance(x, int | float) and not isinstance(x, bool) for x in values.values())


def _word(value: Any) -> Any:
    return _plain(value) if isinstance(value, str) else value


def _all_name(values: Mapping[str, Any], meaning: Mapping[str, int]) -> bool:
    return all(isinstance(x, str | int) and str(_word(x)) in meaning for x in values.values())


def _places(names: Sequence[str]) -> dict[str, int]:
    """What the names of three responses or more mean, whole or by their ends."""
    ends = {_end(name): place for place, name in enumerate(names)}
    return (
        {_plain(tie): TIE for tie in TIES - {"c"}}
        | ends
        | {_plain(name): place for place, name in enumerate(names)}
    )


READERS: tuple[Reader[Comparison], ...] = (
    Reader(
        'Label Studio {"data", "annotations"}',
        lambda row: isinstance(row.get("data"), Mapping) and isinstance(row.get("annotations"), list),
        _label_studio,
    ),
    Reader(
        'Argilla {"fields", "responses"}',
        lambda row: isinstance(row.get("fields"), Mapping) and isinstance(row.get("responses"), list | dict),
        _argilla,
    ),
    Reader(
        'Argilla on the hub {"prompt", "response_1", "response_2", "preference.responses"}',
        lambda row: "chosen" not in row and len(_names(row)) > 1 and bool(_columns(row)),
        _flat,
    ),
)
