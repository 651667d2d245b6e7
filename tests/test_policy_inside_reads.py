"""What the reward model reads where responses may be few tokens long."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from policy.inside.minimal_pairs import FILLER, KINDS
from policy.inside.questions import Inspection
from policy.inside.report import _reads
from rlhf.data.comparisons import Message
from rlhf.errors import UserError
from rlhf.recipe.evaluate import Inside
from rlhf.report.inside import _read
from rlhf.runs.artifacts import write_jsonl
from rlhf.tokenization.dialogue import PromptTooLongError

WORDS = len(FILLER.split())  # tokens of the fake tokenizer
TEXT = max(len(good.split()) for good, _ in KINDS[0].texts())


def looked(longest, **options):
    def encode_prompt(prompt):
        if len(prompt[0].content) > 9:
            raise PromptTooLongError("the prompt has too many tokens")

    dialogue = SimpleNamespace(
        encode_answer=str.split, max_response_tokens=longest, encode_prompt=encode_prompt, decode=str
    )
    backbone, recipe = SimpleNamespace(heads={}), SimpleNamespace(inside=Inside(**options))
    models: Any = Inspection(recipe, backbone, dialogue, [(Message("user", "One"),)], None)  # type: ignore[arg-type]
    models._laid_out = lambda pairs, _: [len(pair.good.split()) for pair in pairs]
    return models


@pytest.mark.parametrize(
    ("longest", "added", "left_out"),
    [
        (TEXT + 2 * WORDS, [WORDS, 2 * WORDS], []),
        (TEXT + 2 * WORDS - 1, [WORDS], [2]),
        (TEXT + WORDS - 1, [], [1, 2]),
        (TEXT - 1, [], [1, 2]),
    ],
)
def test_no_response_of_the_question_of_length_is_longer_than_the_policy_s(longest, added, left_out):
    rows = []

    def measure(row):
        rows.extend(row)
        return torch.tensor(row, dtype=torch.float)

    length = looked(longest)._length(SimpleNamespace(measure_plainly=measure))
    assert max(rows, default=0) <= longest
    assert [one["mean"] for one in length["added"]] == added
    assert length["left_out"] == left_out
    page = "".join(_reads({"kinds": {"order": {"pairs": 0, "skipped": "none"}}, "length": length}))
    assert ("longer than `dialogue.max_response_tokens`" in page) == bool(left_out)
    assert ("changes its score" in page) == bool(added)


def test_where_no_pair_fits_there_is_no_table_without_rows():
    found = {"kinds": {"order": {"pairs": 0, "skipped": "none fits"}}}
    found["length"] = {"filler": FILLER, "tokens": 8, "added": [], "left_out": [1, 2]}
    page = "".join(_reads(found))
    assert "No pair has equally many tokens" in page
    assert "|" not in page
    (block,) = _read("key", "", found, [])
    assert "no pair of responses" in block.text


def test_a_prompt_of_an_own_pair_that_is_too_long_is_named(inside):
    write_jsonl(inside / "p.jsonl", [{"prompt": "It was long", "chosen": "good", "rejected": "bad"}])
    with pytest.raises(UserError, match=r"p\.jsonl:1: the prompt has too many tokens; mend that row"):
        looked(8, pairs=["p.jsonl"]).own_pairs("reward")
