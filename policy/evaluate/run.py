"""The work of the `evaluate` stage: both models answer the held-out prompts, reward functions score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from policy.evaluate.before_after import (
    EvaluatedResponses,
    compare,
    per_prompt,
    response_rows,
    reward_fn_of,
    sample_and_score,
    spread,
)
from policy.evaluate.best_of_n import best_of_figures, draw
from policy.ppo.reward_shaping import Moments
from policy.ppo.rollout import RewardFn
from policy.ppo.setup import (
    TEST,
    audit_adapters,
    audit_folder,
    audit_function,
    check_rewards,
    load_scorer,
    reads_text,
    reward_adapters,
    reward_folders,
    score_function,
    shapes_of,
)
from policy.rewards.mixture import MOMENTS
from rlhf.collect.judges import judge_name, judge_of
from rlhf.data.comparisons import Prompt
from rlhf.data.stored import held_out_prompts, stored_columns
from rlhf.models.backbone import REFERENCE, Backbone
from rlhf.models.base import best_device, load_base
from rlhf.recipe.load import Recipe
from rlhf.runs.artifacts import MANIFEST, write_jsonl
from rlhf.runs.initial_adapter import start_folder
from rlhf.runs.stage import StageRun
from rlhf.runs.whole import READ as STAGES
from rlhf.runs.whole import manifest_of
from rlhf.tokenization.dialogue import Dialogue, load_dialogue
from rlhf.training.progress import progress
from rlhf.training.shares import join, leave


def evaluate(recipe: Recipe, run: StageRun) -> dict[str, Any]:
    """Do the stage's work, ``responses.jsonl`` included; returns the summary."""
    join(recipe.distributed)
    section = recipe.evaluate
    made = {stage: _manifest(run, stage) for stage in STAGES}
    dialogue = load_dialogue(recipe)
    backbone = _backbone(recipe, run, dialogue)
    reward_fns = _reward_fns(recipe, run, backbone, dialogue, _moments(made))
    backbone.check_architecture()
    backbone.to(best_device())
    prompts = held_out_prompts(run, section.prompts)
    rows = [prompt for prompt in prompts for _ in range(section.samples_per_prompt)]
    options = _sampling(recipe)
    with progress("evaluate", total=2 * len(rows), leave=True) as bar:
        before, after = (
            sample_and_score(
                backbone, role, dialogue, rows, reward_fns, against=other, progress=bar.update, **options
            )
            for role, other in ((REFERENCE, "policy"), ("policy", REFERENCE))
        )
    best_of = _best_of_n(recipe, backbone, dialogue, prompts, reward_fns, before, after)
    leave()
    written = response_rows(rows, before, after)
    write_jsonl(run.folder / "responses.jsonl", written)
    return {
        "name": recipe.name,
        "seed": recipe.seed,
        "model": recipe.model.path,
        "judged_by": judge_name(section.judge),
        **({} if section.policy == "ppo" else {"policy": section.policy}),
        **compare(before, after, samples=section.samples_per_prompt),
        **best_of,
        **(
            {"over_optimization": made["ppo"].get("results", {}).get("audit")}
            if section.policy == "ppo"
            else {}
        ),
        "reward_model": _reward_figures(made),
        "samples": spread(written, section.pairs_shown),
        "stages": _stage_costs(run, made),
    }


def _sampling(recipe: Recipe) -> dict[str, Any]:
    section = recipe.evaluate
    return {"seed": recipe.seed, "temperature": section.temperature, "batch_size": section.batch_size}


def _audit_folder(recipe: Recipe, run: StageRun) -> Path | None:
    """The test model; DPO learns from its comparisons too, so that it is no test there."""
    return None if recipe.evaluate.policy == "dpo" else audit_folder(recipe, run)


def _backbone(recipe: Recipe, run: StageRun, dialogue: Dialogue) -> Backbone:
    """The policy, its reference, and room for the reward models that are adapters of the same base."""
    folders = [] if recipe.ppo.retokenize else reward_folders(recipe, run)
    rewards = reward_adapters(len(folders)) if folders else ()
    section = recipe.evaluate
    start = start_folder(recipe, run, section.stage)
    trained = (
        run.parent(section.stage) / "policy" if section.policy == section.stage else Path(section.policy)
    )
    tests = audit_adapters(recipe, dialogue, _audit_folder(recipe, run))
    heads = (*rewards, *tests)
    adapters = ("policy", *heads, *((REFERENCE,) if start else ()))
    shapes = shapes_of(heads, [*folders, *tests.values()])
    base = load_base(recipe.model)
    backbone = Backbone(base, recipe.lora, adapters=adapters, heads=heads, **shapes)
    backbone.load_adapter("policy", trained)
    if start:
        backbone.load_adapter(REFERENCE, start)
    return backbone


