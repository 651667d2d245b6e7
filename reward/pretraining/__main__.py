"""The `pmp` stage: preference-model pre-training on public comparisons, before the reward model.

``python -m reward.pretraining RECIPE [section.key=value ...]`` writes ``runs/<name>/pmp/model``, from which
the `reward` stage of the same recipe starts, and the comparisons that it was trained and judged on. A recipe
without a ``pmp`` section has no such stage (Askell 2021, section 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlhf.data.comparisons import Comparison, Counts, distinct_responses, write_native
from rlhf.data.mixture import Filter, binarize, check_prefixes, sample_mixture, subsample_responses
from rlhf.data.split import split_by_prompt
from rlhf.errors import exit_on_user_error
from rlhf.recipe.load import Recipe, check_batch_sizes, from_command_line
from rlhf.recipe.schema import Pmp
from rlhf.runs.initial_adapter import start_files, start_folder, start_parents
from rlhf.runs.processes import check_rows, print_once, processes
from rlhf.runs.stage import StageRun, open_stage

if TYPE_CHECKING:
    from rlhf.tokenization.dialogue import Dialogue


def pretrain(recipe: Recipe, section: Pmp, run: StageRun) -> dict[str, Any]:
    """Do the stage's work; returns the figures for the manifest."""
    from reward.model.batch import encode_split
    from reward.model.ensemble import MODEL
    from reward.model.model import config_of, new_reward_model, start_from
    from reward.training.run import judge, save
    from reward.training.trainer import plan_forward, train_preference_model
    from rlhf.tokenization.dialogue import load_dialogue

    dialogue = load_dialogue(recipe, section.max_response_tokens)
    parts, counts = public_comparisons(recipe, section, run, dialogue)
    key = section.length_key
    train, held_out = encode_split(*parts, dialogue, lambda line: run.say(f"pmp: {line}"), key)
    check_rows("pmp", len(train))
    fresh = new_reward_model(recipe, dialogue, layers=section.layers, pooling=section.pooling)
    if start := start_folder(recipe, run, "pmp"):
        read = start_from(fresh, start, "pmp.start")
        run.say(f"pmp: starts from {start} ({read} tensors)")
    plan = plan_forward(recipe, section, fresh, [*train, *held_out], dialogue)
    model = train_preference_model(
        recipe, section, dialogue, fresh, train, plan, folder=run.folder, stage="pmp",
        on_checkpoint=run.note_clock,
    )  # fmt: skip
    figures, _ = judge(recipe, section, model, held_out, dialogue, plan)
    results: dict[str, Any] = {f"held_out_{name}": figure.as_dict() for name, figure in figures.items()}
    config = config_of(recipe, dialogue, section, gain=1.0, offset=0.0, layers=section.layers)
    save(run, model, run.folder / MODEL, config, dialogue)
    if run.is_main:
        found = figures["accuracy"]
        print(
            f"pmp: held-out pair accuracy {found.mean:.3f} [{found.low:.3f}, {found.high:.3f}] "
            f"on {found.n} comparisons ({section.form})",
            flush=True,
        )
    return {**results, "train": len(train), "held_out": len(held_out), "counts": counts}


def public_comparisons(
    recipe: Recipe, section: Pmp, run: StageRun, dialogue: Dialogue
) -> tuple[tuple[list[Comparison], list[Comparison]], dict[str, Any]]:
    """The sample_mixture, fitted to the recipe's lengths, split by question, in the form that is trained on.

    Raises:
        UserError: nothing usable, or a control prefix that the tokenizer does not know.
    """
    if section.form == "binarized":
        tokenizer = dialogue.tokenizer
        check_prefixes(
            dialogue.encode_response, tokenizer.unk_token_id, section.good_prefix, section.bad_prefix
        )
    drawn, counts = sample_mixture(
        section.sources,
        section.limit,
        seed=recipe.seed,
        on_bad_rows=recipe.data.on_bad_rows,
        cache=run.folder / "parts" / "mixture" if run.is_main else None,
        fits=_fits(recipe, dialogue),
    )
    left = told_apart(section, dialogue, drawn)
    if len(left) < len(drawn):
        lost = Counts(len(drawn))
        lost.drop(f"responses equal within {section.length_key}", len(drawn) - len(left))
        counts["after the cut"] = lost
    thinned = [subsample_responses(c, section.max_responses) for c in left]
    if run.is_main:
        for name, count in counts.items():
            print(f"pmp: {name}: {count}", flush=True)
    train, held_out = split_by_prompt(thinned, section.held_out, recipe.seed)
    if section.form == "binarized":
        train, held_out = (
            [pair for c in part for pair in binarize(c, section.good_prefix, section.bad_prefix)]
            for part in (train, held_out)
        )
    if run.is_main:
        write_native(run.folder / "train.jsonl", train)
        write_native(run.folder / "held_out.jsonl", held_out)
        print(f"pmp: {len(train)} comparisons to train on, {len(held_out)} held out", flush=True)
    return (train, held_out), {name: count.as_dict() for name, count in counts.items()}


def told_apart(section: Pmp, dialogue: Dialogue, drawn: Sequence[Comparison]) -> list[Comparison]:
    """Comparisons in which the cut leaves something to tell apart.

    In the binarized form the control prefix takes room of the response, and would hide that two are equal.
    """
    prefix = section.good_prefix if section.form == "binarized" else ""

    def read(text: str) -> tuple[int, ...]:
        return tuple(dialogue.encode_response(prefix + text))

    found = (distinct_responses(comparison, read) for comparison in drawn)
    return [comparison for comparison in found if len(set(comparison.ranks)) > 1]


def _fits(recipe: Recipe, dialogue: Dialogue) -> Filter:
    """Public questions are of any length: one beyond the limit is left out, unless the recipe truncates."""
    from rlhf.tokenization.dialogue import PromptTooLongError

    def problem(comparison: Comparison) -> str | None:
        try:
            dialogue.encode_prompt(comparison.prompt)
        except PromptTooLongError:
            return "prompt longer than dialogue.max_prompt_tokens"
        return None

    section = recipe.dialogue
    name = f"{dialogue.fingerprint()} {section.max_prompt_tokens} {section.on_long_prompts}"
    return Filter(name, problem, dialogue.refusal)


def main() -> None:
    """The `pmp` target."""
    recipe = from_command_line()
    section = recipe.pmp
    if section is None:
        print_once("pmp: not in this recipe")
        return
    check_batch_sizes(recipe, processes(), "pmp")
    files = [spec for source in section.sources for spec in source.files]
    inputs, parents = [*files, *start_files(recipe, "pmp")], start_parents(recipe, "pmp")
    run = open_stage(recipe, "pmp", section="pmp", parents=parents, inputs=inputs)
    if run is not None:
        run.finish(pretrain(run.recipe, section, run))


if __name__ == "__main__":
    exit_on_user_error(main)
