"""The prompts of the sentiment lab: distinct, neutral, and nothing of the training set in the held-out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rlhf.collect.judges import vader

PROMPTS = Path(__file__).parents[1] / "recipes" / "prompts"
LEAST = {"sentiment_train": 800, "sentiment_held_out": 200}


def read(name: str) -> list[str]:
    rows = [json.loads(line) for line in (PROMPTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(row.keys() == {"prompt"} for row in rows)
    return [row["prompt"] for row in rows]


def words(prompt: str) -> list[str]:
    return re.findall(r"[\w'-]+", prompt.lower())


@pytest.mark.parametrize("name", LEAST)
def test_there_are_several_hundred_distinct_prompts(name: str) -> None:
    prompts = read(name)
    assert len(prompts) >= LEAST[name]
    assert len({" ".join(words(prompt)) for prompt in prompts}) == len(prompts)


@pytest.mark.parametrize("name", LEAST)
def test_prompts_end_in_the_middle_of_a_sentence(name: str) -> None:
    for prompt in read(name):
        assert prompt == " ".join(prompt.split()), prompt  # a space at the end would split the next token
        assert prompt[-1] not in ".!?", prompt
        assert 6 <= len(prompt.split()) <= 16, prompt


@pytest.mark.parametrize("name", LEAST)
def test_prompts_do_not_lean_to_either_side(name: str) -> None:
    prompts = read(name)
    assert [prompt for prompt, score in zip(prompts, vader(prompts), strict=True) if abs(score) >= 0.3] == []


def test_held_out_prompts_share_neither_opening_nor_phrase_with_training() -> None:
    train, held_out = read("sentiment_train"), read("sentiment_held_out")
    assert not set(train) & set(held_out)
    assert not {tuple(words(prompt)[:3]) for prompt in train} & {
        tuple(words(prompt)[:3]) for prompt in held_out
    }

    # A shared template or a shared subject with its frame would show as a common run of four words.
    def runs(prompts: list[str]) -> set[tuple[str, ...]]:
        return {
            tuple(words(prompt)[start : start + 4])
            for prompt in prompts
            for start in range(len(words(prompt)) - 3)
        }

    assert not runs(train) & runs(held_out)
