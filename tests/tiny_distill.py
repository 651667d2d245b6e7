"""Passages and prompts for the tests of context distillation, around the tiny byte tokenizer."""

import json
from pathlib import Path

import numpy as np
from conftest import stage

from policy.distillation import __main__ as distill
from policy.distillation.data import Passage
from rlhf.models.tiny import tiny_tokenizer, write_tiny_model
from rlhf.runs.artifacts import MANIFEST
from rlhf.tokenization.dialogue import Dialogue
from rlhf.training.metrics import read_metrics

PROMPT = "Be kind.\n\n-----\n\nHuman: Hello?\n\nAssistant: Good day to you.\n"


def dialogue_of(template="chat"):
    """The token contract."""
    return Dialogue(tiny_tokenizer(), template=template, max_prompt_tokens=400, max_response_tokens=99)


def ids_of(text):
    """A token a byte."""
    return np.asarray(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"], dtype=np.uint32)


def passage(text, *, teacher_prefix="", student_prefix="", group=None):
    """A passage of this text."""
    first = 0 if student_prefix else 1
    ids = (ids_of(part) for part in (teacher_prefix, student_prefix, text))
    return Passage("texts", group or text, *ids, first, first)


# ---- a folder in which the stage can run

SMALL = {
    "hhh_prompt": "prompt.txt",
    "dialogue.template": "chat",
    "distill.texts": "texts.jsonl",
    "distill.questions": "questions.jsonl",
    "distill.sequences": 24,
    "distill.max_tokens": 40,
    "distill.held_out": 0.25,
    "distill.top_k": 20,
    "distill.shard_sequences": 8,
    "distill.batch_size": 6,
    "distill.epochs": 2,
    "distill.learning_rate": 1e-2,
    "distill.full_kl_sequences": 4,
    "distill.checkpoint_every": 2,
}
"""Options of a run that takes a second."""
WORDS = "the a lamp river of stone sees under green and paper house goes with seven birds slow".split()  # noqa: SIM905


def sentence(seed, number):
    """Some words, a function of the seed."""
    rng = np.random.default_rng(seed)
    return " ".join(WORDS[n] for n in rng.integers(len(WORDS), size=number))


def write_lab(folder):
    """The tiny model, a prompt, texts and questions; returns the folder."""
    write_tiny_model(folder / "models" / "tiny")
    (folder / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    for name, first in (("texts", 0), ("others", 500)):
        write_rows(folder / f"{name}.jsonl", [{"text": sentence(first + n, 6 + n % 5)} for n in range(60)])
    for name, first in (("questions", 1000), ("more", 1500)):
        rows = [
            {
                "prompt": [{"role": "user", "content": f"{sentence(first + n, 2)}?"}],
                "responses": [sentence(first + n + 200, 1), sentence(first + n + 100, 2)],
                "ranks": [1, 0],
                "source": "me",
            }
            for n in range(60)
        ]
        write_rows(folder / f"{name}.jsonl", rows)
    return folder


def write_rows(file, rows):
    """JSON Lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def overrides(**changes):
    """The options as a command line has them; ``a__b`` stands for ``a.b``, a bare name for one of distill."""
    options = dict(SMALL)
    for name, value in changes.items():
        key = (
            name.replace("__", ".")
            if "__" in name or name in ("name", "seed", "hhh_prompt")
            else f"distill.{name}"
        )
        options[key] = value
    return [f"{key}={json.dumps(value)}" for key, value in options.items() if value is not ...]


def run(**changes):
    """Run the stage; returns its folder."""
    stage(distill.main, *overrides(**changes))
    return Path("runs", changes.get("name", "tiny"), "distill")


def results(folder):
    """The figures of a finished run."""
    return json.loads((folder / MANIFEST).read_text())["results"]


def steps(folder):
    """The log without times."""
    return [
        {name: value for name, value in row.items() if not name.startswith("time/")}
        for row in read_metrics(folder)
    ]
