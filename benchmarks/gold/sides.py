"""One child of the gold comparison: train theirs, or judge both policies.

``python -m benchmarks.gold.sides theirs|judge TASK RESULT``; both files are JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.harness import Figures, peak_bytes
from rlhf.errors import exit_on_user_error
from rlhf.recipe.load import Recipe, load
from rlhf.runs.artifacts import write_json
from rlhf.tokenization.dialogue import load_dialogue
from rlhf.training.runtime import seed_everything

if TYPE_CHECKING:
    from rlhf.data.comparisons import Prompt


def prompts_of(run: Path, name: str) -> list[Prompt]:
    """Prompts that the comparisons stage has kept."""
    from rlhf.data.comparisons import Message

    lines = (run / "comparisons" / name).read_text(encoding="utf-8").splitlines()
    return [tuple(Message(m["role"], m["content"]) for m in json.loads(line)["messages"]) for line in lines]


def closed(ids_BT: Tensor, start: int, eos_id: int, pad_id: int) -> Tensor:
    """The responses with one more column: EOS behind those that have none, padding elsewhere, [B, T + 1].

    Args:
        ids_BT: prompts, responses from column ``start``, padding behind EOS.
        start: first response column.
        eos_id: closes a response.
        pad_id: stands behind EOS.
    """
    ended_B = (ids_BT[:, start:] == eos_id).any(-1)
    last_B = torch.where(ended_B, pad_id, eos_id)
    return torch.cat([ids_BT, last_B[:, None]], dim=1)


def train_theirs(recipe: Recipe, run: Path, adapter: Path) -> Figures:
    """Run trl's trainer with the recipe's numbers; its adapter goes to a folder."""
    from peft import LoraConfig, PeftModel, inject_adapter_in_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl.experimental.ppo import ppo_trainer

    from benchmarks.ppo.trl_side import Watch, check_release, train
    from reward.model.ensemble import member_folders
    from reward.model.model import load_config
    from rlhf.models.lora import lora_config

    check_release()
    dialogue = load_dialogue(recipe)
    dialogue.tokenizer.padding_side = "left"
    seed_everything(recipe.seed)
    ppo, path = recipe.ppo, recipe.model.path
    folder = member_folders(run / "reward")[0]
    config = load_config(folder)

    def scorer() -> Any:
        base = AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=1, dtype=torch.float32, pad_token_id=dialogue.pad_id
        )
        return PeftModel.from_pretrained(base, str(folder)).merge_and_unload().requires_grad_(False)

    policy = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    policy.generation_config.pad_token_id = dialogue.pad_id
    lora: LoraConfig = lora_config(recipe.lora, policy)
    value, reward = scorer(), scorer()
    inject_adapter_in_model(lora_config(recipe.lora, policy, "SEQ_CLS"), value)
    value.score.requires_grad_(True)
    plain = ppo_trainer.get_reward

    def get_reward(model: Any, ids: Tensor, pad_id: int, start: int) -> tuple[Tensor, Tensor, Tensor]:
        if model is not reward:
            return plain(model, ids, pad_id, start)
        logits, score, last = plain(
            model, closed(ids, start, dialogue.eos_id, dialogue.pad_id), pad_id, start
        )
        return logits, score + config.offset, last

    settings = {
        "output_dir": str(adapter.parent / "trainer"),
        "per_device_train_batch_size": ppo.batch_size,  # a minibatch is one optimiser step, as with ours
        "gradient_accumulation_steps": 1,
        "local_rollout_forward_batch_size": ppo.batch_size,
        "num_mini_batches": ppo.minibatches,
        "num_ppo_epochs": ppo.epochs,
        "total_episodes": ppo.batch_size * ppo.steps,
        "response_length": recipe.dialogue.max_response_tokens,
        "temperature": ppo.temperature,
        "missing_eos_penalty": None,
        "kl_coef": ppo.kl_coef,
        "kl_estimator": ppo.kl_estimator,
        "cliprange": ppo.clip_range,
        "cliprange_value": ppo.value_clip_range,
        "vf_coef": ppo.value_coef,
        "gamma": ppo.gamma,
        "lam": ppo.lam,
        "whiten_rewards": ppo.whiten_rewards,
        "learning_rate": ppo.learning_rate,
        "lr_scheduler_type": ppo.schedule,
        "adam_epsilon": ppo.adam_epsilon,
        "seed": recipe.seed,
    }
    rows = [dialogue.encode_prompt(prompt) for prompt in prompts_of(run, "prompts.jsonl")]
    watch = Watch(dialogue.eos_id)
    start = time.perf_counter()
    learners = train(settings, rows, (policy, value, reward), dialogue.tokenizer, lora, watch, get_reward)
    seconds = time.perf_counter() - start
    learners.policy.save_pretrained(str(adapter))
    return {"seconds": seconds, "step_s": [s.seconds for s in watch.clock.steps], "peak_bytes": peak_bytes()}


def judge_both(recipe: Recipe, run: Path, adapter: Path) -> Figures:
    """Both policies answer the held-out prompts with the same random numbers; paired figures."""
    from policy.evaluate.before_after import per_prompt, reward_fn_of, sample_and_score
    from rlhf.collect.judges import JUDGES
    from rlhf.models.backbone import REFERENCE, Backbone
    from rlhf.models.base import load_base
    from rlhf.stats.intervals import paired_difference

    section, dialogue = recipe.evaluate, load_dialogue(recipe)
    backbone = Backbone(load_base(recipe.model), recipe.lora, adapters=("policy", "theirs"))
    backbone.load_adapter("policy", run / "ppo" / "policy")
    backbone.load_adapter("theirs", adapter)
    prompts = prompts_of(run, "held_out_prompts.jsonl")[: section.prompts]
    rows = [prompt for prompt in prompts for _ in range(section.samples_per_prompt)]
    sides = {
        role: sample_and_score(
            backbone,
            role,
            dialogue,
            rows,
            {"gold": reward_fn_of(JUDGES[section.judge])},
            seed=recipe.seed,
            temperature=section.temperature,
            batch_size=section.batch_size,
        )
        for role in (REFERENCE, "theirs", "policy")
    }
    reference, theirs, ours = sides.values()

    def mean(values: Any) -> float:
        return float(per_prompt(values, section.samples_per_prompt).mean())

    def paired(theirs: Any, ours: Any) -> Figures:
        return paired_difference(
            per_prompt(theirs, section.samples_per_prompt), per_prompt(ours, section.samples_per_prompt)
        )

    return {
        "reference": {"gold": mean(reference.scores["gold"]), "length": mean(reference.length)},
        "gold": paired(theirs.scores["gold"], ours.scores["gold"]),
        "response_length": paired(theirs.length, ours.length),
        "kl": {"theirs": mean(theirs.kl), "ours": mean(ours.kl)},
        "scores": {name: per_prompt(side.scores["gold"], section.samples_per_prompt).tolist()
                   for name, side in sides.items()},
    }  # fmt: skip


def main() -> None:
    """The child."""
    kind, task = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    work = {"theirs": train_theirs, "judge": judge_both}[kind]
    recipe = load(task["recipe"], task["overrides"])
    write_json(Path(sys.argv[3]), work(recipe, Path(task["run"]), Path(task["adapter"])))


if __name__ == "__main__":
    exit_on_user_error(main)
