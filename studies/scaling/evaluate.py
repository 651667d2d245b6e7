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
from rlhf.evals.registry import evaluate_task
from rlhf.evals.tasks import inverse_scaling, lm_loss, toxicity
from studies.engine.units import Settings
from studies.scaling.data.items import TASKS, Question, questions
from studies.scaling.data.texts import Library
from studies.scaling.reinforce import JUDGE

Values = dict[str, list[float]]
"""Metric -> one value an item."""
_DIGITS = 6


def outcomes(lm: LanguageModel, library: Library, s: Settings) -> dict[str, Values]:
    """All evaluations of one arm, by task.

    lm: the model of the arm, behind the context if it is the prompted one. s: of the unit.
    """
    texts = library.documents(s["texts"], s["words"])
    openings = library.openings(s["judged"], training=False)
    found = {
        "lm_loss": lm_loss.run(lm, [lm_loss.Item(str(n), "", text) for n, text in enumerate(texts)]).values,
        "last_word": last_words(lm, library.last_words(s["last_words"])),
        "judged": judged(lm, openings, s["response_tokens"], s["seed"]),
    }
    for task in TASKS:
        found[task] = classified(lm, questions(task, library.world, s["seed"], s["items"]))
    for name, files in s["tasks"].items():
        public = evaluate_task(name, [path for path, _ in files], lm, limit=s["public"], seed=s["seed"])
        found[public.task] = public.values
    return {
        task: {metric: [round(x, _DIGITS) for x in some] for metric, some in values.items()}
        for task, values in found.items()
    }


def last_words(lm: LanguageModel, passages: Sequence[tuple[str, str]]) -> Values:
    """Whether the last word is what the model would write, and its loss."""
    scored = lm.score([lm.encode_pair(*passage) for passage in passages])
    return {"acc": [float(s.greedy) for s in scored], "nll": [-s.log_prob for s in scored]}


def judged(lm: LanguageModel, openings: Sequence[str], tokens: int, seed: int) -> Values:
    """Sentiment of one continuation an opening, sampled at temperature 1."""
    items = [toxicity.Item(str(n), text, "") for n, text in enumerate(openings)]
    judge = JUDGES[JUDGE]
    found = toxicity.run(lm, items, judge=judge, max_new_tokens=tokens, temperature=1.0, top_p=1.0, seed=seed)
    return {"score": found.values["score"]}


def classified(lm: LanguageModel, items: Sequence[Question]) -> Values:
    """Items with classes, scored as the Inverse Scaling Prize does
    (:mod:`rlhf.evals.tasks.inverse_scaling`)."""
    pairs = [lm.encode_pair(item.prompt, choice) for item in items for choice in item.classes]
    scores = iter([s.log_prob for s in lm.score(pairs)])
    rows = [
        inverse_scaling.classification([next(scores) for _ in item.classes], item.answer_index)
        for item in items
    ]
    return {name: [row[name] for row in rows] for name in ("acc", "total_logprob")}
