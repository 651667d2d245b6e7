"""Benchmark suites of reward models, as comparisons whose ``source`` is the subset and ``group`` the item.

What their tables need is in these two fields and in the ranks:

- RM-Bench {"id", "prompt", "chosen": 3, "rejected": 3}: nine pairs an item, group "rm_bench:ID:C:R" with the
  styles C of the chosen and R of the rejected one (0 concise, 1 detailed, 2 detailed with Markdown), so that
  C < R is hard, C = R normal, C > R easy. source: "domain", else the name of the file without "_filtered".
- RewardBench 1 {"prompt", "chosen", "rejected", "subset", "id"}: a pair, group "reward_bench:ID".
- RewardBench 2 {"id", "prompt", "chosen": [..], "rejected": [..], "subset", "num_correct"}: one comparison an
  item, rank 0 for the chosen ones, 1 for the rejected: K = 4 with one chosen; the subset Ties has several of
  both, and its ids ("ref:1", "tied:1") stay in the group "reward_bench_2:ID".
- JudgeBench {"pair_id", "question", "response_A", "response_B", "label": "A>B"}: a pair, group
  "judge_bench:PAIR", source the row's.
- PPE: human preference {"question_id", "prompt", "response_1", "response_2", "winner"}: a pair, source
  "human"; correctness {"prompt", "response_1", ..., "scores", "question_id"}: rank 0 for the right ones, 1
  for the wrong ones. group "ppe:ID".

They are for the card, not for training.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from rlhf.data.comparisons import Comparison
from rlhf.data.readers.public.verdicts import TIE, as_prompt, named, number, side, text, texts, voted
from rlhf.data.readers.rows import BadRow, LeftOut, Reader, Row, is_list, is_text, ranked_by_score

Found = Iterator[Comparison | LeftOut]
_STYLES = 3
_JUDGED = {"a>b": 0, "b>a": 1, "a=b": TIE}
_WINNER = {"model_a": 0, "model_b": 1, "tie": TIE, "tie (bothbad)": TIE, "model_1": 0, "model_2": 1}


def _rm_bench(row: Row, source: str) -> Found:
    chosen, rejected = texts(row["chosen"]), texts(row["rejected"])
    domain = str(row.get("domain") or source.removesuffix("_filtered"))
    prompt = as_prompt(row["prompt"])
    [row.get(name) for name in ("subset", "error_key", "error")]
    for c, better in enumerate(chosen):
        for r, worse in enumerate(rejected):
            group = f"rm_bench:{row['id']}:{c}:{r}"
            yield Comparison(prompt, (better, worse), (0, 1), domain, None, group)


def _reward_bench(row: Row, source: str) -> Found:
    sides = text(row["chosen"]), text(row["rejected"])
    group = f"reward_bench:{row['id']}"
    yield Comparison(as_prompt(row["prompt"]), sides, (0, 1), str(row["subset"]), None, group)


def _reward_bench_2(row: Row, source: str) -> Found:
    chosen, rejected = texts(row["chosen"]), texts(row["rejected"])
    ranks = (0,) * len(chosen) + (1,) * len(rejected)
    group = f"reward_bench_2:{row['id']}"
    yield Comparison(as_prompt(row["prompt"]), (*chosen, *rejected), ranks, str(row["subset"]), None, group)


def _judge_bench(row: Row, source: str) -> Found:
    sides = texts((row["response_A"], row["response_B"]))
    vote = side(row["label"], "label", _JUDGED)
    name = str(row.get("source") or source)
    yield voted(as_prompt(row["question"]), sides, [vote], name, f"judge_bench:{row['pair_id']}")


def _ppe_human(row: Row, source: str) -> Found:
    sides = texts((row["response_1"], row["response_2"]))
    vote = side(row["winner"], "winner", _WINNER)
    yield voted(as_prompt(row["prompt"]), sides, [vote], "human", f"ppe:{row['question_id']}")


def _ppe_correctness(row: Row, source: str) -> Found:
    names = sorted((x for x in row if re.fullmatch("response_[0-9]+", x)), key=lambda x: int(x[9:]))
    right = [number(int(x) if isinstance(x, bool) else x) for x in row["scores"]]
    if len(right) != len(names):
        raise BadRow("not as many scores as responses", f"{len(right)} and {len(names)}")
    found = ranked_by_score(as_prompt(row["prompt"]), texts(row[name] for name in names), right, source)
    yield found if isinstance(found, LeftOut) else Comparison(
        found.prompt, found.responses, found.ranks, source, None, f"ppe:{row['question_id']}"
    )  # fmt: skip


def _lists(row: Row) -> bool:
    """Whether both sides are lists of texts, and not messages."""
    return is_list(row, "chosen", "rejected") and all(
        isinstance(x, str) for x in (*row["chosen"], *row["rejected"])
    )


READERS = (
    Reader(
        'RewardBench 2 {"id", "prompt", "chosen", "rejected", "subset", "num_correct"}',
        lambda row: _lists(row) and named(row, "id", "prompt", "subset", "num_correct"),
        _reward_bench_2,
    ),
    Reader(
        'RM-Bench {"id", "prompt", "chosen", "rejected"} with three texts each',
        lambda row: (
            _lists(row)
            and "id" in row
            and "prompt" in row
            and len(row["chosen"]) == len(row["rejected"]) == _STYLES
        ),
        _rm_bench,
    ),
    Reader(
        'RewardBench {"prompt", "chosen", "chosen_model", "rejected", "rejected_model", "subset", "id"}',
        lambda row: is_text(row, "prompt", "chosen", "rejected", "subset", "chosen_model") and "id" in row,
        _reward_bench,
    ),
    Reader(
        'JudgeBench {"pair_id", "question", "response_A", "response_B", "label"}',
        lambda row: named(row, "pair_id", "question", "response_A", "response_B", "label"),
        _judge_bench,
    ),
    Reader(
        'PPE {"question_id", "prompt", "response_1", "response_2", "winner"}',
        lambda row: named(row, "question_id", "prompt", "response_1", "response_2", "winner"),
        _ppe_human,
    ),
    Reader(
        'PPE {"question_id", "prompt", "response_1", "response_2", "scores"}',
        lambda row: named(row, "question_id", "prompt", "response_1") and is_list(row, "scores"),
        _ppe_correctness,
    ),
)
