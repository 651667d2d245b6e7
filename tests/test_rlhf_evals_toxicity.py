"""Toxicity-style prompts: what is counted, and who judges."""

import numpy as np
import pytest

from rlhf.collect.judges import vader
from rlhf.evals.model import LanguageModel
from rlhf.evals.tasks import toxicity
from rlhf.evals.tasks.toxicity import Item, flagged, judged, outcome, respond, run
from rlhf.models.tiny import tiny_model, tiny_tokenizer

ITEMS = [Item("a:1", "So you", "calm"), Item("a:2", "Listen, the", "rude"), Item("b:1", "Well", "")]


class Parrot:
    """Writes what it was asked and how often it was asked already."""

    def __init__(self):
        self.asked = []

    def encode(self, text):
        return list(text.encode())

    def generate(self, contexts, **options):
        self.asked.append((contexts, options))
        return [f"{bytes(ids).decode()} {i}" for i, ids in enumerate(contexts)]


# --- counting --------------------------------------------------------------------------------------------


def test_figures_are_those_of_loops():
    scores = [[0.4, -0.2, -0.05], [0.0, 0.1, 0.9], [-1.0, -0.9, -0.5]]
    found = outcome(ITEMS, scores)
    assert found.higher_is_better
    assert found.metric == "score"
    assert found.values["score"] == pytest.approx([np.mean(row) for row in scores])
    assert found.values["worst"] == [-0.2, 0.0, -1.0]
    assert found.values["flagged"] == pytest.approx([2 / 3, 0.0, 1.0])  # -0.05 itself is flagged
    assert found.ids == ["a:1", "a:2", "b:1"]
    assert found.groups == ["calm", "rude", ""]
    assert "-0.05 or below" in found.notes[0]
    assert "3 responses" in found.notes[1]
    alone = outcome(ITEMS, [row[:1] for row in scores])
    assert set(alone.values) == {"score", "flagged"}
    assert len(alone.notes) == 1
    assert found.mean("flagged").mean == pytest.approx(5 / 9)


def test_a_classifier_of_toxicity_counts_the_other_way_round():
    scores = [[0.1, 0.5], [0.7, 0.9], [0.0, 0.2]]
    found = outcome(ITEMS, scores, threshold=0.5, higher_is_better=False)
    assert not found.higher_is_better
    assert found.values["worst"] == [0.5, 0.9, 0.2]
    assert found.values["flagged"] == [0.5, 1.0, 0.0]
    assert "0.5 or above" in found.notes[0]
    assert flagged(0.5, threshold=0.5, higher_is_better=False)
    assert not flagged(0.49, threshold=0.5, higher_is_better=False)
    assert not flagged(0.51, threshold=0.5, higher_is_better=True)


def test_the_judge_sees_prompt_and_response_in_order():
    seen = []

    def judge(prompts, responses):
        seen.extend(zip(prompts, responses, strict=True))
        return [float(len(r)) for r in responses]

    assert judged(["p", "q"], [["a", "bb"], ["ccc", ""]], judge) == [[1.0, 2.0], [3.0, 0.0]]
    assert seen == [("p", "a"), ("p", "bb"), ("q", "ccc"), ("q", "")]


# --- writing ---------------------------------------------------------------------------------------------


def test_every_prompt_is_continued_as_often_as_asked():
    lm = Parrot()
    assert respond(lm, ITEMS, samples=2, max_new_tokens=5, temperature=0.7, top_p=0.8, seed=3) == [
        ["So you 0", "So you 1"],
        ["Listen, the 2", "Listen, the 3"],
        ["Well 4", "Well 5"],
    ]
    ((_, options),) = lm.asked
    assert options.pop("names") == ["a:1", "a:1", "a:2", "a:2", "b:1", "b:1"]
    assert options == {"max_new_tokens": 5, "temperature": 0.7, "top_p": 0.8, "seed": 3}


def test_vader_judges_what_was_written_where_nobody_else_is_named():
    found = run(Parrot(), ITEMS)
    assert found.values["score"] == vader(["So you 0", "Listen, the 1", "Well 2"])
    harsh = run(Parrot(), ITEMS, judge=lambda _, responses: [2.0 for _ in responses], threshold=2.0)
    assert harsh.values["flagged"] == [1.0] * 3


def test_a_real_model_writes_the_same_for_the_same_seed():
    tokenizer = tiny_tokenizer()
    lm = LanguageModel(tiny_model(len(tokenizer)), tokenizer)
    options = {"samples": 2, "max_new_tokens": 6}
    first = respond(lm, ITEMS, seed=1, **options)
    assert first == respond(lm, ITEMS, seed=1, **options)
    assert first != respond(lm, ITEMS, seed=2, **options)
    assert [len(said) for said in first] == [2, 2, 2]
    assert first[0][0] != first[0][1]
    greedy = respond(lm, ITEMS, seed=1, temperature=0.0, **options)
    assert greedy[0][0] == greedy[0][1]
    assert [0 < len(said[0]) <= 6 for said in first] == [True] * 3  # a token is a byte
    assert toxicity.run(lm, ITEMS, seed=1).ids == [item.id for item in ITEMS]
