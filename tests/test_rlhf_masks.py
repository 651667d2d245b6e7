import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.models.masks import (
    action_mask,
    append_token,
    ended,
    last_true_index,
    left_pad,
    masked_mean,
    masked_sum,
    masked_whiten,
    positions_from_mask,
    right_pad,
)

ROWS = st.lists(st.lists(st.integers(0, 5), max_size=6), min_size=1, max_size=5)


@given(rows=ROWS, pad_id=st.integers(0, 5))
def test_padding_is_undone_by_its_mask_even_when_the_pad_id_is_content(rows, pad_id):
    for pad, edge in ((left_pad, -1), (right_pad, 0)):
        ids_BT, mask_BT = pad(rows, pad_id)
        assert ids_BT.dtype == torch.long
        assert mask_BT.dtype == torch.bool
        assert [ids[mask].tolist() for ids, mask in zip(ids_BT, mask_BT, strict=True)] == rows
        assert (ids_BT[~mask_BT] == pad_id).all()
        for row, mask in zip(rows, mask_BT, strict=True):
            assert not row or bool(mask[edge])


@given(rows=ROWS)
def test_positions_count_from_zero_on_either_side_of_the_padding(rows):
    for pad in (left_pad, right_pad):
        _, mask_BT = pad(rows, 0)
        positions_BT = positions_from_mask(mask_BT)
        for row, positions, mask in zip(rows, positions_BT, mask_BT, strict=True):
            assert positions[mask].tolist() == list(range(len(row)))
            assert (positions[~mask] == 0).all()


@given(rows=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=5))
def test_the_last_true_index_is_that_of_a_search_from_the_right_or_an_error(rows):
    mask_BT = torch.tensor(rows)
    if all(any(row) for row in rows):
        expected = [max(i for i, counts in enumerate(row) if counts) for row in rows]
        assert last_true_index(mask_BT).tolist() == expected
    else:
        with pytest.raises(ValueError, match="no counted token"):
            last_true_index(mask_BT)


@given(rows=st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), min_size=1, max_size=5))
def test_a_token_is_appended_behind_the_last_real_one_on_either_side_of_the_padding(rows):
    for pad in (left_pad, right_pad):
        ids_BT, mask_BT = pad(rows, 8)
        before = ids_BT.clone(), mask_BT.clone()
        longer_ids, longer_mask = append_token(ids_BT, mask_BT, 9)
        assert longer_ids.shape == longer_mask.shape == (len(rows), ids_BT.shape[1] + 1)
        found = [ids[mask].tolist() for ids, mask in zip(longer_ids, longer_mask, strict=True)]
        assert found == [[*row, 9] for row in rows]
        assert (longer_ids[~longer_mask] == 8).all()
        assert torch.equal(ids_BT, before[0])
        assert torch.equal(mask_BT, before[1])


def test_a_token_is_appended_between_the_padding_of_both_sides_and_never_to_nothing():
    ids_BT = torch.tensor([[8, 5, 6, 8], [8, 8, 5, 6]])
    mask_BT = ids_BT != 8
    ids, mask = append_token(ids_BT, mask_BT, 9)
    assert ids.tolist() == [[8, 5, 6, 9, 8], [8, 8, 5, 6, 9]]
    assert torch.equal(mask, ids != 8)
    with pytest.raises(ValueError, match="no counted token"):
        append_token(ids_BT, torch.zeros_like(mask_BT), 9)


@given(
    rows=st.lists(st.lists(st.integers(0, 4), min_size=5, max_size=5), min_size=1, max_size=5),
    eos_ids=st.lists(st.integers(0, 4), min_size=1, max_size=3),
)
def test_actions_run_up_to_and_including_the_first_eos(rows, eos_ids):
    response_BT = torch.tensor(rows)
    mask_BT = action_mask(response_BT, eos_ids)
    for row, mask, has_ended in zip(rows, mask_BT.tolist(), ended(response_BT, eos_ids), strict=True):
        places = [i for i, token in enumerate(row) if token in eos_ids]
        actions = places[0] + 1 if places else len(row)
        assert mask == [True] * actions + [False] * (len(row) - actions)
        assert bool(has_ended) == bool(places)


