"""The `tax` stage: what alignment cost, several model variants side by side on the same items.

``python -m policy.alignment_tax RECIPE [section.key=value ...]`` writes ``runs/<name>/tax/tax.json``,
``tax.md``, ``tax.png``, ``items.jsonl`` and, where a judge scores responses, ``responses.jsonl``, and prints
the page.
"""

from __future__ import annotations

from policy.alignment_tax.checks import check, inputs_of, parents_of, read_items, reads_of
from policy.alignment_tax.table import same_score_settings
from rlhf.errors import UserError, exit_on_user_error
from rlhf.recipe.load import from_command_line
from rlhf.recipe.tax import DEFAULT_VARIANTS
from rlhf.runs.artifacts import print_page, read_json
from rlhf.runs.initial_adapter import check_same_start
from rlhf.runs.processes import print_once
from rlhf.runs.stage import RUNS, open_stage


def main() -> None:
    """The `tax` target; a finished stage prints its page again."""
    recipe = from_command_line()
    section = recipe.tax
    if section is None:
        print_once("tax: not in this recipe")
        return
    names = check(recipe, section)
    run = open_stage(
        recipe,
        "tax",
        section="tax",
        parents=parents_of(recipe, section, names),
        inputs=inputs_of(recipe, section, names),
        reads=reads_of(recipe, section),
    )
    folder = RUNS / recipe.name / "tax"
    if run is not None:
        if "policy" in names and section.interpolate:
            check_same_start(run.recipe, run, "ppo")
        items = read_items(recipe, section)
        absent = [name for name in DEFAULT_VARIANTS if name not in names] if section.variants is None else []
        print_once(
            f"tax: {len(names)} variants ({', '.join(names)}) against {section.reference}"
            + (f"; not there: {', '.join(absent)}" if absent else "")
        )
        from policy.alignment_tax.run import measure

        run.finish(measure(run.recipe, section, run, items))
    elif section.score and not same_score_settings(read_json(folder / "tax.json")["evaluate"], recipe):
        raise UserError(
            f"{folder} was finished with other settings of the section `evaluate`, which tax.score uses: "
            f'give the new run a name of its own (SET="name=..."), or remove {folder} to make it anew'
        )
    print_page(folder / "tax.md")


if __name__ == "__main__":
    exit_on_user_error(main)
