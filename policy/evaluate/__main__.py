"""The `evaluate` stage: held-out prompts, before against after, paired.

``python -m policy.evaluate RECIPE [section.key=value ...]`` writes ``runs/<name>/evaluate/summary.json``,
``summary.md`` and ``responses.jsonl``, and prints the table; with ``evaluate.policy=dpo`` below
``evaluate_dpo``.
"""

from __future__ import annotations

from pathlib import Path

from policy.evaluate.report import as_markdown
from rlhf.errors import exit_on_user_error
from rlhf.recipe.load import from_command_line
from rlhf.runs.artifacts import print_page, write_atomically, write_json
from rlhf.runs.initial_adapter import adapter_files, check_same_start, start_files, start_parents
from rlhf.runs.stage import RUNS, open_stage


def main() -> None:
    """The `evaluate` target; a finished stage prints its table again."""
    recipe = from_command_line()
    section, trained = recipe.evaluate, recipe.evaluate.stage
    own = section.policy == trained
    parents = ("comparisons", *((trained,) if own else ()), *start_parents(recipe, trained))
    judges = recipe.ppo.reward_model or [str(RUNS / recipe.name / "reward")]
    reads = [*judges, *start_files(recipe, trained), *filter(None, [section.reward_model])]
    inputs = [] if own else adapter_files(Path(section.policy), recipe, "evaluate.policy")
    run = open_stage(recipe, section.folder, section="evaluate", parents=parents, inputs=inputs, reads=reads)
    if run is not None:
        if own:
            check_same_start(run.recipe, run, trained)
        from policy.evaluate.run import evaluate

        summary = evaluate(run.recipe, run)
        write_json(run.folder / "summary.json", summary)
        write_atomically(run.folder / "summary.md", as_markdown(summary))
        run.finish({"summary": "summary.json"})
    print_page(RUNS / recipe.name / section.folder / "summary.md")


if __name__ == "__main__":
    exit_on_user_error(main)