def test_an_eos_as_first_token_is_one_action_and_a_pad_equal_to_eos_adds_none():
    response_BT = torch.tensor([[2, 2, 2], [5, 2, 2], [5, 6, 7]])
    assert action_mask(response_BT, 2).sum(dim=-1).tolist() == [1, 2, 3]
    assert ended(response_BT, 2).tolist() == [True, True, False]


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), offset=st.sampled_from([0.0, 1000.0]))
def test_masked_sums_and_means_are_those_of_the_selected_entries_whatever_stands_elsewhere(seed, offset):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 6, generator=generator) + offset
    mask = torch.rand(4, 6, generator=generator) < 0.5
    mask[0, 0] = True
    chosen = x[mask].double()
    x[~mask] = float("nan")
    torch.testing.assert_close(masked_sum(x, mask).double(), chosen.sum(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(masked_mean(x, mask).double(), chosen.mean(), rtol=1e-5, atol=1e-5)
    for row, got_mean in enumerate(masked_mean(x, mask, dim=-1)):
        values = x[row][mask[row]]
        torch.testing.assert_close(
            got_mean, values.mean() if len(values) else torch.tensor(0.0), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("function", [masked_sum, masked_mean])
def test_what_stands_behind_the_mask_reaches_no_gradient(function):
    x = torch.tensor([1.0, 2.0, float("nan")], requires_grad=True)
    function(x, torch.tensor([True, True, False])).backward()
    assert x.grad[:2].isfinite().all()
    assert x.grad[2] == 0


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_equals_torch_on_the_selected_entries(shift_mean):
    generator = torch.Generator().manual_seed(1)
    x_BT = 3 * torch.randn(4, 7, generator=generator) + 5
    mask_BT = torch.rand(4, 7, generator=generator) < 0.7
    chosen = x_BT[mask_BT]
    expected = (chosen - chosen.mean()) / (torch.var(chosen, correction=0) + 1e-8).sqrt()
    x_BT[~mask_BT] = float("nan")
    white_BT = masked_whiten(x_BT, mask_BT, shift_mean=shift_mean)
    assert (white_BT[~mask_BT] == 0).all()
    mean = 0.0 if shift_mean else float(chosen.mean())
    torch.testing.assert_close(white_BT[mask_BT], expected + mean)
    assert float(white_BT[mask_BT].mean()) == pytest.approx(mean, abs=1e-5)
    assert float(white_BT[mask_BT].var(correction=0)) == pytest.approx(1, rel=1e-5)


def test_whitening_sends_no_gradient_behind_the_mask():
    x_BT = torch.tensor([[1.0, 2.0, float("nan")]], requires_grad=True)
    white_BT = masked_whiten(x_BT, torch.tensor([[True, True, False]]), shift_mean=False)
    white_BT.square().sum().backward()
    assert x_BT.grad.isfinite().all()
    assert float(x_BT.grad[0, 2]) == 0


def test_whitening_equal_entries_gives_zeros_not_nan():
    white_BT = masked_whiten(torch.full((2, 3), 4.0), torch.ones(2, 3, dtype=torch.bool), shift_mean=True)
    assert (white_BT == 0).all()


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_shards_with_a_global_sum_equals_whitening_the_whole(shift_mean):
    generator = torch.Generator().manual_seed(2)
    x_BT = torch.randn(6, 5, generator=generator) + 100
    mask_BT = torch.rand(6, 5, generator=generator) < 0.6
    mask_BT[4:] = False  # the last rank has nothing that counts
    shards = [slice(0, 1), slice(1, 4), slice(4, 6)]

    # Play each collective over all ranks: record what every rank sends, then answer with the sum.
    answers: list[torch.Tensor] = []
    for call in range(2):
        sent = []
        for shard in shards:
            asked = []

            def reduce(tensor, asked=asked):
                asked.append(tensor)
                return answers[len(asked) - 1] if len(asked) <= len(answers) else tensor

            masked_whiten(x_BT[shard], mask_BT[shard], shift_mean=shift_mean, all_reduce=reduce)
            sent.append(asked[call])
        answers.append(torch.stack(sent).sum(dim=0))

    pieces = []
    for shard in shards:
        replies = iter(answers)
        pieces.append(
            masked_whiten(
                x_BT[shard],
                mask_BT[shard],
                shift_mean=shift_mean,
                all_reduce=lambda _, replies=replies: next(replies),
            )
        )
    torch.testing.assert_close(torch.cat(pieces), masked_whiten(x_BT, mask_BT, shift_mean=shift_mean))
