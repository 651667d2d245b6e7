"""The model card of an exported model, filled from its run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from rlhf import NAME, __version__
from rlhf.markdown import cell, number, percent, plain, table, value
from rlhf.recipe.load import Recipe
from rlhf.report.gather import Run, gather
from rlhf.runs.artifacts import write_atomically
from rlhf.runs.stage import RUNS

if TYPE_CHECKING:
    from rlhf.tokenization.dialogue import Dialogue

_MADE_BY = {
    "ppo": "PPO against a reward model",
    "dpo": "DPO on comparisons",
    "distill": "context distillation",
    "sft": "supervised fine-tuning on demonstrations",
    "reward": "a reward model trained on comparisons",
}
_COMPARED = {  # key of summary.json: label, format
    "gold": ("gold score", ".3f"),
    "judge": ("score by a held-out reward model", ".3f"),
    "reward": ("score by the reward model it was trained on", ".3f"),
    "response_length": ("response length, tokens", ".1f"),
    "eos_rate": ("share that ended itself", ".3f"),
    "entropy": ("entropy, nats a token", ".2f"),
    "distinct_2": ("distinct-2", ".3f"),
}


def write_card(
    recipe: Recipe, stage: str, folder: Path, name: str, dialogue: Dialogue, about: dict[str, Any]
) -> None:
    """Write the ``README.md`` of an exported model.

    Args:
        recipe: the whole recipe.
        stage: that trained it.
        folder: of the model.
        name: ``policy``, ``reward``, ``reward-1``, ...
        dialogue: its token contract.
        about: ``gap`` to the trained model on so many ``rows``; of a reward model its configuration too.
    """
    run = gather(RUNS / recipe.name)
    environment = Environment(
        loader=PackageLoader("rlhf.export", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        autoescape=False,
    )
    text = environment.get_template("card.md.jinja").render(
        front=yaml.safe_dump(front_matter(recipe, stage), sort_keys=False, allow_unicode=True),
        title=f"{recipe.name}-{name}",
        made_by=_MADE_BY[stage],
        recipe=recipe,
        stage=stage,
        about=about,
        gap=number(about["gap"], ".2g"),
        ends=[dialogue.tokenizer.convert_ids_to_tokens(i) for i in dialogue.closing],
        closing=dialogue.closing,
        data=_data(run),
        figures=_reward_figures(run) if stage == "reward" else _policy_figures(run, stage),
        tax="" if stage == "reward" else _tax(run),
        versions=", ".join(f"{k} {v}" for k, v in run.stages[stage].manifest.get("versions", {}).items()),
        commit=run.stages[stage].manifest.get("git_commit") or "unknown",
        project=f"{NAME} {__version__}",
    )
    write_atomically(folder / "README.md", text)


def front_matter(recipe: Recipe, stage: str) -> dict[str, Any]:
    """What the hub reads: license, base, task, data sets."""
    given = recipe.export.license or _license_of(Path(recipe.model.path))
    hub = [re.split("[:@]", spec[4:])[0] for spec in recipe.data.comparisons if spec.startswith("hub:")]
    base = Path(recipe.model.path)
    return {
        "license": given or "other",
        **({} if given else {"license_name": "not-stated"}),
        "base_model": base.name if base.is_dir() else recipe.model.path,
        "library_name": "transformers",
        "pipeline_tag": "text-classification" if stage == "reward" else "text-generation",
        "tags": ["reward-model" if stage == "reward" else stage, "rlhf", NAME],
        **({"datasets": sorted({"/".join(name.split("/")[:2]) for name in hub})} if hub else {}),
    }


def _license_of(base: Path) -> str | None:
    """What the card of a local base model names."""
    try:
        parts = (base / "README.md").read_text(encoding="utf-8").split("---")
        found = yaml.safe_load(parts[1]).get("license") if len(parts) > 2 else None
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return None
    return found if isinstance(found, str) else None


def _data(run: Run) -> list[str]:
    """What it was trained on, a line each."""
    made, section = run.stages["comparisons"].results, run.recipe.get("data") or {}
    lines = [f"Comparisons: {', '.join(map(str, section.get('comparisons') or ['unknown']))}"]
    if section.get("comparisons") == ["sampled"]:
        collect = run.recipe.get("collect") or {}
        lines = [
            f"Comparisons: {collect.get('responses')} responses of the base to each of "
            f"{collect.get('prompts')} prompts, ranked by the judge {collect.get('judge')} with label noise "
            f"{collect.get('noise')}; no person was asked"
        ]
    if made:
        lines.append(
            f"{made.get('train')} comparisons to train on, {made.get('held_out')} held out by prompt; "
            f"{made.get('prompts')} prompts for the policy"
        )
    inputs = (run.stages["comparisons"].manifest.get("fingerprint") or {}).get("inputs") or {}
    lines += [f"`{cell(name)}`: sha256 {digest}" for name, digest in inputs.items() if digest != "by name"]
    return lines


def _policy_figures(run: Run, stage: str) -> str:
    """Before and after on held-out prompts, where this stage's policy was evaluated."""
    name = "evaluate_dpo" if stage == "dpo" else "evaluate"
    page = run.stages[name].page if name in run.stages else {}
    if stage not in ("ppo", "dpo") or not page:
        return "Not evaluated (`make evaluate`).\n"
    rows = []
    for key, (label, form) in _COMPARED.items():
        if found := page.get(key):
            change, ends = value({"mean": found["diff"], "ci95": found["ci95"]}, form)
            rows.append([label, number(found["before"], form), number(found["after"], form), change, ends])
    count = page["reward"]["n"] if "reward" in page else "unknown"
    return (
        f"Before (the start) and after on {count} held-out prompts, paired by prompt; judged by "
        f"{page.get('judged_by')}.\n\n"
        + table(["figure", "before", "after", "difference", "95% interval"], rows)
        + f"\nKL from the start: {plain(page['kl'], '.2f')} nats a response.\n"
        + (f"\nOver-optimization: {audit['text']}\n" if (audit := page.get("over_optimization")) else "")
    )


