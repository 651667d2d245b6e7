"""From figures to the claims: plain numbers in, verdicts on the bound of a 95% interval out.

A small model that pays the alignment tax agrees with the papers, so whether a tax is there is told, and not
judged; judged are its trend and what lowers it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from rlhf.stats.intervals import Estimate
from studies.engine.results import Results
from studies.engine.seeds import SeedMean
from studies.engine.verdicts import Claim, Statement, Verdict, above, below, inside, shown
from studies.scaling import objectives
from studies.scaling.data.items import TASKS
from studies.scaling.figures import JUDGED, LOSS, WORD, Figure, Study
from studies.scaling.objectives import BINARY, RANKED
from studies.scaling.plan import BASE, DISTILLED, PPO, PROMPTED, PTX
from studies.scaling.trend import LEAST_RUNGS

GONE = 0.8  # claim 5: share of the KL, and of what the context gives
SMALL = (
    0.02  # claim 6: accuracy on last words that prompt or distillation may cost (Askell 2021: 1 to 2 points)
)
SKILL = 0.1  # claim 6: accuracy on last words before, below which there is nothing to lose
COMPARABLE = 0.1  # claim 6: difference of two rewards, in units of VADER
MASS = 0.05  # claim 19: mean probability of all answers together, below which accuracy is not judged
UNKNOWN = Estimate(math.nan, math.nan, math.nan, 0)


def slope_of(figure: Figure) -> Estimate:
    """The slope of a figure on ln N; unknown with fewer than three rungs."""
    trend = figure.trend
    return UNKNOWN if trend is None else trend.slope


def all_claims(study: Study, preference: Results | None) -> list[Claim]:
    """Every claim, in the order of their numbers."""
    first = [preference_objectives(preference)] if preference else []
    return [*first, distillation(study), tax(study), inverse_scaling(study)]


def preference_objectives(rows: Results) -> Claim:
    """Claims 1 and 2 over the ladder: the trend of the gap between preference model and imitation."""
    ranked, binary = (objectives.gap(rows, data) for data in (RANKED, BINARY))
    return Claim(
        1,
        "Preference objectives: ranked pairs, binary pairs, imitation",
        "Ranked preference modelling does better than imitation and its lead grows with size; on binary data "
        "they are about equal (Askell et al. 2021).",
        "The results of `python -m studies.preference` on the same ladder, not trained again: accuracy on "
        "held-out pairs of a preference model less that of imitation of the good side. Its page has the "
        "verdicts at every size; here is the trend.",
        [
            above("slope of the lead on ranked pairs, a unit of ln N", slope_of(ranked), digits=4),
            *_at_every_rung(binary, "lead on binary pairs", lambda t, e: inside(t, e, -0.03, 0.03)),
        ],
        ("pairs", *(r.label for r in ranked.rungs), "slope a unit of ln N"),
        [[name, *_cells(figure)] for name, figure in ((RANKED, ranked), (BINARY, binary))],
        _short_ladder(len(ranked.rungs)),
    )


def distillation(study: Study) -> Claim:
    """Claim 5: the share of the KL that is gone, the share of the context's effect, and two exact checks."""
    gone, recovered = study.distillation("kl_recovered"), study.distillation("log_prob_recovered")
    results = [study.result("distil", rung, seed) for rung in study.rungs for seed in study.seeds]
    most = max(r["empty_context_kl"] for r in results)
    least = min(r["bounded"] for r in results)
    number = len(results)
    bounded = "share of places where the KL on 51 classes is no larger than the whole"
    return Claim(
        5,
        "Context distillation does what the prompt does",
        "A model distilled from itself under a prompt behaves without it as with it; the loss gets very low "
        "(Askell et al. 2021; Bai et al. 2022).",
        f"A context of {int(np.mean([r['context_tokens'] for r in results]))} tokens; the rung under it "
        "teaches the rung without it: KL on the teacher's 50 most likely tokens and the rest. "
        "The KL is measured on held-out texts. Share of the context's log-prob: of what the context adds to "
        "the log-probability of a continuation of its story (or of a held-out text, where the context is a "
        "given one), how much distillation adds.",
        [
            *_at_every_rung(gone, "share of KL(teacher || student) gone", lambda t, e: above(t, e, GONE)),
            *_at_every_rung(recovered, "share of the context's log-prob", lambda t, e: above(t, e, GONE)),
            _exactly(0, "largest KL with no context before training", most, number),
            _exactly(1, bounded, least, number),
        ],
        ("", *(r.label for r in study.rungs), "slope a unit of ln N"),
        [
            [f.name, *_cells(f, 4)]
            for f in (study.distillation("kl_before"), study.distillation("kl_after"), gone, recovered)
        ],
        (
            "A dash in the share of the log-prob: what the context gives cannot be told from nothing there, "
            "so there is no share of it.",
            *_short_ladder(len(study.rungs)),
        ),
    )


