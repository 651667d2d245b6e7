"""Functions of a file as judges: called as trl calls them, and every mistake told by its name and line."""

import math

import pytest
from conftest import ROOT

from rlhf.collect.functions import RewardFunction
from rlhf.data.comparisons import Message, prompt_key
from rlhf.errors import UserError

PROMPTS = [(Message("system", "Be brief."), Message("user", "two and two")), (Message("user", "a river"),)]
SAID = ["four", "The Rhine."]
FILE = """
from __future__ import annotations
import helper_of_rewards
import asyncio
import dataclasses

seen = []


def plain(prompts, completions, **kwargs):
    seen.append((prompts, completions, sorted(kwargs)))
    return [helper_of_rewards.size(text) for text in completions]


def positional(completions, prompts):
    return tuple(len(text) for text in completions)


def with_answer(completions, answer, unit="m"):
    seen.append((answer, unit))
    return [float(text == right) for text, right in zip(completions, answer)]


def messages(completions, **kwargs):
    return [len(turns[0]["content"]) for turns in completions]


def passes(completions, **kwargs):
    return [None, 1]


async def slow(completions, **kwargs):
    await asyncio.sleep(0)
    return [0.5] * len(completions)


def spoils(prompts, completions):
    del prompts[:]
    completions.clear()
    return [0, 0]


def divides(completions, **kwargs):
    return [1 / 0 for _ in completions]


def short(completions, **kwargs):
    return [1.0]


def words(completions, **kwargs):
    return ["good", "bad"]


def endless(completions, **kwargs):
    return [1.0, float("inf")]


def one(completions, **kwargs):
    return 1.0


def needs_ids(completions, completion_ids):
    return [len(ids) for ids in completion_ids]


def by_place(completions, /):
    return [0, 0]


@dataclasses.dataclass
class Rubric:
    weight: dataclasses.InitVar[float]


number = 3
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    (tmp_path / "helper_of_rewards.py").write_text("def size(text):\n    return len(text)\n")
    (tmp_path / "own.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "own.py"


def function(name, **options):
    return RewardFunction(f"own.py:{name}", "ppo.rewards[0]", **{"chat": False} | options)


def test_a_function_is_called_as_trl_calls_it(file):
    judge = function("plain", has_ids=True)
    assert judge(PROMPTS, SAID, [[1, 2], [3]]) == [4.0, 10.0]
    seen = judge._function.__globals__["seen"]
    assert seen == [
        (
            ["Be brief.\n\ntwo and two", "a river"],
            SAID,
            ["completion_ids", "log_extra", "log_metric", "trainer_state"],
        )
    ]
    assert function("positional")(PROMPTS, SAID) == [4.0, 10.0]
    assert function("slow")(PROMPTS, SAID) == [0.5, 0.5]
    assert function("needs_ids", has_ids=True)(PROMPTS, SAID, [[1, 2], [3]]) == [2.0, 1.0]


def test_with_a_chat_template_it_gets_messages(file):
    assert function("messages", chat=True)(PROMPTS, SAID) == [4.0, 10.0]
    judge = function("plain", chat=True)
    assert judge._messages(PROMPTS[0]) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "two and two"},
    ]


def test_columns_come_by_name_and_in_the_order_of_the_prompts(file):
    columns = {prompt_key(PROMPTS[1]): {"answer": "The Rhine."}, prompt_key(PROMPTS[0]): {"answer": "4"}}
    judge = function("with_answer", names=["answer"], columns=columns)
    assert judge(PROMPTS, SAID) == [0.0, 1.0]
    assert judge._function.__globals__["seen"][-1] == (["4", "The Rhine."], "m")
    with pytest.raises(UserError, match=r"takes the column answer, and a prompt is of no row .*'other'"):
        judge([(Message("user", "other"),)], ["x"])


def test_none_passes_where_it_may(file):
    passed = function("passes", may_pass=True)(PROMPTS, SAID)
    assert math.isnan(passed[0])
    assert passed[1] == 1.0
    with pytest.raises(UserError, match="None, and a judge must score every response for response 1 of 2"):
        function("passes")(PROMPTS, SAID)


def test_what_it_does_to_its_arguments_stays_with_it(file):
    prompts, said = list(PROMPTS), list(SAID)
    assert function("spoils")(prompts, said) == [0.0, 0.0]
    assert (prompts, said) == (PROMPTS, SAID)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "divides",
            r"own\.py:divides failed on 2 responses \(ZeroDivisionError: division by zero, line 44\)",
        ),
        ("short", "own.py:short returned 1 numbers for 2 responses"),
        ("words", "own.py:words returned 'good' for response 1 of 2"),
        ("endless", "own.py:endless returned inf for response 2 of 2"),
        ("one", "own.py:one returned a float, not a list with a number a response"),
    ],
)
def test_what_a_function_gets_wrong_is_told(file, name, message):
    with pytest.raises(UserError, match=message) as caught:
        function(name)(PROMPTS, SAID)
    assert str(caught.value).startswith("ppo.rewards[0]: ")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone", r"gone is no function of the file own\.py; it has plain, positional"),
        ("number", r"number is no function own\.py"),
        ("with_answer", r"needs an argument 'answer': no column gives it \(data\.prompt_columns: none\)"),
        ("needs_ids", "needs an argument 'completion_ids': only rewards of PPO are given token ids"),
        ("by_place", "arguments are given by name; remove the / from its definition"),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_before_it_is(file, name, message):
    with pytest.raises(UserError, match=message):
        function(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "gone.py is not there; check the path"),
        ("def f(:\n", r"cannot be run \(SyntaxError: .*, line 1\)"),
        ("x = 1\nimport no_such_module_of_anybody\n", r"ModuleNotFoundError: .*, line 2\)"),
        ("raise SystemExit(3)\n", r"cannot be run \(SystemExit: 3, line 1\)"),
    ],
)
def test_a_file_that_cannot_be_run_is_told(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "gone.py").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        RewardFunction("gone.py:f", "evaluate.judge", chat=False)
    assert str(caught.value).startswith("evaluate.judge: ")


def test_the_functions_to_start_from_score_texts_and_messages():
    def scores(name, said, **options):
        made = {}
        for chat in (False, True):
            example = RewardFunction(
                f"{ROOT}/recipes/reward_functions.py:{name}", "ppo.rewards[0]", chat=chat, has_ids=True,
                may_pass=True, **options,
            )  # fmt: skip
            prompts = [PROMPTS[1]] * len(said)
            made[chat] = example(prompts, said, [list(range(100 * i)) for i in range(1, len(said) + 1)])
        assert str(made[False]) == str(made[True])
        return made[True], example

    assert scores("brevity", ["", "x" * 100, "x" * 999])[0] == [1.0, 0.75, 0.0]
    known = {"names": ["answer"], "columns": {prompt_key(PROMPTS[1]): {"answer": "1,820".replace(",", "")}}}
    assert scores("right_answer", ["in 3 parts 1,820", "none", "18 20"], **known)[0] == [1.0, 0.0, 0.0]
    unknown = {"names": ["answer"], "columns": {prompt_key(PROMPTS[1]): {"answer": None}}}
    assert math.isnan(scores("right_answer", ["7"], **unknown)[0][0])
    formed, example = scores(
        "well_formed", ["<think>so</think>\n<answer>4</answer>", "<answer>4</answer>", "4"]
    )
    assert formed == [1.0, 0.0, 0.0]
    assert example.metrics == {"answers": [2 / 3]}
    assert scores("variety", ["a b c", "a b a b a b", "a"])[0] == [1.0, 0.4, 0.0]
    early, example = scores("length_schedule", ["x"] * 3)
    assert early == [0.0, 0.0, -44 / 64]
    example.trainer_state.global_step = example.trainer_state.max_steps = 10
    assert example([PROMPTS[1]], ["x"], [list(range(100))]) == [-36 / 64]
