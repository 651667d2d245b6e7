"""Exact tests of paired outcomes."""

from __future__ import annotations


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p of so uneven a number of wins and losses if both were as likely; ties do not count.

    min(1, 2 P(X <= min(wins, losses))), X binomial of wins + losses and 1/2: the exact form of McNemar's test
    (1947) where items are right or wrong.
    """
    changed, fewer = wins + losses, min(wins, losses)
    ways, tail = 1, 0
    for i in range(fewer + 1):
        tail += ways
        ways = ways * (changed - i) // (i + 1)
    return min(1.0, 2 * tail / 2**changed)
