"""Sequences that share a row: who sees whom, what goes where, and how full the rows are."""

import itertools
import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.models.packing import SHARED, Row, attention_mask, compare_packing, first_fit, micro_batches, pack


def peft_model(dtype, **more):
    """What the comparison asks of a model."""
    return SimpleNamespace(base_model=SimpleNamespace(model=SimpleNamespace(dtype=dtype, **more)))


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=20)


def rows(lengths, seed=0):
    rng = random.Random(seed)
    return [
        Row([rng.randrange(3, 99) for _ in range(n)], [rng.random() < 0.5 for _ in range(n)]) for n in lengths
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_sees_the_shared_part_and_its_own_sequence_up_to_itself(dtype):
    segments = torch.tensor([[2, 2, 3, 3, 3, 4, 0], [2] * 7, [1, 1, 2, 2, 3, 0, 0], [1, 2, 3, 4, 4, 4, 4]])
    mask = attention_mask(segments, torch.zeros_like(segments), None, dtype)
    assert (mask.shape, mask.dtype) == ((4, 1, 7, 7), dtype)
    for n, i, j in itertools.product(range(4), range(7), range(7)):
        may = j <= i and int(segments[n, j]) in (SHARED, int(segments[n, i]))
        if segments[n, i] or i == j:  # padding sees itself, so that no row is all masked
            assert float(mask[n, 0, i, j]) == (0.0 if may else torch.finfo(dtype).min), (n, i, j)


def test_rows_of_one_sequence_need_no_more_than_a_plain_mask():
    for segments in ([[2, 2, 2], [2, 0, 0]], [[1, 2, 2], [1, 0, 0]]):
        mask = attention_mask(torch.tensor(segments), None, None, torch.float32)
        assert mask.dtype == torch.long
        assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


@given(LENGTHS, st.integers(1, 60))
def test_every_sequence_has_one_place_and_the_first_that_had_room(lengths, capacity):
    bins = first_fit(lengths, capacity)
    assert sorted(i for row in bins for i in row) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in row) for row in bins]
    assert all(total <= capacity or len(row) == 1 for total, row in zip(filled, bins, strict=True))
    for number, row in enumerate(bins):  # what opened a row had no room in any row before
        assert all(total + lengths[row[0]] > capacity for total in filled[:number])


def test_known_lengths_are_packed_as_by_hand():
    # 7 | 6 | 5 with 2 | 4 with 3: capacity 7
    assert first_fit([5, 2, 7, 4, 3, 6], 7) == [[2], [5], [0, 1], [3, 4]]
    assert micro_batches([5, 2, 7, 4, 3, 6], 14, packing=True) == [[[5], [0, 1]], [[2], [3, 4]]]
    assert micro_batches([5, 2, 7], 10, packing=False) == [[[1], [0]], [[2]]]
    assert micro_batches([5, 2, 7], 3, packing=False) == [[[1]], [[0]], [[2]]]


@given(LENGTHS, st.integers(1, 120), st.booleans())
def test_a_micro_batch_is_within_its_budget_or_a_single_row(lengths, budget, packing):
    batches = micro_batches(lengths, budget, packing=packing)
    assert sorted(i for bins in batches for row in bins for i in row) == list(range(len(lengths)))
    for bins in batches:
        widest = max(sum(lengths[i] for i in row) for row in bins)
        assert widest * len(bins) <= budget or len(bins) == 1
        assert widest <= max(lengths)
    places = [max(sum(lengths[i] for i in row) for row in bins) * len(bins) for bins in batches]
    assert packing or sum(places) >= sum(lengths)


@pytest.mark.parametrize("bins", [[[0], [1], [2]], [[2, 0], [1]], [[1, 2, 0]]])
def test_every_learned_token_is_predicted_from_the_place_before_it_in_its_own_sequence(bins):
    some = rows([6, 4, 3], seed=2)
    packed = pack(some, bins, pad_id=0)
    expected = sorted(
        (index, row.ids[t], t)
        for index, row in enumerate(some)
        for t in range(1, len(row.ids))
        if row.counts[t]
    )
    found = []
    wanted = (packed.rows_S, packed.columns_S, packed.targets_S, packed.owners_S)
    for n, c, target, owner in zip(*(x.tolist() for x in wanted), strict=True):
        segment = int(packed.segments_NT[n, c])
        assert segment >= 2
        t = int(packed.positions_NT[n, c]) + 1
        own = packed.ids_NT[n][packed.segments_NT[n] == segment].tolist()
        assert own == some[owner].ids
        assert own[t] == target
        found.append((owner, target, t))
    assert sorted(found) == expected
    assert len(expected) > 3
    assert int((packed.segments_NT > 0).sum()) == 13
    assert bool((packed.ids_NT[packed.segments_NT == 0] == 0).all())


def test_sequences_without_anything_to_learn_have_no_targets():
    packed = pack([Row([5, 6], [True, False])], [[0]], pad_id=0)  # the first token has nothing before it
    assert packed.targets_S.tolist() == []
    assert packed.rows_S.shape == packed.owners_S.shape == (0,)


@pytest.mark.parametrize(
    ("packed", "separate", "dtype", "warns"),
    [
        ([1.0, 20.0], [1.0, 20.01], torch.float32, False),  # a thousandth of the length is allowed
        ([1.0, 20.0], [1.0, 20.03], torch.float32, True),
        ([1.0, 2.0], [1.0, 2.2], torch.bfloat16, False),
        ([1.0, 2.0], [1.0, 2.5], torch.bfloat16, True),
        ([[1e-3, 0.0], [1.0, 0.0]], [[2e-3, 0.0], [1.0, 0.0]], torch.float32, True),  # each for itself
        ([0.0, float("nan")], [0.0, 0.0], torch.float32, True),
    ],
)
def test_packing_is_refused_where_it_changes_the_outputs(packed, separate, dtype, warns):
    warning = compare_packing(lambda share: torch.tensor(packed if share else separate), peft_model(dtype))
    assert (warning is not None) == warns
    assert not warns or warning.startswith("packed rows give other outputs with this architecture (by ")


def test_an_architecture_that_refuses_the_mask_is_not_packed():
    def refuses(share):
        raise ValueError("a mask has two dimensions\nand no more")

    start = "this architecture does not take packed rows (a mask has two dimensions):"
    assert compare_packing(refuses, peft_model(torch.float32)).startswith(start)
