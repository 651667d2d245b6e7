"""Five reward functions to start from; a recipe names one as recipes/reward_functions.py:brevity.

The signature is that of trl's ``reward_funcs``: prompts, completions and the columns of the prompts by name,
one number a completion back, higher is better; None = does not apply. Prompts and completions are texts with
``dialogue.template: plain`` and lists of messages with ``chat``; ``_text`` reads both.
"""

import itertools
import re


def _text(completion):
    return completion if isinstance(completion, str) else completion[-1]["content"]


def brevity(prompts, completions, **kwargs):
    """1 for an empty response, 0 from 400 characters on."""
    return [max(0.0, 1 - len(_text(completion)) / 400) for completion in completions]


def right_answer(completions, answer, **kwargs):
    """1 where the last number of the response is the known answer, a column; None where there is none."""
    scores = []
    for completion, known in zip(completions, answer, strict=True):
        numbers = re.findall(r"-?\d+(?:\.\d+)?", _text(completion).replace(",", ""))
        right = bool(numbers) and known is not None and float(numbers[-1]) == float(known)
        scores.append(None if known is None else float(right))
    return scores


def well_formed(completions, log_metric=None, **kwargs):
    """1 for <think>...</think><answer>...</answer>; logs the share that has an answer."""
    form = re.compile(r"\s*<think>.*?</think>\s*<answer>.*?</answer>\s*", re.DOTALL)
    if log_metric is not None:
        log_metric("answers", sum("<answer>" in _text(c) for c in completions) / len(completions))
    return [float(form.fullmatch(_text(completion)) is not None) for completion in completions]


def variety(completions, **kwargs):
    """Share of different pairs of neighboring words: 1 where none is repeated, near 0 for a loop."""
    scores = []
    for completion in completions:
        words = _text(completion).lower().split()
        pairs = list(itertools.pairwise(words))
        scores.append(len(set(pairs)) / len(pairs) if pairs else 0.0)
    return scores


def length_schedule(completions, completion_ids, trainer_state=None, **kwargs):
    """Less the number of tokens beyond a limit that falls from 256 to 64 over the training."""
    done = trainer_state.global_step / max(1, trainer_state.max_steps) if trainer_state else 1.0
    limit = 256 - 192 * done
    return [-max(0.0, len(ids) - limit) / 64 for ids in completion_ids]
