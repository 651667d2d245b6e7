"""How varied a set of responses is: the numbers that show a collapse which the reward hides."""

from __future__ import annotations

from collections.abc import Sequence


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Share of different word n-grams among all n-grams of the texts (Li 2016, "distinct-n"), 0 to 1.

    NaN where no text has n words.
    """
    grams = [
        tuple(words[i : i + n]) for words in (t.split() for t in texts) for i in range(len(words) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else float("nan")
