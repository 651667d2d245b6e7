"""A reward function is held to its word: it answers in time, with one finite number a response."""

import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

from policy.ppo.checks import GuardedScore
from policy.ppo.rollout import Responses
from rlhf.errors import UserError

SAID = Responses([()] * 3, ["a", "b", "c"], torch.zeros(3, 4, dtype=torch.long), torch.ones(3, 4) > 0, None)


def raising(error):
    def score(said):
        raise error

    return score


def answering(*scores):
    return lambda said: torch.tensor(scores)


def test_a_good_answer_is_passed_on_unchanged():
    assert GuardedScore(answering(1.0, -2.0, 3.5), 1)(SAID).tolist() == [1.0, -2.0, 3.5]


@pytest.mark.parametrize(
    ("reward_fn", "message"),
    [
        (raising(KeyError("token")), r"failed on 3 responses \(KeyError: 'token'\)"),
        (raising(ValueError("first line\nsecond line")), r"\(ValueError: first line\)"),
        (raising(RuntimeError()), r"\(RuntimeError: \)"),
        (raising(UserError("as it is")), r"^as it is$"),
        (answering(1.0, 2.0), r"shape \(2,\) for 3 responses"),
        (answering([1.0], [2.0], [3.0]), r"shape \(3, 1\) for 3 responses"),
        (answering(1.0, torch.nan, 2.0), "1 of 3 scores are not finite"),
        (answering(torch.inf, -torch.inf, 2.0), "2 of 3 scores are not finite"),
    ],
)
def test_a_bad_answer_is_one_line_that_says_what_it_was(reward_fn, message):
    with pytest.raises(UserError, match=message) as caught:
        GuardedScore(reward_fn, 1)(SAID)
    assert "\n" not in str(caught.value)


def test_what_ends_a_program_goes_through():
    for error in (KeyboardInterrupt(), SystemExit(3)):
        with pytest.raises(type(error)):
            GuardedScore(raising(error), 1)(SAID)


HANGS = """
import time, torch
from policy.ppo.rollout import Responses
from policy.ppo.checks import GuardedScore

said = Responses([()], ["a"], torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2) > 0, None)
guarded = GuardedScore(lambda said: torch.zeros(1), 0.3 / 60)
guarded(said)
time.sleep(0.8)  # an answer in time is not held against it later
print("alive", time.time(), flush=True)
guarded.reward_fn = lambda said: time.sleep(600)
guarded(said)
"""


def test_a_call_that_hangs_ends_the_process_in_time_with_one_line():
    done = subprocess.run(
        [sys.executable, "-c", HANGS], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    ended = time.time()
    assert done.returncode == 2
    alive, since = done.stdout.split()
    assert alive == "alive"
    assert ended - float(since) < 120  # the limit is 0.3 s; a busy machine takes long to notice
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ppo: the reward function has not answered for 0.005 minutes")
    assert "ppo.score_timeout_minutes" in line
