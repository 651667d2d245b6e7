"""Comparisons with the lengths of Anthropic HH, made of a seed: words without sense, for timing alone.

Number of turns, words a turn and words a response follow those of the helpful and harmless test files of
Anthropic HH (Bai 2022) among the comparisons of at most 256 tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from rlhf.data.comparisons import Comparison, Message

_TEXT = """
the of and a to in is you that it he was for on are as with his they I at be this have from or one had by word
but not what all were we when your can said there use an each which she do how their if will up other about
out many then them these so some her would make like him into time has look two more write go see number no
way could people my than first water been call who oil its now find long down day did get come made may part
over new sound take only little work know place year live me back give most very after thing
"""
_WORDS = _TEXT.split()
_TURNS = {1: 0.42, 3: 0.31, 5: 0.20, 7: 0.07}  # turns of a prompt: the human's and the assistant's between
_PROMPT_WORDS = (2.57, 0.78)  # mean and standard deviation of the logarithm of the words a turn
_RESPONSE_WORDS = (3.25, 0.90)


def hh_shaped(seed: int, responses: int, scale: float = 1.0) -> Iterator[Comparison]:
    """Comparisons without end, all different, their responses in the order of their ranks.

    Args:
        seed: the same seed gives the same comparisons.
        responses: of each comparison, none tied.
        scale: of all lengths, for tokenizers that make more of a word.
    """
    draw = random.Random(f"hh-shaped {seed} {responses}")
    for number in range(1 << 30):
        count = draw.choices(list(_TURNS), list(_TURNS.values()))[0]
        prompt = tuple(
            Message("user" if turn % 2 == 0 else "assistant", _text(draw, *_PROMPT_WORDS, scale))
            for turn in range(count)
        )
        texts = tuple(f"{_text(draw, *_RESPONSE_WORDS, scale)} {place}" for place in range(responses))
        first = Message("user", f"{number} {prompt[0].content}")
        yield Comparison((first, *prompt[1:]), texts, tuple(range(responses)), "hh-shaped")


def _text(draw: random.Random, mean: float, spread: float, scale: float) -> str:
    count = max(1, round(scale * draw.lognormvariate(mean, spread)))
    return " ".join(draw.choices(_WORDS, k=count)) + "."
