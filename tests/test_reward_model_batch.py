"""Comparisons as token rows: what is packed where, and how much goes in at once."""

import dataclasses

import pytest
import torch
from preference_cases import EOS, cases

from reward.model.batch import (
    as_example,
    bins_of,
    distinct,
    encode,
    encode_split,
    layout,
    micro_batches,
    pack,
    rows_of,
    width,
)
from reward.pretraining.__main__ import told_apart
from rlhf.data.comparisons import Comparison, Message
from rlhf.errors import UserError
from rlhf.models.tiny import END, START, tiny_tokenizer
from rlhf.recipe.schema import Pmp
from rlhf.tokenization.dialogue import Dialogue

PAD = 0
FORMS = ("ranked", "binarized")
SHARED = pytest.mark.parametrize("share", [True, False])
MIXED = [*cases(6, 1), *cases(2, 2, responses=(2, 2)), *cases(2, 3, responses=(5, 5))]


def dialogue(limit=4, **options):
    return Dialogue(
        tiny_tokenizer(), template="plain", max_prompt_tokens=50, max_response_tokens=limit, **options
    )


def compare(*responses, prompt="ab"):
    ranks = tuple(range(len(responses)))
    return Comparison((Message("user", prompt),), responses, ranks, "test")


def sequence(packed, b, k):
    """(ids, positions, row, columns, number) of a response's own sequence, found by its segment alone."""
    number = int(packed.mask_BK.flatten()[: b * packed.mask_BK.shape[1] + k].sum())
    row, last = int(packed.rows_B[number]), int(packed.columns_B[number])
    segments = packed.segments_NT[row].tolist()
    columns = [c for c in range(last + 1) if segments[c] in (1, segments[last])]
    return (
        packed.ids_NT[row, columns].tolist(),
        packed.positions_NT[row, columns].tolist(),
        row,
        columns,
        number,
    )


# --- encoding --------------------------------------------------------------------------------------------


def test_a_comparison_becomes_its_prompt_and_its_closed_responses():
    contract = dialogue()
    found = encode([compare("abc", "d"), compare("x", "yz", "x y", prompt="q")], contract, first=7)
    assert [e["index"] for e in found] == [7, 8]
    assert [e["prompt"] for e in found] == [contract.encode_response(p) for p in ("ab", "q")]
    assert [e["ranks"] for e in found] == [[0, 1], [0, 1, 2]]
    for example, texts in zip(found, (("abc", "d"), ("x", "yz", "x y")), strict=True):
        assert example["responses"] == [[*contract.encode_response(text), EOS] for text in texts]
        assert example["spoken"] == [len(text) + 1 for text in texts]  # one token a byte, and EOS


def test_the_eos_of_a_cut_response_was_not_said_by_its_writer():
    (found,) = encode([compare("abc", "abcd", "efghij")], dialogue(4))
    assert [len(response) for response in found["responses"]] == [4, 5, 5]
    assert found["spoken"] == [4, 4, 4]


def test_an_eos_that_a_response_spells_out_is_text():
    (found,) = encode([compare(f"ab{END}c", f"{END}ab")], dialogue(20))
    assert [row.count(EOS) for row in found["responses"]] == [1, 1]
    assert [dialogue(20).decode(row) for row in found["responses"]] == [f"ab{END}c", f"{END}ab"]
    assert found["spoken"] == [len(row) for row in found["responses"]]


