"""A PPO step's processor seconds by its parts: the command runs, and the parts are within the whole."""

import re

import pytest
from conftest import PROMPTS, TINY, stage

from benchmarks import ppo_step
from rlhf.models import prepare


@pytest.mark.slow
def test_the_parts_of_a_step_are_told_within_the_whole(inside, capsys, monkeypatch):
    for holder, name in ppo_step._PARTS.values():
        monkeypatch.setattr(holder, name, getattr(holder, name))  # put back behind the test
    stage(prepare.main)
    monkeypatch.setattr("sys.argv", ["x", "--profile", str(TINY), *PROMPTS, "model.dtype=bfloat16"])
    ppo_step.main()
    said = capsys.readouterr().out
    found = dict(re.findall(r"(sampling|log-probs and values|update|whole step) ([\d.]+) s", said))
    assert len(found) == 4
    whole = float(found.pop("whole step"))
    assert sum(map(float, found.values())) <= whole + 0.3
    assert "bfloat16: " in said
    assert "aten::mm" in said
