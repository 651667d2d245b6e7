"""A short PPO of a rung against a programmatic score, with plain text mixed in or without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from policy.ppo.rollout import Responses
from policy.ppo.trainer import PpoTrainer
from rlhf.collect.judges import JUDGES
from rlhf.data.comparisons import Message, Prompt
from rlhf.models.backbone import Backbone
from rlhf.recipe.schema import Ppo
from rlhf.runs.artifacts import write_jsonl
from rlhf.tokenization.dialogue import Dialogue
from rlhf.tokenization.special_tokens import special_start
from rlhf.training.metrics import read_metrics
from studies.engine.units import Settings
from studies.scaling.adapters import quiet_folder
from studies.scaling.data.texts import Library

JUDGE = "vader"
PROMPT_TOKENS = 128  # longest opening that PPO continues


def score(responses: Responses) -> Tensor:
    """The programmatic reward: VADER's compound sentiment of every response, -1 to 1."""
    return torch.tensor(JUDGES[JUDGE](responses.prompts, responses.texts))


def reinforce(
    backbone: Backbone, tokenizer: PreTrainedTokenizerBase, library: Library, s: Settings, folder: Path
) -> dict[str, float]:
    """A short PPO on openings of stories; with ``ptx_coef`` plain text is mixed in (Ouyang 2022, eq. 2).

    folder: for what the loop writes; it is removed at the end. Returns score, KL, length and entropy of the
    first and the last tenth of the steps.
    """
    prompts: list[Prompt] = [
        (Message("user", text),) for text in library.openings(s["prompts"], training=True)
    ]
    dialogue = Dialogue(
        tokenizer,
        template="plain",
        max_prompt_tokens=PROMPT_TOKENS,
        max_response_tokens=s["response_tokens"],
        truncate_prompts=True,
    )
    section = Ppo(
        steps=s["steps"],
        batch_size=s["responses"],
        micro_batch_size=s["responses"],
        rollout_batch_size=s["responses"],
        epochs=s["epochs"],
        learning_rate=s["learning_rate"],
        kl_coef=s["kl_coef"],
        missing_eos="ignore",
        checkpoint_every=10**6,
    )
    with quiet_folder(folder):
        if s["ptx_coef"]:
            start = tokenizer.bos_token if special_start(tokenizer) else ""
            texts = [{"text": f"{start}{t}"} for t in library.training(s["prompts"], s["words"])]
            write_jsonl(folder / "texts.jsonl", texts)
            mixed = {"ptx_coef": s["ptx_coef"], "ptx_texts": [str(folder / "texts.jsonl")]}
            section = section.model_copy(update=mixed | {"ptx_max_tokens": 2 * s["words"]})
        trainer = PpoTrainer(
            backbone=backbone,
            dialogue=dialogue,
            prompts=prompts,
            reward_fn=score,
            section=section,
            folder=folder,
            seed=s["seed"],
        )
        trainer.train()
        log = read_metrics(folder)
    few = max(1, len(log) // 10)
    found: dict[str, float] = {
        "steps": float(trainer.done),
        "nonfinite_updates": float(trainer.nonfinite.count),
    }
    for name in ("objective/score", "objective/kl", "response/length", "policy/entropy"):
        for when, rows in (("first", log[:few]), ("last", log[-few:])):
            found[f"{name.partition('/')[2]}_{when}"] = float(np.mean([row[name] for row in rows]))
    return found
