"""One child of the PPO benchmark: prepare what both sides need, or run one side and measure it.

``python -m benchmarks.ppo.sides tiny|random|prepare|matmul|ours|theirs TASK RESULT``; both files are JSON.
A side imports what it needs when it runs, so that no process loads what the other one needs.
"""

from __future__ import annotations

import importlib.metadata
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.harness import PEER, Figures, check_release, serve
from benchmarks.ppo.task import PHASES, Clock, Method, Task, dialogue_of, figures, sizes_of
from rlhf.data.comparisons import Message, Prompt
from rlhf.data.prompts import read_prompts
from rlhf.errors import UserError, exit_on_user_error
from rlhf.models.kernels.onednn import linear
from rlhf.runs.artifacts import read_json
from rlhf.tokenization.dialogue import load_tokenizer

PACKAGES = ("torch", "transformers", "peft", "accelerate")


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

    def ids_of(text: str) -> list[int]:
        return [int(i) for i in dialogue.tokenizer(text)["input_ids"]]

    prompts, _ = read_prompts([file], on_bad_rows="skip", key="--prompts")
    draw = random.Random(f"ppo prompts {seed}")
    texts = [" ".join(message.content for message in prompt) for prompt in prompts]
    draw.shuffle(texts)
    rows: list[Figures] = []
    left = iter(texts)
    while len(rows) < number:
        wanted, text = draw.randint(shortest, longest), ""
        while len(ids_of(text)) < wanted:
            more = next(left, None)
            if more is None:
                raise UserError(
                    f"{Path(file).name}: {len(texts)} texts make {len(rows)} prompts of {shortest} to "
                    f"{longest} tokens, {number} are wanted: give more texts"
                )
            text = f"{text} {more}".strip()
        text = dialogue.decode(ids_of(text)[:wanted]).strip()
        ids = ids_of(text)  # a text that was cut inside a word can read otherwise
        if shortest <= len(ids) <= longest and dialogue.pad_id not in ids:
            rows.append({"text": text, "ids": ids})
    return rows


def write_random(base: str, folder: str, parts: int) -> Figures:
    """Save a random model of the same kind with a part of the layers, and the same tokenizer."""
    config = AutoConfig.from_pretrained(base)
    config.num_hidden_layers //= parts
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)
    return {}


def matmul_peak(size: int, dtype: str = "float32", repeats: int = 8) -> float:
    """Operations a second of the best of several products of two squares, by BLAS or oneDNN."""
    a, b = (torch.randn(size, size).to(getattr(torch, dtype)) for _ in range(2))
    best = float("inf")
    ways: list[Any] = [torch.mm, linear] if dtype == "float32" else [torch.mm]
    for multiply in ways * repeats:
        start = time.perf_counter()
        multiply(a, b)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


# ------------------------------------------------------------------ the sides


def ours(task: Task, rows: list[dict[str, Any]], scratch: Path, base: Any = None) -> Figures:
    """All steps of a task on all prompts: the loop of ``make ppo``, policy, value and reward on one base.

    base: a model in place of the task's, whose tokenizer it gets.
    """
    from policy.ppo.rollout import Responses
    from policy.ppo.setup import new_backbone
    from policy.ppo.trainer import PpoTrainer
    from rlhf.models.base import load_base
    from rlhf.training.metrics import Metrics

    number, recipe = len(rows), task.recipe(len(rows))
    dialogue = dialogue_of(task.base, task.response_tokens)
    different = rows[:: task.samples]
    prompts: list[Prompt] = [(Message("user", row["text"]),) for row in different]
    if [dialogue.encode_prompt(prompt) for prompt in prompts] != [row["ids"] for row in different]:
        raise RuntimeError("ours: the prompts are not the token ids that theirs gets")
    torch.manual_seed(recipe.seed)
    base = load_base(recipe.model) if base is None else base
    sizes = sizes_of(base)
    backbone = new_backbone(base, recipe.lora, recipe.ppo, rewards=("reward",))
    head: Any = backbone.heads["reward"]
    head.reset_parameters()
    if valued := recipe.ppo.has_value:
        backbone.heads["value"].load_state_dict(head.state_dict())
    warning = backbone.check_architecture()
    if warning:
        raise RuntimeError(warning)

    def score(responses: Responses) -> Tensor:
        with backbone.folded("reward"):
            scores_B: Tensor = backbone("reward", responses.ids_BT, responses.mask_BT, responses.hidden_BTD)
        return scores_B

    trainer = PpoTrainer(
        backbone=backbone,
        dialogue=dialogue,
        prompts=prompts,
        reward_fn=score,
        section=recipe.ppo,
        folder=scratch,
        seed=recipe.seed,
    )
    clock, log = Clock(), Metrics.log

    def log_and_cut(metrics: Metrics, step: int, values: dict[str, float]) -> None:
        log(metrics, step, values)
        phases = {name: values[f"time/{name}"] for name in PHASES}
        clock.end_step(phases, values["response/length"] * number)

    with patch.object(Metrics, "log", log_and_cut):
        clock.start()
        trainer.train()
    cached = bool(backbone.frozen_layers)
    method = Method(
        task.epochs, recipe.lora.rank, recipe.lora.top_k or sizes.layers, passes=3 + valued, heads=2,
        adapters=2 + valued, cached=cached, value=valued,
    )  # fmt: skip
    tokens = sum(len(row["ids"]) for row in rows)
    return {
        **figures(clock.steps, sizes, method, rows=number, prompt_tokens=tokens),
        "trainable_parameters": sum(p.numel() for p in backbone.parameters() if p.requires_grad),
        "trunk_kept": cached,
    }


def theirs(task: Task, rows: list[dict[str, Any]], scratch: Path) -> Figures:
    """The same with the peer's trainer."""
    check_release()
    from benchmarks.ppo import trl_side

    return {**trl_side.theirs(task, rows, scratch), "trl": PEER[1]}


def measured(side: Callable[[Task, list[Figures], Path], Figures], task: Task) -> Figures:
    """One side in a scratch folder."""
    with tempfile.TemporaryDirectory() as scratch:
        found = side(task, read_json(Path(task.rows))["rows"], Path(scratch))
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    asked = {**asdict(task), "rows": "", "base": ""}
    return {**found, "threads": torch.get_num_threads(), "versions": versions, "task": asked}


KINDS: dict[str, Callable[..., Figures]] = {
    "random": write_random,
    "prepare": lambda **wanted: {"rows": prepare(**wanted)},
    "matmul": lambda **wanted: {"flops_per_s": matmul_peak(**wanted)},
    "ours": lambda **values: measured(ours, Task(**values)),
    "theirs": lambda **values: measured(theirs, Task(**values)),
}

if __name__ == "__main__":
    exit_on_user_error(lambda: serve(KINDS))
