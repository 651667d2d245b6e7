"""The scripts of docs/library.md and docs/preference-models.md run as they stand, on a tiny random model."""

import re
from pathlib import Path

import pytest
from conftest import ROOT

from rlhf.models.tiny import write_tiny_model
from rlhf.training.metrics import read_metrics

SCRIPTS = [
    script
    for page in ("library.md", "preference-models.md")
    for script in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.S)
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory in which the model of the scripts is a tiny random one."""
    monkeypatch.chdir(tmp_path)
    write_tiny_model(tmp_path / "models" / "smollm2-135m")
    return tmp_path


def test_ppo_with_a_reward_function_of_ones_own(folder):
    script = next(text for text in SCRIPTS if "PpoTrainer" in text)
    exec(compile(script, "library.md", "exec"), {"__name__": "script"})
    log = read_metrics(folder / "runs" / "short")
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    assert all(row["objective/score"] < 0 for row in log)
    for adapter in ("policy", "value"):
        assert Path("runs/short", adapter, "adapter_model.safetensors").is_file()


def test_a_reward_model_from_comparisons_in_python(folder):
    script = next(text for text in SCRIPTS if "train_preference_model" in text)
    exec(compile(script, "preference-models.md", "exec"), names := {"__name__": "script"})
    good, bad = names["scores"].tolist()
    assert good > bad
    assert Path("runs/rivers/model/reward_model.json").is_file()
