"""study.json and study.md of this study; and its plots by claim."""

from __future__ import annotations

from typing import Any

from rlhf.markdown import table
from studies.engine import report
from studies.scaling.figures import Study

PLOTS = {
    1: ("objectives.png", "Lead of the preference model over imitation against N"),
    5: ("distillation.png", "What distillation takes over of the context, against N"),
    6: ("tax.png", "What each arm costs, against N"),
    19: ("inverse.png", "Accuracy on the inverse-scaling items against N, before and after PPO"),
}


def rungs(study: Study) -> list[dict[str, Any]]:
    """What the first seed's rungs consist of, and the mean loss that each was left with."""
    made = []
    for rung in study.rungs:
        results = [study.result("rung", rung, seed) for seed in study.seeds]
        losses = [r["last_loss"] for r in results if "last_loss" in r]
        loss = sum(losses) / len(losses) if losses else None
        counts = {k: results[0][k] for k in ("parameters", "vocabulary")}
        made.append({"rung": rung.label, "N": rung.size, **counts, "loss": loss})
    return made


def page(content: report.Content) -> str:
    """The study as one Markdown page."""
    plan = content["plan"]
    budget = f"{plan['tokens']:,} training tokens a rung; " if plan["sizes"] else ""
    return report.page(
        content,
        PLOTS,
        title="Evaluations and objectives over a ladder of models",
        intro=_intro(plan),
        seeds="other world, text, weights and items",
        models=["## The ladder", _ladder(content["rungs"])],
        end=f"{budget}{plan['sequences']} sequences distilled, {plan['steps']} PPO steps of "
        f"{plan['responses']} responses. Preference objectives: {content['preference']}.",
    )


def _intro(plan: dict[str, Any]) -> str:
    if plan["sizes"]:
        text = "Small language models trained here from nothing, on text of a small world of plain words"
    else:
        text = "Models that were given"
    if plan["given"]["text"]:
        text += f" and on {', '.join(plan['given']['text'])}"
    text += (
        ". They test the shape of the papers' claims, not their values: no number here can stand beside "
        "one of a model of ten billion parameters."
    )
    if plan["name"].startswith("quick"):
        text += " **Tiny budgets: this page shows that all of it runs, and has no verdict to cite.**"
    return text


def _ladder(rungs: list[dict[str, Any]]) -> str:
    head = ("rung", "N, weights in matrices of the layers", "all parameters", "vocabulary")
    rows = []
    for r in rungs:
        loss = "-" if r["loss"] is None else f"{r['loss']:.3f}"
        rows.append((r["rung"], f"{r['N']:,.0f}", f"{r['parameters']:,}", f"{r['vocabulary']:,}", loss))
    return table((*head, "training loss at the end, nats a token"), rows)