def test_responses_that_are_equal_after_the_cut_are_one_and_nothing_to_tell_apart_is_left_out():
    same = compare("abcdef", "abcdxx")
    some = [
        compare("ab", "b"),
        same,
        compare("b", "abcdef", "abcdxx", "c"),
        compare("abcdef", "abcd", "abcdx"),
    ]
    found = encode(some, dialogue(4), first=3)
    assert [e["index"] for e in found] == [3, 4]
    assert [e["ranks"] for e in found] == [[0, 1], [0, 1, 2]]
    assert found[1]["responses"] == [[*dialogue().encode_response(text), EOS] for text in ("b", "abcd", "c")]
    tied = dataclasses.replace(compare("abcdef", "b", "abcdxx"), ranks=(1, 0, 0))
    assert encode([tied], dialogue(4)) == [], "what is left is a tie"
    assert len(encode(some, dialogue(6))) == 4
    lines = []
    train, held_out = encode_split(some, [same, some[0]], dialogue(4), lines.append)
    assert [e["index"] for e in (*train, *held_out)] == [0, 1, 2]
    assert lines == [
        "left out: 2 of 4 training and 1 of 2 held-out comparisons, whose responses are equal within "
        "dialogue.max_response_tokens=4"
    ]
    encode_split(some, some, dialogue(6), lines.append)
    assert len(lines) == 1
    with pytest.raises(UserError, match=r"all 1 held-out comparisons .*max_response_tokens=4: raise it"):
        encode_split(some, [same], dialogue(4), lines.append)


def test_a_control_prefix_takes_room_of_what_tells_public_comparisons_apart():
    some = [compare("abcx", "abcy"), compare("abcx", "b", "abcy")]
    ranked, binarized = (Pmp(sources=[{"files": ["x"]}], form=form, good_prefix="+") for form in FORMS)
    assert told_apart(ranked, dialogue(4), some) == some
    (left,) = told_apart(binarized, dialogue(4), some)
    assert (left.responses, left.ranks) == (("abcx", "b"), (0, 1))


def test_the_token_behind_eos_is_read_and_never_spoken():
    contract = dialogue(4, end_of_context=START)
    (found,) = encode([compare("abc", "abcdefgh")], contract)
    start = contract.end_of_context_id
    assert start not in (None, EOS)
    assert [response[-2:] for response in found["responses"]] == [[EOS, start]] * 2
    assert [len(response) for response in found["responses"]] == [5, 6]
    assert found["spoken"] == [4, 4]


def test_a_closed_sequence_can_stand_for_itself():
    example = as_example([5, 6, 1])
    assert pack([example], PAD, share=False).ids_NT.tolist() == [[5, 6, 1]]
    assert rows_of(example, False) == rows_of(example, True) == 1


# --- rows ------------------------------------------------------------------------------------------------


@SHARED
def test_each_response_finds_its_prompt_and_itself_and_counts_on_from_the_prompt(share):
    packed = pack(MIXED, PAD, share=share)
    for b, example in enumerate(MIXED):
        for k, response in enumerate(example["responses"]):
            ids, positions, *_ = sequence(packed, b, k)
            assert ids == [*example["prompt"], *response]
            assert positions == list(range(len(ids)))
            assert packed.mask_BK[b, k]
            assert packed.ranks_BK[b, k] == example["ranks"][k]
        absent = slice(len(example["responses"]), None)
        assert not packed.mask_BK[b, absent].any()


@SHARED
def test_a_row_holds_one_copy_of_the_prompt_and_nothing_else_but_padding(share):
    packed = pack(MIXED, 258, share=share)
    row = 0
    for example in MIXED:
        groups = [example["responses"]] if share else [[r] for r in example["responses"]]
        for responses in groups:
            expected = example["prompt"] + [token for response in responses for token in response]
            real = len(expected)
            assert packed.ids_NT[row, :real].tolist() == expected
            assert packed.ids_NT[row, real:].tolist() == [258] * (packed.ids_NT.shape[1] - real)
            assert (packed.segments_NT[row] > 0).tolist() == (
                torch.arange(packed.ids_NT.shape[1]) < real
            ).tolist()
            assert not packed.positions_NT[row, real:].any()
            if share:
                assert len(packed.segments_NT[row, :real].unique()) == 1 + len(responses)
            row += 1
    assert row == len(packed.ids_NT)
    assert packed.ids_NT.shape[1] == max(width(e, share) for e in MIXED)


