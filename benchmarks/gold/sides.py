"""One child of the gold comparison: train theirs, or judge both policies.

``python -m benchmarks.gold.sides theirs|judge TASK RESULT``; both files are JSON.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.harness import Figures, check_release, peak_bytes, serve
from rlhf.errors import exit_on_user_error
from rlhf.recipe.load import Recipe, load
from rlhf.runs.artifacts import read_jsonl
from rlhf.runs.dtype import settled
from rlhf.tokenization.dialogue import load_dialogue
from rlhf.training.runtime import seed_everything

if TYPE_CHECKING:
    from rlhf.data.comparisons import Prompt


def prompts_of(run: Path, name: str) -> list[Prompt]:
    """Prompts that the comparisons stage has kept."""
    from rlhf.data.comparisons import Message

    rows = read_jsonl(run / "comparisons" / name)
    return [tuple(Message(m["role"], m["content"]) for m in row["messages"]) for row in rows]


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
    check_release()
    from peft import PeftModel, inject_adapter_in_model
    from trl.experimental.ppo import ppo_trainer

    from benchmarks.ppo.trl_side import Watch, classifier_of, policy_of, train
    from reward.model.ensemble import member_folders
    from reward.model.model import load_config
    from rlhf.models.lora import lora_config

    dialogue = load_dialogue(recipe)
    seed_everything(recipe.seed)
    path, folder = recipe.model.path, member_folders(run / "reward")[0]
    offset = load_config(folder).offset

    def scorer() -> Any:
        trained = PeftModel.from_pretrained(classifier_of(path, dialogue), str(folder))
        return trained.merge_and_unload().requires_grad_(False)

    policy, value, reward = policy_of(path, dialogue), scorer(), scorer()
    lora = lora_config(recipe.lora, policy)
    inject_adapter_in_model(lora_config(recipe.lora, policy, "SEQ_CLS"), value)
    value.score.requires_grad_(True)
    plain = ppo_trainer.get_reward

    def get_reward(model: Any, ids: Tensor, pad_id: int, start: int) -> tuple[Tensor, Tensor, Tensor]:
        if model is not reward:
            return plain(model, ids, pad_id, start)
        whole = closed(ids, start, dialogue.end_id, dialogue.pad_id)
        logits, score, last = plain(model, whole, pad_id, start)
        return logits, score + offset, last

    rows = [dialogue.encode_prompt(prompt) for prompt in prompts_of(run, "prompts.jsonl")]
    watch = Watch(dialogue.end_id)
    start = time.perf_counter()
    learners = train(
        recipe,
        dialogue,
        rows,
        (policy, value, reward),
        lora,
        watch,
        at_once=recipe.ppo.batch_size,  # a minibatch is one optimizer step, as with ours
        scratch=adapter.parent / "trainer",
        get_reward=get_reward,
    )
    seconds = time.perf_counter() - start
    learners.policy.save_pretrained(str(adapter))
    return {"seconds": seconds, "step_s": [s.seconds for s in watch.clock.steps], "peak_bytes": peak_bytes()}


def judge_both(recipe: Recipe, run: Path, adapter: Path) -> Figures:
    """Both policies answer the held-out prompts with the same random numbers; paired figures."""
    from policy.evaluate.before_after import per_prompt, reward_fn_of, sample_and_score
    from rlhf.collect.judges import judge_of
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
            {"gold": reward_fn_of(judge_of(section.judge, recipe, "evaluate.judge"))},
            seed=recipe.seed,
            temperature=section.temperature,
            batch_size=section.batch_size,
        )
        for role in (REFERENCE, "theirs", "policy")
    }

    def each(role: str, name: str) -> Any:
        side = sides[role]
        values: Sequence[float] = side.scores["gold"] if name == "gold" else getattr(side, name)
        return per_prompt(values, section.samples_per_prompt)

    return {
        "reference": {name: float(each(REFERENCE, name).mean()) for name in ("gold", "length")},
        "gold": paired_difference(each("theirs", "gold"), each("policy", "gold")),
        "response_length": paired_difference(each("theirs", "length"), each("policy", "length")),
        "kl": {"theirs": float(each("theirs", "kl").mean()), "ours": float(each("policy", "kl").mean())},
        "scores": {role: each(role, "gold").tolist() for role in sides},
    }


def _with_recipe(work: Callable[[Recipe, Path, Path], Figures]) -> Callable[..., Figures]:
    return lambda recipe, overrides, run, adapter: work(
        settled(load(recipe, overrides), Path(run), measured=False), Path(run), Path(adapter)
    )


if __name__ == "__main__":
    exit_on_user_error(
        lambda: serve({"theirs": _with_recipe(train_theirs), "judge": _with_recipe(judge_both)})
    )
