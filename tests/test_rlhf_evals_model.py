"""Scoring: trees behind a kept prefix give what plain passes over single rows give."""

import pytest
import torch
from tiny_evaluate import (
    ARCHITECTURES,
    TOKENIZER,
    bos_tokenizer,
    ids_of,
    language_model,
    log_prob,
    random_model,
)
from transformers import AutoModelForCausalLM

from rlhf.errors import UserError
from rlhf.evals.model import LanguageModel
from rlhf.tokenization.special_tokens import special_start

PREFIX = ids_of("Below is a talk. ")
PAIRS = [
    (ids_of("one and"), ids_of(" two")),
    (ids_of("one and"), ids_of(" three or so")),
    (ids_of("one"), ids_of(" and two")),
    (ids_of("something else that is rather longer than the others"), ids_of(".")),
    (ids_of("one and"), ids_of(" two")),  # the same again
    (ids_of("q"), ids_of("x")),
]


def expected(model, prefix, pairs):
    return [log_prob(model, [*prefix, *context], continuation) for context, continuation in pairs]


def close(found, wanted, tolerance=1e-4):
    assert [s.greedy for s in found] == [greedy for _, greedy in wanted]
    assert [s.log_prob for s in found] == pytest.approx([lp for lp, _ in wanted], abs=tolerance)


@pytest.mark.parametrize("prefix", [[], PREFIX], ids=["bare", "prefix"])
@pytest.mark.parametrize("tokens", [1, 40, 2048])
def test_scores_are_those_of_plain_passes_over_single_rows(prefix, tokens):
    lm = language_model(prefix_ids=prefix, tokens_at_once=tokens)
    found = lm.score(PAIRS)
    close(found, expected(lm.model, prefix, PAIRS))
    assert [s.tokens for s in found] == [len(continuation) for _, continuation in PAIRS]
    assert lm._scorer.takes_trees()
    for pair, in_batch in zip(PAIRS, found, strict=True):  # a padded batch against single rows
        assert lm.score([pair])[0].log_prob == pytest.approx(in_batch.log_prob, abs=1e-4)


def test_what_is_greedy_is_seen():
    lm = language_model()
    context = ids_of("one and")
    said = []
    for _ in range(4):
        logits = lm.model(input_ids=torch.tensor([[*context, *said]])).logits[0, -1]
        said.append(int(logits.argmax()))
    other = [*said[:3], (said[3] + 1) % len(TOKENIZER)]
    assert [s.greedy for s in lm.score([(context, said), (context, other), (context, said[:2])])] == [
        True,
        False,
        True,
    ]


@pytest.mark.parametrize("tokens", [1, 2048])
def test_a_context_may_be_empty_behind_a_prefix(tokens):
    lm = language_model(prefix_ids=PREFIX, tokens_at_once=tokens)
    pairs = [([], ids_of("two")), ([], ids_of("x")), (ids_of("one and"), ids_of(" two"))]
    close(lm.score(pairs), expected(lm.model, PREFIX, pairs))


def test_without_prefix_an_empty_context_is_bos_or_eos():
    lm = language_model()  # its tokenizer has no BOS
    assert lm.score([([], ids_of("two"))])[0].log_prob == pytest.approx(
        log_prob(lm.model, [TOKENIZER.eos_token_id], ids_of("two"))[0], abs=1e-4
    )


def counted(lm):
    """Positions that the decoder has read, call by call."""
    read = []
    hook = lm.model.get_decoder().register_forward_pre_hook(
        lambda _, __, options: read.append(options["input_ids"].numel()), with_kwargs=True
    )
    return read, hook


def test_the_prefix_is_read_once_and_an_item_costs_its_own_tokens():
    prefix = ids_of("x" * 200)
    lm = language_model(prefix_ids=prefix, tokens_at_once=64)
    lm._scorer.takes_trees()
    read, hook = counted(lm)
    pairs = [(ids_of(f"{n} a question"), ids_of(f" answer {n}")) for n in "abcdefgh"]
    lm.score(pairs)
    own = sum(len(context) + len(continuation) for context, continuation in pairs)
    assert read[0] == len(prefix) - 1
    assert own / 2 < sum(read[1:]) < 2 * own  # padding, and the last token of the prefix
    before = len(read)
    lm.score(pairs[:3])  # the states are still there
    hook.remove()
    assert max(read[before:]) < len(prefix) - 1


