"""The `evaluate` stage: held-out prompts, before against after, paired.

``python -m policy.evaluate RECIPE [section.key=value ...]`` writes ``runs/<name>/evaluate/summary.json``,
``summary.md`` and ``responses.jsonl``, and prints the table.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policy.evaluate.report import as_markdown
from rlhf.errors import UserError, exit_on_user_error
from rlhf.recipe.load import Recipe, from_command_line
from rlhf.runs.artifacts import read_json, write_atomically, write_json
from rlhf.runs.initial_adapter import check_same_start, start_folder, start_parents
from rlhf.runs.stage import StageRun, open_stage
from rlhf.training.progress import progress

if TYPE_CHECKING:
    from policy.evaluate.before_after import ScoreFn, Side
    from rlhf.data.comparisons import Prompt
    from rlhf.models.backbone import Backbone
    from rlhf.tokenization.dialogue import Dialogue

STAGES = ("comparisons", "sft", "distill", "pmp", "reward", "ppo")


def evaluate(recipe: Recipe, run: StageRun) -> dict[str, Any]:
    """Do the stage's work; returns the summary."""
    from policy.evaluate.before_after import compare, sample_pairs, say
    from policy.ppo.setup import reward_adapters, reward_folders
    from rlhf.data.stored import stored_prompts
    from rlhf.models.backbone import REFERENCE, Backbone
    from rlhf.models.base import best_device, load_base
    from rlhf.tokenization.dialogue import load_dialogue

    section = recipe.evaluate
    dialogue = load_dialogue(recipe)
    rewards = () if recipe.ppo.retokenize else reward_adapters(len(reward_folders(recipe, run)))
    start = start_folder(recipe, run, "ppo")
    adapters = ("policy", *rewards, *((REFERENCE,) if start else ()))
    backbone = Backbone(load_base(recipe.model), recipe.lora, adapters=adapters, heads=rewards)
    backbone.load_adapter("policy", run.parent("ppo") / "policy")
    if start:
        backbone.load_adapter(REFERENCE, start)
    judges = _judges(recipe, run, backbone, dialogue)
    backbone.check_architecture()
    backbone.to(best_device())
    prompts = stored_prompts(run, "held_out_prompts.jsonl")[: section.prompts]
    if len(prompts) < section.prompts:
        print(f"evaluate: {len(prompts)} held-out prompts, fewer than the {section.prompts} asked for")
    rows = [prompt for prompt in prompts for _ in range(section.samples_per_prompt)]
    with progress("evaluate", total=2 * len(rows), leave=True) as bar:
        before, after = (
            say(
                backbone,
                role,
                dialogue,
                rows,
                judges,
                seed=recipe.seed,
                temperature=section.temperature,
                batch_size=section.batch_size,
                progress=bar.update,
            )
            for role in (REFERENCE, "policy")
        )
    best_of = _best_of_n(recipe, backbone, dialogue, prompts, judges, before, after)
    summary: dict[str, Any] = {
        "name": recipe.name,
        "seed": recipe.seed,
        "model": recipe.model.path,
        "judged_by": section.judge,
        **compare(before, after, samples=section.samples_per_prompt),
        **best_of,
        "reward_model": _reward_figures(run),
        "samples": sample_pairs(rows, before, after, section.pairs_shown),
        "stages": _stage_costs(run),
    }
    lines = [
        {"prompt": p[-1].content, "before": b, "after": a}
        for p, b, a in zip(rows, before.texts, after.texts, strict=True)
    ]
    write_atomically(
        run.folder / "responses.jsonl", "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines)
    )
    return summary


