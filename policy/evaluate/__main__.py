"""The `evaluate` stage: held-out prompts, before against after, paired.

``python -m policy.evaluate RECIPE [section.key=value ...]`` writes ``runs/<name>/evaluate/summary.json``,
``summary.md`` and ``responses.jsonl``, and prints the table; with ``evaluate.policy=dpo`` below
``evaluate_dpo``.
"""

from __future__ import annotations

from pathlib import Path

from policy.evaluate.report import as_markdown
from rlhf.collect.judges import check_judge
from rlhf.errors import exit_on_user_error
from rlhf.recipe.load import from_command_line
from rlhf.recipe.types import function_files
from rlhf.runs.artifacts import print_page, write_atomically, write_json
from rlhf.runs.initial_adapter import adapter_files, check_same_start, start_files, start_parents
from rlhf.runs.stage import RUNS, open_stage


def main() -> None:
    """The `evaluate` target; a finished stage prints its table again."""
    recipe = from_command_line()
    section, trained = recipe.evaluate, recipe.evaluate.stage
    own = section.policy == trained
    parents = ("comparisons", *((trained,) if own else ()), *start_parents(recipe, trained))
    stage = [str(RUNS / recipe.name / "reward")] if recipe.ppo.own_reward else []
    judges = [*recipe.ppo.named_models, *filter(None, [recipe.ppo.test_reward_model]), *stage]
    reads = [*judges, *start_files(recipe, trained), *filter(None, [section.reward_model])]
    inputs = [] if own else adapter_files(Path(section.policy), recipe, "evaluate.policy")
    inputs += [*function_files(section.judge), *recipe.ppo.function_files]
    run = open_stage(recipe, section.folder, section="evaluate", parents=parents, inputs=inputs, reads=reads)
    if run is not None:
        if own:
            check_same_start(run.recipe, run, trained)
        if section.judge != "reward":
            check_judge(section.judge, recipe, "evaluate.judge")
        from policy.evaluate.run import evaluate

        summary = evaluate(run.recipe, run)
        write_json(run.folder / "summary.json", summary)
        write_atomically(run.folder / "summary.md", as_markdown(summary))
        run.finish({"summary": "summary.json"})
    print_page(RUNS / recipe.name / section.folder / "summary.md")


if __name__ == "__main__":
    exit_on_user_error(main)