def tax(study: Study) -> Claim:
    """Claim 6: what the arms cost, how that changes with size, and what mixing in text does about it."""
    loss, word = study.tax(LOSS, PPO), study.tax(WORD, PPO)
    lowered = study.change(*LOSS, PPO, before=PTX)
    reward = study.change(*JUDGED, PTX, before=PPO)
    on_loss = below("slope of the tax of PPO on held-out loss, a unit of ln N", slope_of(loss), digits=4)
    skilled = [e.low >= SKILL for e in study.level(*WORD, BASE).estimates]
    on_words = below("slope of the tax of PPO on last words, a unit of ln N", slope_of(word), digits=4)
    statements = [on_loss, _if(all(skilled), on_words)]
    for arm in (PROMPTED, DISTILLED):
        text = f"last words lost, {arm}"
        statements += _at_every_rung(study.tax(WORD, arm), text, lambda t, e: below(t, e, SMALL), skilled)
    comparable = [e.low >= -COMPARABLE and e.high <= COMPARABLE for e in reward.estimates]
    statements += _at_every_rung(lowered, "tax on held-out loss, PPO less PPO-ptx", above, comparable)
    rows = []
    for measure, called in ((LOSS, "held-out loss, nats a byte"), (WORD, "last words lost")):
        for arm in (PROMPTED, DISTILLED, PPO, PTX):
            figure = study.tax(measure, arm)
            told = [f"{shown(e, 4)} {_paid(e)}" for e in figure.estimates]
            rows.append([called, arm, *told, shown(slope_of(figure), 4)])
    rows.append(["reward on held-out openings, VADER", f"{PTX} less {PPO}", *_cells(reward)])
    return Claim(
        6,
        "The alignment tax is small, and smaller with size",
        "Prompt and distillation cost 1 to 2 points on LAMBADA at all sizes (Askell et al. 2021); small "
        "models pay for RLHF and large ones do not (Bai et al. 2022); mixing in pre-training text lowers "
        "what PPO costs (Ouyang et al. 2022).",
        "Held-out loss and accuracy on last words of the same items before and after: under the context, "
        "with the context distilled, after a short PPO for VADER's sentiment, and the same with plain text "
        "mixed in (ptx). Tax: loss gained, or share of last words lost.",
        statements,
        ("tax on", "arm", *(r.label for r in study.rungs), "slope a unit of ln N"),
        rows,
        (
            "Models below ten billion parameters PAY the tax in the papers: a tax here agrees with them, "
            "and no verdict is made on its sign. *pays*, *gains*: the interval is above, below 0.",
            *(
                f"{rung.label}: PPO-ptx and PPO do not reach the same reward (within {COMPARABLE:g} on the "
                "whole interval), so a lower tax may be bought with less reward, and no verdict is made on "
                "it."
                for rung, fair in zip(study.rungs, comparable, strict=True)
                if not fair
            ),
            *(
                f"{rung.label} is right on less than {SKILL:g} of the last words before: it has nothing to "
                "lose there, so no verdict is made on what it lost."
                for rung, able in zip(study.rungs, skilled, strict=True)
                if not able
            ),
            *_short_ladder(len(study.rungs)),
        ),
    )