@SHARED
@pytest.mark.parametrize("wanted", ["none", "best", "all"])
def test_each_wanted_token_is_predicted_by_the_state_before_it(share, wanted):
    packed = pack(MIXED, PAD, share=share, wanted=wanted)
    expected = []
    for b, example in enumerate(MIXED):
        for k, response in enumerate(example["responses"]):
            if wanted == "none" or (
                wanted == "best" and any(r < example["ranks"][k] for r in example["ranks"])
            ):
                continue
            *_, row, columns, number = sequence(packed, b, k)
            for t in range(example["spoken"][k]):
                state = columns[len(example["prompt"]) + t - 1]  # of the first: the prompt's last
                expected.append((row, state, response[t], number))
    wanted_4S = (packed.rows_S, packed.columns_S, packed.targets_S, packed.owners_S)
    assert list(zip(*(x.tolist() for x in wanted_4S), strict=True)) == expected
    assert bool(expected) == (wanted != "none")


def test_the_layout_counts_responses_through():
    flat_BK, ranks_BK, mask_BK = layout(MIXED)
    number = 0
    for b, example in enumerate(MIXED):
        for k in range(mask_BK.shape[1]):
            assert bool(mask_BK[b, k]) == (k < len(example["ranks"]))
            if mask_BK[b, k]:
                assert (int(flat_BK[b, k]), int(ranks_BK[b, k])) == (number, example["ranks"][k])
                number += 1
    assert number == sum(len(e["ranks"]) for e in MIXED)


def test_a_batch_moves_as_a_whole():
    assert {tensor.device.type for tensor in vars(pack(MIXED, PAD).to("meta")).values()} == {"meta"}


# --- how much at once ------------------------------------------------------------------------------------


@SHARED
@pytest.mark.parametrize("budget", [1, 60, 150, 10**6])
def test_a_micro_batch_is_within_its_budget_or_a_single_comparison(share, budget):
    batches = micro_batches(MIXED, budget, share=share)
    assert sorted(i for batch in batches for i in batch) == list(range(len(MIXED)))
    sizes = [pack([MIXED[i] for i in batch], PAD, share=share).ids_NT.numel() for batch in batches]
    assert all(size <= budget or len(batch) == 1 for size, batch in zip(sizes, batches, strict=True))
    for example in MIXED:
        rows = pack([example], PAD, share=share).ids_NT
        assert rows.shape == (rows_of(example, share), width(example, share))


def test_each_response_stands_once_behind_its_prompt():
    def example(prompt, *responses):
        return {
            "prompt": prompt,
            "responses": list(responses),
            "spoken": [1] * len(responses),
            "ranks": [0, 1],
        }

    a, b, c = [7, 1], [8, 8, 1], [9, 1]
    some = [example([5], a, b), example([5], b, c), example([6], a, b), example([5], c, a)]
    merged, places = distinct(some, 100)
    assert [(e["prompt"], e["responses"]) for e in merged] == [([5], [a, b, c]), ([6], [a, b])]
    flat = [r for e in merged for r in e["responses"]]
    assert [flat[place] for place in places] == [r for e in some for r in e["responses"]]
    cut, places = distinct(some, 6)  # a prompt's responses in as many rows as they need
    assert [e["responses"] for e in cut] == [[a, b], [c], [a, b]]
    flat = [r for e in cut for r in e["responses"]]
    assert [flat[place] for place in places] == [r for e in some for r in e["responses"]]
    alone = [example([5], a, b), example([5], c, [3, 1])]
    assert distinct(alone, 100).examples == alone  # nothing stands twice


def test_a_row_of_many_long_responses_is_cut_where_attention_would_cost_more_than_the_prompt():
    def rows(prompt, *lengths):
        example = {
            "prompt": [5] * prompt,
            "responses": [[7] * n for n in lengths],
            "ranks": [0] * len(lengths),
        }
        return bins_of(example, True), width(example, True)

    assert rows(12, 100, 200, 200) == ([[0, 1, 2]], 512)
    assert rows(12, 100, 200, 201) == ([[0, 1], [2]], 312)
    assert rows(200, 300, 300, 1) == ([[0, 2], [1]], 501)
    assert rows(12, 900, 3) == ([[0], [1]], 912)
    assert rows(12, *[100] * 16) == ([list(range(first, 16, 4)) for first in range(4)], 412)
