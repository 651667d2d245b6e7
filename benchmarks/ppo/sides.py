"""One child of the PPO benchmark: prepare what both sides need, or run one side and measure it.

``python -m benchmarks.ppo.sides tiny|random|prepare|matmul|ours|theirs TASK RESULT``; both files are JSON.
Each side is a module of its own, so that neither process loads what the other one needs.
"""

from __future__ import annotations

import importlib.metadata
import json
import random
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.harness import Figures
from benchmarks.ppo.task import Task, dialogue_of
from rlhf.data.prompts import read_prompts
from rlhf.errors import UserError, exit_on_user_error
from rlhf.models.onednn import linear
from rlhf.models.tiny import write_tiny_model
from rlhf.runs.artifacts import read_json, write_json
from rlhf.tokenization.dialogue import Dialogue, load_tokenizer

PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate")


# ------------------------------------------------------------------ what both sides need


def prepare(base: str, file: str, number: int, shortest: int, longest: int, seed: int) -> list[Figures]:
    """Prompts of a wanted length: texts of a file in an order drawn from the seed, joined and cut.

    Args:
        base: folder of the model, for its tokenizer.
        file: prompts in any form that ``data.prompts`` takes.
        number: how many.
        shortest: fewest tokens; the lengths are drawn evenly from here.
        longest: most tokens.
        seed: the same seed gives the same prompts.

    Returns:
        ``text`` and its token ``ids``.

    Raises:
        UserError: the file has too few texts.
    """
    dialogue = dialogue_of(base)
    prompts, _ = read_prompts([file], on_bad_rows="skip", key="--prompts")
    draw = random.Random(f"ppo prompts {seed}")
    texts = [" ".join(message.content for message in prompt) for prompt in prompts]
    draw.shuffle(texts)
    rows: list[Figures] = []
    left = iter(texts)
    while len(rows) < number:
        wanted, text = draw.randint(shortest, longest), ""
        while len(_ids(dialogue, text)) < wanted:
            more = next(left, None)
            if more is None:
                raise UserError(
                    f"{Path(file).name}: {len(texts)} texts make {len(rows)} prompts of {shortest} to "
                    f"{longest} tokens, {number} are wanted: give more texts"
                )
            text = f"{text} {more}".strip()
        text = dialogue.decode(_ids(dialogue, text)[:wanted]).strip()
        ids = _ids(dialogue, text)  # a text that was cut inside a word can read otherwise
        if shortest <= len(ids) <= longest and dialogue.pad_id not in ids:
            rows.append({"text": text, "ids": ids})
    return rows


def _ids(dialogue: Dialogue, text: str) -> list[int]:
    return [int(i) for i in dialogue.tokenizer(text)["input_ids"]]


def write_random(base: str, folder: str, parts: int) -> None:
    """Save a random model of the same kind with a part of the layers, and the same tokenizer."""
    config = AutoConfig.from_pretrained(base)
    config.num_hidden_layers //= parts
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)


def matmul_peak(size: int, repeats: int = 8) -> float:
    """Operations a second of the best of several float32 products of two squares, by BLAS or oneDNN."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    ways: list[Any] = [torch.mm, linear]
    for multiply in ways * repeats:
        start = time.perf_counter()
        multiply(a, b)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


def run_side(kind: str, task: Task) -> Figures:
    """Run one side in a scratch folder."""
    rows: list[dict[str, Any]] = read_json(Path(task.rows))["rows"]
    with tempfile.TemporaryDirectory() as scratch:
        if kind == "ours":
            from benchmarks.ppo.ours import ours as side
        else:
            from benchmarks.ppo.trl_side import theirs as side
        found = side(task, rows, Path(scratch))
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    if kind == "ours":
        versions.pop("trl")  # ours has no part of it in PPO
    asked = {**asdict(task), "rows": "", "base": ""}
    return {**found, "threads": torch.get_num_threads(), "versions": versions, "task": asked}


def main() -> None:
    """The child."""
    kind, values = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    if kind in ("ours", "theirs", "matmul"):
        torch.set_num_threads(values["threads"])
    found: Figures = {}
    if kind == "tiny":
        write_tiny_model(Path(values["base"]))
    elif kind == "random":
        write_random(**values)
    elif kind == "prepare":
        found = {"rows": prepare(**values)}
    elif kind == "matmul":
        found = {"flops_per_s": matmul_peak(values["size"])}
    else:
        found = run_side(kind, Task(**values))
    write_json(Path(sys.argv[3]), found)


if __name__ == "__main__":
    exit_on_user_error(main)