def _best_of_n(
    recipe: Recipe,
    backbone: Backbone,
    dialogue: Dialogue,
    prompts: Sequence[Prompt],
    judges: dict[str, ScoreFn],
    before: Side,
    after: Side,
) -> dict[str, Any]:
    """Best of n from the reference beside the policy on the same prompts; empty where the recipe has none."""
    from policy.evaluate.before_after import per_prompt
    from policy.evaluate.best_of_n import best_of_figures, draw

    section = recipe.evaluate
    if not section.best_of:
        return {}
    prompts = prompts[: section.best_of_prompts]
    with progress("best of n", total=len(prompts) * section.best_of, leave=True) as bar:
        scores = draw(
            backbone,
            dialogue,
            prompts,
            judges,
            samples=section.best_of,
            seed=recipe.seed,
            temperature=section.temperature,
            batch_size=section.batch_size,
            progress=bar.update,
        )
    first = slice(len(prompts))
    said_before, said_after = (
        {name: per_prompt(values, section.samples_per_prompt)[first] for name, values in side.scores.items()}
        for side in (before, after)
    )
    kl_P = per_prompt(after.kl, section.samples_per_prompt)[first]
    judge = next(iter(judges))
    figures = best_of_figures(scores, said_before, said_after, kl_P, proxy="reward", judge=judge)
    return {"best_of_n": figures}


def _judges(recipe: Recipe, run: StageRun, backbone: Backbone, dialogue: Dialogue) -> dict[str, ScoreFn]:
    """Who scores, the one that decides first: ``gold`` where the recipe has a gold judge, ``judge`` a reward
    model of the recipe's choice, and ``reward`` the score that PPO was trained on (all its reward models,
    combined)."""
    from policy.evaluate.before_after import tensor_judge, text_judge
    from policy.ppo.setup import check_rewards, load_scorer, reward_adapters, reward_folders, score_function
    from reward.model.model import TextRewardModel
    from rlhf.collect.judges import JUDGES
    from rlhf.models.base import best_device

    judges: dict[str, ScoreFn] = {}
    if recipe.evaluate.judge != "reward":
        judges["gold"] = text_judge(JUDGES[recipe.evaluate.judge])
    elif recipe.evaluate.reward_model:
        other = TextRewardModel(Path(recipe.evaluate.reward_model), best_device())
        judges["judge"] = tensor_judge(lambda said: other.score(said.prompts, said.texts))
    if not recipe.ppo.retokenize:
        folders = reward_folders(recipe, run)
        check_rewards(recipe, dialogue, folders)
        for adapter, folder in zip(reward_adapters(len(folders)), folders, strict=True):
            load_scorer(backbone, adapter, folder)
    judges["reward"] = tensor_judge(score_function(recipe, run, backbone, dialogue))
    return judges


def _reward_figures(run: StageRun) -> dict[str, Any]:
    """What the reward stage and the comparisons stage found out about the reward model."""
    figures: dict[str, Any] = {}
    for stage, names in (
        ("reward", ("held_out_accuracy", "train_accuracy", "probe_accuracy")),
        ("comparisons", ("noise_ceiling", "train", "held_out")),
    ):
        manifest = run.parent(stage) / "manifest.json"
        if manifest.is_file():
            results = read_json(manifest)["results"]
            figures |= {name: results[name] for name in names if name in results}
    return figures


def _stage_costs(run: StageRun) -> dict[str, dict[str, float]]:
    """Seconds and peak memory of every stage of the run, this one included."""
    costs = {}
    for stage in STAGES:
        manifest = run.parent(stage) / "manifest.json"
        if manifest.is_file():
            noted = read_json(manifest)
            costs[stage] = {"seconds": noted["seconds"], "peak_bytes": noted["peak_bytes"]}
    costs["evaluate"] = run.clock()
    return costs


def main() -> None:
    """The `evaluate` target; a finished stage prints its table again."""
    recipe = from_command_line()
    parents = ("comparisons", "ppo", *start_parents(recipe, "ppo"))
    run = open_stage(recipe, "evaluate", section="evaluate", parents=parents)
    if run is not None:
        check_same_start(recipe, run, "ppo")
        summary = evaluate(recipe, run)
        write_json(run.folder / "summary.json", summary)
        write_atomically(run.folder / "summary.md", as_markdown(summary))
        run.finish({"summary": "summary.json"})
    from rlhf.runs.stage import RUNS

    file = RUNS / recipe.name / "evaluate" / "summary.md"
    if not file.is_file():
        raise UserError(f"{file} is missing; remove {file.parent} and run `make evaluate` again")
    print(file.read_text(encoding="utf-8"), flush=True)


if __name__ == "__main__":
    exit_on_user_error(main)
