"""A policy against a reward model, every step of it kept; and best of n of the rung alone."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policy.dpo.data import encode
from policy.dpo.trainer import new_trainer
from policy.evaluate.before_after import sample_and_score
from policy.evaluate.best_of_n import best_of_n, draw, kl_bound, powers_of_two
from policy.ppo.rollout import Responses, RewardFn
from policy.ppo.setup import new_backbone
from policy.ppo.trainer import PpoTrainer
from rlhf.evals.model import LanguageModel
from rlhf.evals.tasks import lm_loss
from rlhf.models.backbone import REFERENCE, Backbone
from rlhf.recipe.schema import Lora, Ppo
from rlhf.training.hf_trainer import ADAPTER, adapted_base
from rlhf.training.metrics import read_metrics
from studies.engine.units import Unit, read_result
from studies.ppo.models import (
    AT_ONCE,
    as_folder,
    comparisons,
    dialogue_of,
    gold,
    held_out_texts,
    load_reward,
    load_rung,
    prompts_of,
    recipe_of,
    reward_folder,
)
from studies.scaling.adapters import quiet_folder

KEPT = {  # of every step: the name here, and in the log
    "proxy": "objective/score",
    "gold": "study/gold",
    "test": "study/test",
    "kl": "objective/kl",
    "kl_k3": "objective/kl_k3",
    "entropy": "policy/entropy",
    "length": "response/length",
    "eos": "response/eos_rate",
    "distinct_2": "response/distinct_2",
    "explained_variance": "value/explained_variance",
}
_DIGITS = 5


class Watched:
    """The proxy as PPO's reward, which notes what others think of the same responses."""

    whole_rollout = True

    def __init__(self, proxy: RewardFn, others: dict[str, RewardFn]) -> None:
        self.proxy, self.others = proxy, others
        self.means: dict[str, float] = {}

    def __call__(self, responses: Responses) -> Tensor:
        """The proxy's scores, [B]."""
        if responses.logged:
            self.means = {f"study/{name}": float(f(responses).mean()) for name, f in self.others.items()}
        return self.proxy(responses)


def optimize(unit: Unit, folder: Path) -> dict[str, Any]:
    """Train a policy; every step's figures, and at the end the forward KL and the tax.

    The tax: loss on held-out lessons, which no prompt begins, more than the rung's, nats a byte.
    """
    return (prefer if "dpo" in unit.settings else reinforce)(unit, folder)


def prefer(unit: Unit, folder: Path) -> dict[str, Any]:
    """Train a policy on the comparisons that the proxy has learned from, by DPO; its end as one step."""
    s, (base, source, proxy) = unit.settings, unit.needs
    found = read_result(source, folder)
    assert found is not None, "a unit is done after those it needs"
    scratch = folder / f"scratch-{unit.key}"
    with as_folder(base, folder) as path, quiet_folder(scratch):
        recipe = recipe_of(path, s, rank=s["lora_rank"], dpo=s["dpo"] | {"checkpoint_every": 10**6})
        dialogue = dialogue_of(load_rung(base, folder)[1], s)
        backbone = adapted_base(recipe, "dpo")
        pairs = encode(
            comparisons(found["result"]["pairs"][: proxy.settings["comparisons"]]), dialogue, "all"
        )[0]
        assert recipe.dpo is not None
        trainer = new_trainer(recipe, recipe.dpo, dialogue, backbone, pairs, folder=scratch)
        trainer.refer_to(*trainer.log_probs(pairs))
        start = time.perf_counter()
        trainer.fit()
        seconds = time.perf_counter() - start
    ends = _ends(backbone, dialogue, s, ADAPTER)
    known = {"gold": ends["gold"], "kl": ends["reverse_kl"]}
    steps = {name: [_number(known.get(name))] for name in KEPT}
    return {"steps": steps, "loop_seconds": round(seconds, 2), **ends}