def inverse_scaling(study: Study) -> Claim:
    """Claim 19: the slope of accuracy on each task before and after PPO; the change itself is only told."""
    statements, rows, notes = [], [], []
    for task in _inverse(study):
        for arm in (BASE, PPO):
            figure = study.level(task, "acc", arm)
            mass = answer_mass(study, task, arm)
            text = f"slope of accuracy on {task}, {'before' if arm == BASE else 'after'} PPO, a unit of ln N"
            statements.append(_if(min(mass) >= MASS, below(text, slope_of(figure), digits=4)))
            if min(mass) < MASS:
                notes.append(
                    f"{task}, {arm}: the answers hold {min(mass):.2g} of the probability at one rung, below "
                    f"{MASS:g}: accuracy there says little, so no verdict is made."
                )
            rows.append([task, arm, *_cells(figure)])
            rows.append([task, f"{arm}: mass on the answers", *(f"{m:.3f}" for m in mass), "-"])
        rows.append([task, f"{PPO} less {BASE}, paired", *_cells(study.change(task, "acc", PPO))])
    return Claim(
        19,
        "Inverse scaling before and after RLHF",
        "On the prize tasks larger models do worse (McKenzie et al. 2023); the trend of Modus Tollens "
        "holds for models after RLHF too.",
        "Accuracy over the ladder before PPO and after. Supported: the slope of accuracy on ln N is below 0. "
        + (
            "The items are made for the text that the rungs know, in the manner of four of the tasks: the "
            "obvious answer of that text is the wrong one."
            if set(_inverse(study)) <= set(TASKS)
            else "The items are those of the files that were given, and our own in the manner of four tasks."
        ),
        statements,
        ("task", "arm", *(r.label for r in study.rungs), "slope a unit of ln N"),
        rows,
        (
            "Guessing is right half of the time on the four generated tasks. What they show is a property of "
            "these generators; the public tasks are evaluated with --models and --tasks.",
            *notes,
            *_short_ladder(len(study.rungs)),
        ),
    )


def answer_mass(study: Study, task: str, arm: str) -> list[float]:
    """Mean probability of all answers together at every rung."""
    masses = study.points(
        lambda rung, seed: SeedMean.of(np.exp(study.items(task, "total_logprob", arm, rung, seed)))
    )
    return [float(np.mean([seed.mean for seed in seeds])) for seeds in masses]


def _inverse(study: Study) -> list[str]:
    """The tasks that are scored as the prize's classification tasks."""
    return [task for task in study.tasks if {"acc", "total_logprob"} <= set(study.metrics(task))]


def _at_every_rung(
    figure: Figure, text: str, judge: Callable[[str, Estimate], Statement], able: Sequence[bool] = ()
) -> list[Statement]:
    """A statement a rung; without a verdict where that is not ``able`` to have one."""
    labels = [f"{text}, {rung.label}" for rung in figure.rungs]
    made = [judge(label, estimate) for label, estimate in zip(labels, figure.estimates, strict=True)]
    return [_if(not able or able[n], s) for n, s in enumerate(made)]


def _exactly(wanted: float, text: str, found: float, number: int) -> Statement:
    return inside(f"{text} (exact)", Estimate(found, found, found, number), wanted, wanted)


def _if(means_something: bool, statement: Statement) -> Statement:
    return statement if means_something else replace(statement, verdict=Verdict.UNDECIDED)


def _cells(figure: Figure, digits: int = 3) -> list[str]:
    return [*(shown(e, digits) for e in figure.estimates), shown(slope_of(figure), digits + 1)]


def _paid(tax: Estimate) -> str:
    return "*pays*" if tax.low > 0 else "*gains*" if tax.high < 0 else ""


def _short_ladder(rungs: int) -> Sequence[str]:
    if rungs >= LEAST_RUNGS:
        return ()
    return (f"{rungs} rung{'s' if rungs > 1 else ''}: a trend needs {LEAST_RUNGS}, so none is given.",)
