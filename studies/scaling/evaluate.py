"""What one arm of one rung does on the items of a seed: the project's evaluations, item by item.

lm_loss      held-out text, nats a byte (models with different tokenizers can be compared)
last_word    the last word of a held-out passage, all its tokens the most probable ones, as in LAMBADA
judged       mean sentiment (VADER) of what is written after held-out openings: what PPO is rewarded for
memo_trap, modus_tollens, redefine, neqa     of :mod:`studies.scaling.data.items`
public tasks by the names of :mod:`rlhf.evals.registry`, on the files that were given
"""

from __future__ import annotations

from collections.abc import Sequence

from rlhf.collect.judges import JUDGES
from rlhf.evals.model import LanguageModel
from rlhf.evals.outcome import Outcome
from rlhf.evals.registry import evaluate_task
from rlhf.evals.tasks import inverse_scaling, lm_loss, toxicity
from studies.engine.units import Settings
from studies.scaling.data.items import TASKS, Question, questions
from studies.scaling.data.texts import Library
from studies.scaling.reinforce import JUDGE

Values = dict[str, dict[str, list[float]]]
"""Task -> metric -> one value an item."""
_DIGITS = 6


def outcomes(lm: LanguageModel, library: Library, s: Settings) -> Values:
    """All evaluations of one arm.

    lm: the model of the arm, behind the context if it is the prompted one. s: of the unit.
    """
    found = [
        held_out_loss(lm, library.documents(s["texts"], s["words"])),
        last_words(lm, library.last_words(s["last_words"])),
        judged(lm, library.openings(s["judged"], training=False), s["response_tokens"], s["seed"]),
        *(classified(lm, task, questions(task, library.world, s["seed"], s["items"])) for task in TASKS),
    ]
    for name, files in s["tasks"].items():
        paths = [path for path, _ in files]
        found.append(evaluate_task(name, paths, lm, limit=s["public"], seed=s["seed"]))
    return {o.task: {m: [round(v, _DIGITS) for v in values] for m, values in o.values.items()} for o in found}


def held_out_loss(lm: LanguageModel, texts: Sequence[str]) -> Outcome:
    """Loss of whole texts."""
    return lm_loss.run(lm, [lm_loss.Item(str(n), "", text) for n, text in enumerate(texts)])


def last_words(lm: LanguageModel, passages: Sequence[tuple[str, str]]) -> Outcome:
    """Whether the last word is what the model would say, and its loss."""
    scored = lm.score([lm.encode_pair(*passage) for passage in passages])
    return Outcome(
        task="last_word",
        metric="acc",
        higher_is_better=True,
        ids=[str(n) for n in range(len(scored))],
        groups=[""] * len(scored),
        values={"acc": [float(s.greedy) for s in scored], "nll": [-s.log_prob for s in scored]},
    )


def judged(lm: LanguageModel, openings: Sequence[str], tokens: int, seed: int) -> Outcome:
    """Sentiment of one continuation an opening, sampled at temperature 1."""
    items = [toxicity.Item(str(n), text, "") for n, text in enumerate(openings)]
    found = toxicity.run(
        lm,
        items,
        judge=JUDGES[JUDGE],
        max_new_tokens=tokens,
        temperature=1.0,
        top_p=1.0,
        seed=seed,
    )
    return Outcome(
        task="judged",
        metric="score",
        higher_is_better=True,
        ids=found.ids,
        groups=found.groups,
        values={"score": found.values["score"]},
    )


def classified(lm: LanguageModel, task: str, items: Sequence[Question]) -> Outcome:
    """Items with classes, scored as the Inverse Scaling Prize does
    (:mod:`rlhf.evals.tasks.inverse_scaling`)."""
    pairs = [lm.encode_pair(item.prompt, choice) for item in items for choice in item.classes]
    scores = iter([s.log_prob for s in lm.score(pairs)])
    rows = [
        inverse_scaling.classification([next(scores) for _ in item.classes], item.answer_index)
        for item in items
    ]
    return Outcome(
        task=task,
        metric="acc",
        higher_is_better=True,
        ids=[str(n) for n in range(len(rows))],
        groups=[""] * len(rows),
        values={name: [row[name] for row in rows] for name in ("acc", "total_logprob")},
        chance=0.5,
    )