def reinforce(unit: Unit, folder: Path) -> dict[str, Any]:
    """Train a policy against a reward model by the project's own PPO."""
    s, (base, _, proxy, *test) = unit.settings, unit.needs
    model, tokenizer = load_rung(base, folder)
    dialogue = dialogue_of(tokenizer, s)
    section = Ppo(
        steps=s["steps"],
        batch_size=s["responses"],
        micro_batch_size=s["responses"],
        rollout_batch_size=s["responses"],
        checkpoint_every=10**6,
        **s["ppo"],
    )
    torch.manual_seed(s["seed"])
    rank = s["lora_rank"]
    lora = Lora(rank=rank, alpha=2 * rank, layers=s["lora_layers"])
    own = {"value": proxy.settings["rank"] // rank} if s["value_init"] == "reward" else {}
    backbone = new_backbone(model, lora, section, ranks=own)
    if s["value_init"] == "reward":
        backbone.load_adapter("value", reward_folder(proxy, folder))
    others: dict[str, RewardFn] = {"gold": gold}
    if test:
        others["test"] = load_reward(test[0], folder)
    watched = Watched(load_reward(proxy, folder), others)
    scratch = folder / f"scratch-{unit.key}"
    with quiet_folder(scratch):
        trainer = PpoTrainer(
            backbone=backbone,
            dialogue=dialogue,
            prompts=prompts_of(s["seed"], s["prompts"], training=True),
            reward_fn=watched,
            section=section,
            folder=scratch,
            seed=s["seed"],
            reward_metrics=lambda: watched.means,
        )
        trainer.train()
        log = read_metrics(scratch)
    steps = {k: [_number(row.get(name)) for row in log] for k, name in KEPT.items()}
    seconds = sum(row["time/rollout"] + row["time/update"] for row in log)
    return {"steps": steps, "loop_seconds": round(seconds, 2), **_ends(backbone, dialogue, s)}


def _number(value: float | None) -> float | None:
    return round(value, _DIGITS) if value is not None and math.isfinite(value) else None


def _ends(backbone: Backbone, dialogue: Any, s: dict[str, Any], policy: str = "policy") -> dict[str, float]:
    """KL in both directions on held-out prompts, gold there, and the tax."""
    prompts = prompts_of(s["seed"], s["held_out"], training=False)
    kind: Any = {"seed": s["seed"], "temperature": 1.0, "batch_size": AT_ONCE}
    judges: dict[str, RewardFn] = {"gold": gold}
    after = sample_and_score(backbone, policy, dialogue, prompts, judges, **kind)
    before = sample_and_score(backbone, REFERENCE, dialogue, prompts, judges, against=policy, **kind)
    items = [lm_loss.Item(str(n), "", text) for n, text in enumerate(held_out_texts(s["seed"], s["lessons"]))]
    losses = {}
    for role in (REFERENCE, policy):
        backbone.activate(role)
        with backbone.folded(role):
            values = lm_loss.run(
                LanguageModel(backbone.base, dialogue.tokenizer, prefix_ids=[]), items
            ).values
        losses[role] = float(np.mean(values[next(iter(values))]))
    return {
        "gold": float(np.mean(after.scores["gold"])),
        "gold_before": float(np.mean(before.scores["gold"])),
        "reverse_kl": float(np.mean(after.kl)),
        "forward_kl": float(np.mean(before.kl)),
        "tax": losses[policy] - losses[REFERENCE],
    }


def best(unit: Unit, folder: Path) -> dict[str, Any]:
    """Best of n = 1, 2, 4, ... by every reward model, judged by the gold score: N samples a prompt."""
    s, (base, _, *proxies) = unit.settings, unit.needs
    model, tokenizer = load_rung(base, folder)
    backbone = Backbone(model, Lora(rank=1, alpha=1), adapters=["policy"], trainable=[])
    judges: dict[str, RewardFn] = {"gold": gold}
    judges |= {name: load_reward(p, folder) for name, p in zip(s["proxies"], proxies, strict=True)}
    scores, _ = draw(
        backbone,
        dialogue_of(tokenizer, s),
        prompts_of(s["seed"], s["prompts"], training=False),
        judges,
        samples=s["samples"],
        seed=s["seed"],
        temperature=1.0,
        batch_size=AT_ONCE,
    )
    counts = powers_of_two(s["samples"])
    found: dict[str, Any] = {"n": counts, "kl": [kl_bound(n) for n in counts]}
    for name in s["proxies"]:
        by_n = {
            "gold": [float(best_of_n(scores[name], scores["gold"], n).mean()) for n in counts],
            "proxy": [float(best_of_n(scores[name], scores[name], n).mean()) for n in counts],
        }
        found[name] = {k: [round(x, _DIGITS) for x in v] for k, v in by_n.items()}
    return found
