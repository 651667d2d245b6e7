"""Writing behind a kept prefix: what the model would say with the whole text before it."""

import pytest
import torch
from tiny_evaluate import ARCHITECTURES, TOKENIZER, ids_of, language_model
from transformers import AutoModelForCausalLM

from rlhf.evals.model import LanguageModel
from rlhf.generation.sampling import top_p_logits, truncate

PREFIX = ids_of("Below is a talk. ")
CONTEXTS = [ids_of(text) for text in ("one", "two and three", "one", "a rather longer thing to go on with")]


@torch.no_grad()
def greedy(lm, ids, limit):
    """The most probable tokens, one plain pass a token."""
    said = []
    for _ in range(limit):
        token = int(lm.model(input_ids=torch.tensor([[*ids, *said]])).logits[0, -1].argmax())
        if token == TOKENIZER.eos_token_id:
            break
        said.append(token)
    return lm.decode(said)


@pytest.mark.parametrize("prefix", [[], PREFIX, PREFIX[:1]], ids=["bare", "prefix", "one token"])
def test_at_temperature_0_it_says_what_plain_passes_find_most_probable(prefix):
    lm = language_model(prefix_ids=prefix)
    said = lm.generate(CONTEXTS, max_new_tokens=12, temperature=0)
    assert said == [greedy(lm, [*prefix, *context], 12) for context in CONTEXTS]
    assert len(set(said)) > 1


@pytest.mark.parametrize("name", ["gpt2", "sliding window", "logits behind the head"])
def test_other_architectures_write_too(name):
    torch.manual_seed(0)
    lm = LanguageModel(AutoModelForCausalLM.from_config(ARCHITECTURES[name][0]), TOKENIZER, prefix_ids=PREFIX)
    said = lm.generate(CONTEXTS, max_new_tokens=12, temperature=0)
    assert said == [greedy(lm, [*PREFIX, *context], 12) for context in CONTEXTS]


def test_a_row_says_the_same_in_any_batch_and_equal_contexts_say_different_things():
    lm = language_model(prefix_ids=PREFIX)
    options = {"max_new_tokens": 10, "seed": 3}
    said = lm.generate(CONTEXTS, **options)
    alone = language_model(prefix_ids=PREFIX, tokens_at_once=1)  # one row at a time
    assert alone.generate(CONTEXTS, **options) == said
    assert said[0] != said[2]
    assert lm.generate(CONTEXTS, **options) == said
    assert lm.generate(CONTEXTS, max_new_tokens=10, seed=4) != said


def test_it_may_begin_with_nothing_but_the_prefix():
    lm = language_model(prefix_ids=PREFIX)
    assert lm.generate([[]], max_new_tokens=8, temperature=0) == [greedy(lm, PREFIX, 8)]
    bare = language_model()
    assert bare.generate([[]], max_new_tokens=8, temperature=0) == [greedy(bare, [1], 8)]


def test_a_stop_ends_a_row_and_is_cut_off():
    lm = language_model()
    whole = lm.generate(CONTEXTS, max_new_tokens=20, temperature=0)
    stop = whole[1][6:8]
    said = lm.generate(CONTEXTS, max_new_tokens=20, temperature=0, stop=[stop, "never said"])
    assert said == [truncate(text, [stop]) for text in whole]
    assert len(said[1]) <= 6


def test_a_stop_saves_the_passes_behind_it():
    lm = language_model()
    (whole,) = lm.generate(CONTEXTS[1:2], max_new_tokens=20, temperature=0)
    passes = []
    hook = lm.model.get_decoder().register_forward_hook(lambda *_: passes.append(1))
    lm.generate(CONTEXTS[1:2], max_new_tokens=20, temperature=0, stop=[whole[3:5]])
    hook.remove()
    assert len(passes) < 8


def test_every_end_of_the_generation_settings_ends_a_row():
    lm = language_model()
    (whole,) = lm.generate(CONTEXTS[:1], max_new_tokens=12, temperature=0)
    lm.model.generation_config.eos_token_id = [TOKENIZER.eos_token_id, *ids_of(whole[2])]
    assert lm.generate(CONTEXTS[:1], max_new_tokens=12, temperature=0) == [truncate(whole, [whole[2]])]


def test_top_p_keeps_the_smallest_set_with_the_mass():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.97, 0.01, 0.01, 0.01]]).log()
    kept = lambda p: [row.isfinite().nonzero().flatten().tolist() for row in top_p_logits(logits, p)]  # noqa: E731
    assert kept(0.5) == [[1, 3], [0]]
    assert kept(0.69) == [[1, 3], [0]]
    assert kept(0.71) == [[1, 2, 3], [0]]
    assert kept(0.95) == [[0, 1, 2, 3], [0]]
    assert kept(1e-9) == [[1], [0]]
    assert kept(1.0) == [[0, 1, 2, 3], [0, 1, 2, 3]]


def test_samples_follow_temperature_and_top_p():
    lm = language_model()
    context = CONTEXTS[0]
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([context])).logits[0, -1].float()
    n = 4000
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.6)):
        wanted = top_p_logits(logits[None] / temperature, top_p)[0].softmax(-1)
        said = lm.generate([context] * n, max_new_tokens=1, temperature=temperature, top_p=top_p)
        for token in [t for t in wanted.topk(6).indices.tolist() if t > 2][:3]:  # not the special tokens
            p = float(wanted[token])
            share = said.count(lm.decode([token])) / n
            assert abs(share - p) < 5 * (p * (1 - p) / n) ** 0.5 + 1e-9, (temperature, top_p, token)


def test_truncation_takes_the_first_stop():
    assert truncate("a\nb\ndef", ["\ndef", "\nb"]) == "a"
    assert truncate("abc", ["x"]) == "abc"
    assert truncate("abc", []) == "abc"