def _moments(made: dict[str, dict[str, Any]]) -> dict[str, Moments]:
    """What PPO's normalized rewards had seen at its end; each is left as it is where PPO has not run."""
    kept = made["ppo"].get("results", {}).get(MOMENTS, {})
    return {name: Moments(*values) for name, values in kept.items()}


def _reward_fns(
    recipe: Recipe,
    run: StageRun,
    backbone: Backbone,
    dialogue: Dialogue,
    moments: dict[str, Moments] = {},  # noqa: B006 - never changed
) -> dict[str, RewardFn]:
    """What scores the responses, the one that decides first: ``gold`` where the recipe has a gold judge,
    ``judge`` a reward model of the recipe's choice, ``test`` the test model, and ``reward`` the score that
    PPO was trained on (all its reward models, combined)."""
    found: dict[str, RewardFn] = {}
    if recipe.evaluate.judge != "reward":
        columns = stored_columns(run) if recipe.data.prompt_columns else None
        found["gold"] = reward_fn_of(judge_of(recipe.evaluate.judge, recipe, "evaluate.judge", columns))
    elif recipe.evaluate.reward_model:
        found["judge"] = reads_text(Path(recipe.evaluate.reward_model), recipe)
    if not recipe.ppo.retokenize:
        folders = reward_folders(recipe, run)
        check_rewards(recipe, dialogue, folders)
        for adapter, folder in zip(reward_adapters(len(folders)), folders, strict=True):
            load_scorer(backbone, adapter, folder)
    if test := _audit_folder(recipe, run):
        if TEST in backbone.heads:
            load_scorer(backbone, TEST, test)
        found["test"] = audit_function(recipe, test, backbone, dialogue)
    found["reward"] = score_function(recipe, run, backbone, dialogue, moments=moments)
    return found


def _best_of_n(
    recipe: Recipe,
    backbone: Backbone,
    dialogue: Dialogue,
    prompts: Sequence[Prompt],
    reward_fns: dict[str, RewardFn],
    before: EvaluatedResponses,
    after: EvaluatedResponses,
) -> dict[str, Any]:
    """Best of n from the reference beside the policy on the same prompts; empty where the recipe has none."""
    section = recipe.evaluate
    if not section.best_of:
        return {}
    prompts = prompts[: section.best_of_prompts]
    with progress("best of n", total=len(prompts) * section.best_of, leave=True) as bar:
        options = {"samples": section.best_of, "progress": bar.update, **_sampling(recipe)}
        scores, lengths_PN = draw(backbone, dialogue, prompts, reward_fns, **options)

    def first(values: Sequence[float]) -> Any:
        return per_prompt(values, section.samples_per_prompt)[: len(prompts)]

    scored_before, scored_after = (
        {name: first(values) for name, values in model.scores.items()} for model in (before, after)
    )
    judge = next(iter(reward_fns))
    figures = best_of_figures(
        scores, scored_before, scored_after, first(after.kl),
        proxy="reward", judge=judge, lengths=(lengths_PN, first(before.length)),
    )  # fmt: skip
    return {"best_of_n": figures}


def _manifest(run: StageRun, stage: str) -> dict[str, Any]:
    """The manifest of another stage of the run; empty where it has not run."""
    folder = run.parent(stage)
    return manifest_of(folder, ["results", "seconds", "peak_bytes"]) if (folder / MANIFEST).exists() else {}


def _reward_figures(made: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the reward stage and the comparisons stage found out about the reward model."""
    figures: dict[str, Any] = {}
    for stage, names in (
        ("reward", ("held_out_accuracy", "train_accuracy", "probe_accuracy")),
        ("comparisons", ("noise_ceiling", "train", "held_out")),
    ):
        results = made[stage].get("results", {})
        figures |= {name: results[name] for name in names if name in results}
    return figures


def _stage_costs(run: StageRun, made: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Seconds and peak memory of every stage of the run, this one included."""
    costs = {
        stage: {name: manifest[name] for name in ("seconds", "peak_bytes")}
        for stage, manifest in made.items()
        if manifest
    }
    return {**costs, "evaluate": run.clock()}
