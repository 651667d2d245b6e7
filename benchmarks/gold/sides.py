"""One child of the gold comparison: train one side, or judge policies.

``python -m benchmarks.gold.sides ours|theirs|rloo|grpo|judge TASK RESULT``; both files are JSON. ``theirs``
is ``PPOTrainer``, whose release comes first on its own process's path.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.gold.marks import Marks
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


def train_ours(recipe: Recipe, run: Path, folder: Path, every: int) -> Figures:
    """Run our trainer against the run's reward model; its adapters at the marks go to a folder."""
    from policy.ppo.run import build_trainer
    from rlhf.runs.folder import StageFolder

    ppo = recipe.ppo.model_copy(update={"checkpoint_every": recipe.ppo.steps})
    recipe = recipe.model_copy(update={"ppo": ppo})  # nobody writes checkpoints in the time
    place = run / "gold_ppo"  # beside the stages that it reads
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    trainer = build_trainer(recipe, StageFolder("ppo", place))
    marks, plain = Marks(folder, every, ppo.steps), trainer.reward_metrics

    def mark() -> dict[str, float]:
        marks.end_step(lambda folder: trainer.backbone.save_adapter("policy", folder))
        return plain()

    trainer.reward_metrics = mark  # called once a step, behind its update
    marks.start()
    trainer.train()
    shutil.rmtree(place)
    return {"marks": marks.done(), "peak_bytes": peak_bytes()}


def in_single(head: Any) -> None:
    """Let a scalar head compute in float32 whatever the type of the states it gets."""
    head.float().register_forward_pre_hook(lambda _, states: (states[0].float(), *states[1:]))


def train_theirs(recipe: Recipe, run: Path, folder: Path, every: int) -> Figures:
    """Run ``PPOTrainer`` of trl 1.12 with the recipe's numbers; its adapters at the marks go to a folder."""
    check_release()
    from peft import PeftModel, inject_adapter_in_model
    from trl.experimental.ppo import ppo_trainer

    from benchmarks.ppo.trl_side import Watch, classifier_of, policy_of, train
    from reward.model.ensemble import member_folders
    from reward.model.model import load_config
    from rlhf.models.lora import lora_config

    class Marking(Watch):
        """Its clock of phases, and the marks."""

        def on_train_begin(self, *rest: Any, **options: Any) -> None:
            super().on_train_begin(*rest, **options)
            marks.start()

        def on_step_end(self, *rest: Any, **options: Any) -> None:
            super().on_step_end(*rest, **options)
            marks.end_step(lambda folder: options["model"].policy.save_pretrained(str(folder)))
            self.clock.start()

    dialogue, dtype = load_dialogue(recipe), recipe.model.dtype
    seed_everything(recipe.seed)
    path, saved = recipe.model.path, member_folders(run / "reward")[0]
    offset, marks = load_config(saved).offset, Marks(folder, every, recipe.ppo.steps)

    def scorer(*, merged: bool) -> Any:
        trained: Any = PeftModel.from_pretrained(classifier_of(path, dialogue, dtype), str(saved))
        model = trained.merge_and_unload() if merged else trained.base_model.model
        in_single(model.score)
        return model.requires_grad_(False)

    policy, value = policy_of(path, dialogue, dtype), scorer(merged=True)
    reward = scorer(merged=dtype == "float32")  # merging would round the adapter to the base's type
    lora = lora_config(recipe.lora, policy)
    inject_adapter_in_model(lora_config(recipe.lora, policy, "SEQ_CLS"), value)
    value.score.requires_grad_(True)
    for weights in value.parameters():
        if weights.requires_grad:
            weights.data = weights.data.float()
    plain = ppo_trainer.get_reward

    def get_reward(model: Any, ids: Tensor, pad_id: int, start: int) -> tuple[Tensor, Tensor, Tensor]:
        if model is not reward:
            return plain(model, ids, pad_id, start)
        whole = closed(ids, start, dialogue.end_id, dialogue.pad_id)
        logits, score, last = plain(model, whole, pad_id, start)
        return logits, score + offset, last

    rows = [dialogue.encode_prompt(prompt) for prompt in prompts_of(run, "prompts.jsonl")]
    train(
        recipe,
        dialogue,
        rows,
        (policy, value, reward),
        lora,
        Marking(dialogue.end_id),
        at_once=recipe.ppo.batch_size,  # a minibatch is one optimizer step, as with ours
        scratch=folder / "trainer",
        get_reward=get_reward,
    )
    return {"marks": marks.done(), "peak_bytes": peak_bytes()}


def judge(recipe: Recipe, run: Path, adapters: Mapping[str, str | None]) -> Figures:
    """Policies answer the held-out prompts with the same random numbers.

    Args:
        recipe: its ``evaluate`` section says how.
        run: folder of the run.
        adapters: folder of every policy by its name; None = the reference.

    Returns:
        By name {``gold``, ``kl``, ``length``}: one number a prompt each, the mean of its samples; ``kl`` is
        from the reference, k1 summed over a response, nats.
    """
    from policy.evaluate.before_after import per_prompt, reward_fn_of, sample_and_score
    from rlhf.collect.judges import judge_of
    from rlhf.models.backbone import REFERENCE, Backbone
    from rlhf.models.base import load_base

    section, dialogue = recipe.evaluate, load_dialogue(recipe)
    backbone = Backbone(load_base(recipe.model), recipe.lora, adapters=("policy",))
    gold = {"gold": reward_fn_of(judge_of(section.judge, recipe, "evaluate.judge"))}
    prompts = prompts_of(run, "held_out_prompts.jsonl")[: section.prompts]
    rows = [prompt for prompt in prompts for _ in range(section.samples_per_prompt)]
    found = {}
    for name, folder in adapters.items():
        if folder is not None:
            backbone.load_adapter("policy", Path(folder))
        side = sample_and_score(
            backbone,
            REFERENCE if folder is None else "policy",
            dialogue,
            rows,
            gold,
            seed=recipe.seed,
            temperature=section.temperature,
            batch_size=section.batch_size,
        )
        values = {"gold": side.scores["gold"], "kl": side.kl, "length": side.length}
        found[name] = {k: per_prompt(v, section.samples_per_prompt).tolist() for k, v in values.items()}
    return found


def train_now(recipe: Recipe, run: Path, folder: Path, every: int, side: str) -> Figures:
    """One of the installed trl's trainers, which is loaded in its own process alone."""
    from benchmarks.gold import trl_now

    return trl_now.train(recipe, run, folder, every, side)


def _training(work: Callable[..., Figures], *more: str) -> Callable[..., Figures]:
    def run_it(recipe: str, overrides: list[str], run: str, folder: str, every: int) -> Figures:
        made = settled(load(recipe, overrides), Path(run), measured=False)
        return work(made, Path(run), Path(folder), every, *more)

    return run_it


def _judging(recipe: str, overrides: list[str], run: str, adapters: dict[str, str | None]) -> Figures:
    return judge(settled(load(recipe, overrides), Path(run), measured=False), Path(run), adapters)


if __name__ == "__main__":
    kinds = {
        "ours": _training(train_ours),
        "theirs": _training(train_theirs),
        "rloo": _training(train_now, "rloo"),
        "grpo": _training(train_now, "grpo"),
        "judge": _judging,
    }
    exit_on_user_error(lambda: serve(kinds))