def _reward_figures(run: Run) -> str:
    """Accuracy beside what can be had without it, and calibration."""
    page, results = run.stages["card"].page, run.stages["reward"].results
    if not page:
        found = results.get("held_out_accuracy")
        accuracy = f"Held-out pair accuracy {percent(found)}. " if found else ""
        return f"{accuracy}No card was made (`make card`).\n"
    base = page["baselines"]
    rows = [["this model", page["accuracy"]["overall"]], ["longer is better", base["longer_is_better"]]]
    rows += [["bag of words", base.get("bag_of_words")], ["on pairs of like length", base.get("like_length")]]
    lines = [[label, percent(figure)] for label, figure in rows if figure]
    calibration = page["calibration"]
    lines += [
        ["expected calibration error", plain(calibration["ece"], ".3f")],
        ["calibration slope (1 is right)", plain(calibration["slope"], ".2f")],
        ["rank correlation with length", plain(page["length"]["spearman"], ".2f")],
    ]
    pairs, clusters = page["accuracy"]["overall"]["pairs"], page["clusters"]
    return f"On {pairs} held-out pairs of {clusters} {page['unit']}, 95% intervals:\n\n" + table(
        ["figure", "value"], lines
    )


def _tax(run: Run) -> str:
    """What alignment cost, task by task."""
    page = run.stages["tax"].page if "tax" in run.stages else {}
    rows = []
    for task in page.get("tasks") or []:
        for variant, found in task["differences"].items():
            gain = plain({"mean": found["gain"], "ci95": found["gain_ci95"]}, "+.3f")
            rows.append([task["task"], task["metric"], variant, gain, found["verdict"]])
    if not rows:
        return "Not measured (`make tax`).\n"
    head = ["task", "metric", "variant", f"gain over {page['reference']} [95% interval]", "verdict"]
    return table(head, rows) + "\nA minus is a tax.\n"