def test_answers_to_one_question_read_it_once():
    lm = language_model()
    lm._scorer.takes_trees()
    read, hook = counted(lm)
    question = ids_of("a long question " * 10)
    answers = [ids_of(f" {n}") for n in "abcdefgh"]
    found = lm.score([(question, answer) for answer in answers])
    hook.remove()
    assert sum(read) <= len(question) + sum(map(len, answers))
    close(found, expected(lm.model, [], [(question, answer) for answer in answers]))


# --- other architectures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("prefix", [[], PREFIX], ids=["bare", "prefix"])
def test_other_architectures_are_scored_rightly_with_trees_or_without(name, prefix, capsys):
    config, takes_trees = ARCHITECTURES[name]
    torch.manual_seed(0)
    half = name == "half precision"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if half else torch.float32)
    lm = LanguageModel(model, TOKENIZER, prefix_ids=prefix)
    found = lm.score(PAIRS)
    assert lm._scorer.takes_trees() == takes_trees
    assert ("takes no trees" in capsys.readouterr().out) != takes_trees
    wanted = expected(model, prefix, PAIRS)
    assert [s.log_prob for s in found] == pytest.approx([lp for lp, _ in wanted], abs=1.0 if half else 1e-4)


# --- tokens ----------------------------------------------------------------------------------------------


def test_what_the_tokenizer_puts_before_every_text_begins_the_prefix_once():
    tokenizer = bos_tokenizer()
    assert special_start(tokenizer) == [2]
    assert special_start(TOKENIZER) == []
    assert LanguageModel(random_model(), tokenizer).prefix_ids == [2]
    assert LanguageModel(random_model(), tokenizer, prefix_ids=[5, 6]).prefix_ids == [2, 5, 6]
    assert LanguageModel(random_model(), tokenizer, prefix_ids=[2, 5, 6]).prefix_ids == [2, 5, 6]
    lm = LanguageModel(random_model(), tokenizer)
    assert lm.encode("ab") == ids_of("ab")
    pairs = [(ids_of("a"), ids_of("b")), ([], ids_of("b"))]
    close(lm.score(pairs), expected(lm.model, [2], pairs))


def test_context_and_continuation_are_divided_as_in_lm_eval():
    class Words:
        """A tokenizer that takes a space and the word behind it as one token."""

        name_or_path, eos_token_id, bos_token_id = "words", 1, None

        def __call__(self, text, add_special_tokens=True):
            import re

            return {"input_ids": [len(w) + 10 * ord(w[-1]) for w in re.findall(r" ?\w+|\s|\W", text)]}

    lm = LanguageModel(random_model(), Words())
    ids = lambda text: Words()(text)["input_ids"]  # noqa: E731
    assert lm.encode_pair("A: ", "yes") == (ids("A:"), ids(" yes"))
    assert lm.encode_pair("A:", " yes") == (ids("A:"), ids(" yes"))
    assert lm.encode_pair("fo", "od") == (ids("fo"), [])  # one token together: nothing of its own is left
    assert lm.encode_pair("", " yes") == ([], ids(" yes"))
    assert lm.encode_pair("  ", "yes") == ([], ids("  yes"))


# --- bad input -------------------------------------------------------------------------------------------


def test_what_does_not_fit_in_the_window_is_named_and_nothing_is_cut():
    lm = language_model(window=30, prefix_ids=ids_of("x" * 10))
    fits = (ids_of("y" * 15), ids_of("z" * 6))  # the last token is not read
    lm.score([fits])
    with pytest.raises(UserError, match=r"hhh:7: 31 tokens \(10 of them the prompt's\).* window has 30"):
        lm.score([fits, (fits[0], ids_of("z" * 7))], names=["hhh:6", "hhh:7"])
    with pytest.raises(UserError, match=r"item 1: 31 tokens.* allow fewer new tokens"):
        lm.generate([ids_of("y" * 15)], max_new_tokens=6)
    with pytest.raises(UserError, match="the prompt has 30 tokens and the model's window 30"):
        language_model(window=30, prefix_ids=ids_of("x" * 30))


def test_a_continuation_without_tokens_is_named():
    with pytest.raises(UserError, match="a:3: the text to be scored has no token"):
        language_model().score([(ids_of("a"), [])], names=["a:3"])


def test_nothing_to_score_is_nothing():
    assert language_model().score([]) == []
    assert language_model().generate([], max_new_tokens=3) == []
