"""What annotation tools export: Label Studio's JSON and Argilla's records. Several annotators are votes.

Label Studio {"data", "annotations"}: a ``pairwise`` result selects left or right; a ``ranker`` result lists
the ids of data's items, the best first. The flat exports (JSON_MIN, CSV) are pairs with a verdict, see
:mod:`rlhf.data.readers.public.pairs`. Argilla {"fields", "responses"}: the answer to the first question names
a field of the record or its end, or is a ranking [{"value": field, "rank": 1}, ...]. Rankings of several
annotators are averaged. Discarded and canceled work does not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf.data.comparisons import Comparison, Prompt
from rlhf.data.readers.public.pairs import columns_of_sides, meaning_of, votes_in
from rlhf.data.readers.public.verdicts import asked, graded, number, text, voted
from rlhf.data.readers.rows import BadRow, LeftOut, Reader, Row

Found = Iterator[Comparison | LeftOut]


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
    yield voted(asked(data), sides, votes_in(chosen, "selected", meaning), source)


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


def _argilla(row: Row, source: str) -> Found:
    fields = row["fields"]
    values = [x for x in _answers(row["responses"]) if x is not None]
    prompt = asked({name: x for name, x in fields.items() if not _is_response(name)})
    rankings = [x for x in values if isinstance(x, list)]
    if rankings:
        answers = {name: text(x) for name, x in fields.items() if _is_response(name)}
        scores = [{x["value"]: number(x["rank"], "a rank") for x in ranking} for ranking in rankings]
        if any(of.keys() != answers.keys() for of in scores):
            raise BadRow("a ranking does not name every response once")
        grades = [[-of[name] for of in scores] for name in answers]
        yield graded(prompt, list(answers.values()), grades, source)
        return
    found = columns_of_sides(fields)
    if found is None:
        raise BadRow("no two responses", f"fields are {', '.join(map(str, fields))}"[:80])
    votes = votes_in(values, "value", meaning_of(*found))
    yield voted(prompt, [text(fields[name]) for name in found[:2]], votes, source)


def _is_response(name: str) -> bool:
    return name.lower().startswith(("response", "answer", "completion", "output"))


def _answers(responses: Any) -> list[Any]:
    """The values of the first question: of a list of users' answers, or of a list per question."""
    if isinstance(responses, Mapping):
        given = next(iter(responses.values()), None) or []
    else:
        given = [
            {**next((x for x in (of.get("values") or {}).values()), {}), "status": of.get("status")}
            for of in responses
            if isinstance(of, Mapping)
        ]
    return [x.get("value") for x in given if isinstance(x, Mapping) and x.get("status") != "discarded"]


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
)
