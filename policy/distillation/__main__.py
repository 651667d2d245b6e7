"""The `distill` stage: the distribution of a model under a prompt, taught to the model without it.

``python -m policy.distillation RECIPE [section.key=value ...]`` writes ``runs/<name>/distill/policy`` (an
adapter) or ``runs/<name>/distill/model`` (all weights, ``distill.method=full``), and the teacher's log-probs
in ``runs/<name>/distill/teacher`` unless ``distill.teacher_cache`` names another folder. A recipe without a
``distill`` section has no such stage (Askell 2021, arXiv 2112.00861).
"""

from __future__ import annotations

from pathlib import Path

from rlhf.errors import UserError, exit_on_user_error
from rlhf.recipe.load import from_command_line
from rlhf.runs.initial_adapter import start_inputs, start_parents
from rlhf.runs.processes import print_once, processes
from rlhf.runs.stage import open_stage
from rlhf.tokenization.prompt_prefix import parse, read_text


def main() -> None:
    """The `distill` target."""
    recipe = from_command_line()
    section = recipe.distill
    if section is None:
        print_once("distill: not in this recipe")
        return
    if section.method == "full" and processes() > 1 and recipe.distributed.zero_stage == 3:
        raise UserError(
            "distill.method: full does not go with ZeRO-3, whose processes hold a part of every matrix each; "
            "use distributed.zero_stage=2, or method=lora"
        )
    prompt = Path(recipe.hhh_prompt).expanduser()
    parse(read_text(prompt), str(prompt))  # a malformed one is refused before anything is loaded
    own = section.text_share < 1 and not section.questions  # answers the run's own comparisons
    run = open_stage(
        recipe,
        "distill",
        section="distill",
        parents=(*(("comparisons",) if own else ()), *start_parents(recipe, "distill")),
        inputs=[recipe.hhh_prompt, *section.texts, *section.questions, *start_inputs(recipe, "distill")],
        reads=[section.teacher] if section.teacher else [],
    )
    if run is None:
        return
    from policy.distillation.run import fit

    run.finish(fit(run.recipe, section, run))


if __name__ == "__main__":
    exit_on_user_error(main)
