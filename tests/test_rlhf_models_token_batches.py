"""Batches by a token budget: every item once, none above the budget, none ended too early."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from rlhf.models.token_batches import token_batches


@given(
    sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 3)), max_size=12),
    budget=st.integers(1, 100),
    longest_first=st.booleans(),
)
def test_every_item_once_and_no_batch_above_the_budget_or_ended_too_early(sizes, budget, longest_first):
    widths, rows = [width for width, _ in sizes], [number for _, number in sizes]

    def cost(batch):
        return max(widths[i] for i in batch) * sum(rows[i] for i in batch)

    batches = token_batches(widths, budget, rows=rows, longest_first=longest_first)
    assert sorted(i for batch in batches for i in batch) == list(range(len(sizes)))
    assert all(cost(batch) <= budget or len(batch) == 1 for batch in batches)
    assert all(cost([*batch, after[0]]) > budget for batch, after in itertools.pairwise(batches))
    order = [widths[i] for batch in batches for i in batch]
    assert order == sorted(widths, reverse=longest_first)


def test_known_widths_are_batched_as_by_hand():
    widths = [5, 4096, 1, 900, 3000, 900, 5000, 900]
    assert token_batches(widths, 4096) == [[2, 0, 3, 5], [7], [4], [1], [6]]
    assert token_batches(widths, 4096, longest_first=True) == [[6], [1], [4], [3, 5, 7, 0], [2]]
    assert token_batches(widths[:3], 5, rows=[2, 1, 1]) == [[2], [0], [1]]
    assert token_batches([2, 2, 2], 4, ties=["b", "c", "a"]) == [[2, 0], [1]]
    assert token_batches([0, 0], 0) == [[0, 1]]
    assert token_batches([], 10) == []
