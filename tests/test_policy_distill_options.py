"""Every option of context distillation changes what it should and nothing else.

A new field of the section fails here until it has a line in the table.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_distill import results, run, steps, write_lab

from policy.distillation.trainer import DistillTrainer
from rlhf.models.tiny import write_tiny_model
from rlhf.recipe.schema import Distill


@pytest.fixture
def lab(inside):
    """A folder with all that the stage reads."""
    write_lab(inside)
    return inside


LEARNED = {"first", "weights"}
SAID = {"words"} | LEARNED
CHOSEN = {"rows"} | SAID
LENGTH = {"rates", "saves"}  # of the training
TABLE = {  # field: (its other value, what it changes)
    "texts": ("others.jsonl", CHOSEN),
    "questions": ("more.jsonl", CHOSEN),
    "text_share": (0.75, CHOSEN | LENGTH),
    "sequences": (14, CHOSEN | {"shards"} | LENGTH),
    "max_tokens": (36, CHOSEN),
    "held_out": (0.7, {"rows"} | LEARNED | LENGTH),
    "teacher": ("models/wise", SAID),
    "teacher_cache": ("words", {"files"}),
    "top_k": (5, SAID),
    "shard_sequences": (12, {"shards"}),
    "method": ("full", {"weights", "files", "trunk"}),
    "start": ("runs/first/distill/policy", LEARNED | {"figures"}),
    "epochs": (3, LENGTH),
    "batch_size": (16, LEARNED | LENGTH),
    "learning_rate": (2e-2, {"rates", "weights"}),
    "warmup_steps": (2, {"rates", "weights"}),
    "max_grad_norm": (1e-7, {"weights"}),
    "tokens_per_micro_batch": (100, set()),
    "trunk_gigabytes": (0.0, {"trunk"}),
    "full_kl_sequences": (0, {"figures"}),
    "checkpoint_every": (1, {"saves"}),
}


def observe(name, monkeypatch, **changes):
    """Run the stage and look at all that an option can change."""
    seen = {"saves": 0}
    with monkeypatch.context() as patch:
        save, step = DistillTrainer._checkpoint, DistillTrainer._step

        def saving(self):
            seen["saves"] += 1
            seen["trunk"] = self.trunk is not None
            save(self)

        def stepping(self, number):
            figures = step(self, number)
            seen.setdefault("first", figures["distill/kl"])
            seen.setdefault("weights", {n: p.detach().clone() for n, p in self.student.parameters().items()})
            return figures

        patch.setattr(DistillTrainer, "_checkpoint", saving)
        patch.setattr(DistillTrainer, "_step", stepping)
        folder = run(name=name, **changes)
    words = Path(changes.get("teacher_cache", folder / "teacher"))
    index = json.loads((words / "index.json").read_text())
    records = np.concatenate([np.load(words / shard) for shard in sorted(index["shards"])])
    return seen | {
        "rows": index["key"]["sequences"],
        "words": [float(records[field].astype(float).sum()) for field in ("log_prob", "log_rest")],
        "shards": len(index["shards"]),
        "rates": [row["distill/learning_rate"] for row in steps(folder)],
        "figures": sorted(results(folder)["held_out"]),
        "files": sorted(
            {str(p.relative_to(folder).parts[0]) for p in folder.rglob("*.*") if "tensorboard" not in p.parts}
        ),
    }


def alike(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-4)
    if isinstance(one, float) or (isinstance(one, list) and one and isinstance(one[0], float)):
        return one == pytest.approx(other, rel=1e-4)
    return one == other


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder with a plain run, and what was seen of it."""
    folder = tmp_path_factory.mktemp("plain")
    write_lab(folder)
    write_tiny_model(folder / "models" / "wise", seed=7)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        seen = observe("first", patch)
    return folder, seen


@pytest.mark.parametrize("field", TABLE)
def test_an_option_changes_what_it_should_and_nothing_else(field, plain, monkeypatch):
    value, changes = TABLE[field]
    folder, before = plain
    monkeypatch.chdir(folder)
    after = observe(field, monkeypatch, **{field: value})
    assert {name for name in before if not alike(before[name], after[name])} == changes


def test_every_option_has_its_line():
    assert set(TABLE) == set(Distill.model_fields)


def test_the_default_rate_is_a_share_of_that_of_pre_training(lab):
    folder = run(learning_rate=..., model__pretraining_learning_rate=0.02)
    assert results(folder)["learning_rate"] == pytest.approx(0.05 * 0.02)
    rates = [row["distill/learning_rate"] for row in steps(folder)]
    expected = [1e-3 * (1 - n / len(rates)) for n in range(len(rates))]
    assert rates == pytest.approx(expected)
