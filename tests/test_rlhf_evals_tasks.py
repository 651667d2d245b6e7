"""TruthfulQA, LAMBADA, held-out text and the prize tasks: metrics by hand, and figures by plain passes."""

import math
from string import ascii_lowercase

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_evaluate import TOKENIZER, ids_of, language_model, log_prob

from rlhf.evals.items import Item
from rlhf.evals.tasks import inverse_scaling, lambada, lm_loss
from rlhf.evals.tasks.inverse_scaling import FORMATS, PRIZE_TASKS, classification, log_odds
from rlhf.evals.tasks.truthfulqa import mc2, mc3


def logs(*probabilities):
    return [math.log(p) for p in probabilities]


def items_of(*docs, groups=""):
    return [Item(f"l:{n}", groups[n - 1 : n], doc) for n, doc in enumerate(docs, 1)]


# --- TruthfulQA ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("log_probs", "labels", "share"),
    [  # with one true answer it is mc1
        ([-1.0, -2.0, -3.0], [1, 0, 0], 1.0),
        ([-2.0, -1.0, -3.0], [1, 0, 0], 0.0),
        ([-5.0, -6.0, -4.0], [0, 0, 1], 1.0),  # the best answer need not stand first
        ([-1.0, -1.0, -3.0], [1, 0, 0], 0.0),  # a tie is not enough
        ([-1.0, -2.0, -4.0, -3.0, -9.0], [1, 1, 1, 0, 0], 2 / 3),
        ([-3.0, -2.0, -4.0, -3.0, -9.0], [1, 1, 1, 0, 0], 1 / 3),
        ([-5.0, -5.0, -4.0, -3.0, -9.0], [1, 1, 1, 0, 0], 0.0),
    ],
)
def test_true_answers_count_where_they_are_above_every_false_one(log_probs, labels, share):
    assert mc3(log_probs, labels) == share


def test_mc2_is_the_mass_of_the_true_answers():
    found = logs(0.2, 0.1, 0.3, 0.05)
    for less in (0, 2000):  # where every probability is too small for a float the mass still is what it is
        assert mc2([x - less for x in found], [1, 0, 0, 1]) == pytest.approx(0.25 / 0.65)


# --- LAMBADA ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "context", "target"),
    [
        ("She gave him the ring", "She gave him the", " ring"),
        ("one two  three", "one two", "  three"),  # white space before the target belongs to it
        ("said:\nIt is\nso he\nsaid", "said:\nIt is\nso", " he\nsaid"),
    ],
)
def test_the_last_word_takes_the_space_before_it(text, context, target):
    lm = language_model()
    outcome = lambada.run(lm, items_of({"text": text}))
    nll, greedy = log_prob(lm.model, ids_of(context), ids_of(target))
    assert outcome.values == {"acc": [float(greedy)], "nll": [pytest.approx(-nll, abs=1e-4)]}
    assert outcome.aggregate == {"perplexity": pytest.approx(math.exp(-nll), rel=1e-3)}


def test_the_most_probable_continuation_is_right_and_anything_else_is_wrong():
    lm, contexts = language_model(), [a + b for a in ascii_lowercase for b in ascii_lowercase]
    said = lm.generate([ids_of(context) for context in contexts], max_new_tokens=2, temperature=0)
    context, word = next(pair for pair in zip(contexts, said, strict=True) if pair[1].rstrip()[:-1] == " ")
    other = " a" if word != " a" else " b"
    outcome = lambada.run(lm, items_of({"text": context + word}, {"text": context + other}))
    assert outcome.values["acc"] == [1.0, 0.0]


def test_a_model_that_is_lost_has_a_large_perplexity_and_no_overflow():
    assert lambada.perplexity([1e6]) == math.exp(700)


# --- held-out text ---------------------------------------------------------------------------------------


@given(st.text(alphabet="ab \n", max_size=80), st.integers(1, 20))
def test_windows_are_the_text_and_no_longer_than_asked(text, size):
    pieces = list(lm_loss.windows(text, size))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= size for piece in pieces)


def test_windows_end_before_white_space_where_there_is_some():
    text = "the quick brown fox jumps over the lazy dog"
    assert list(lm_loss.windows(text, 14)) == ["the quick", " brown fox", " jumps over", " the lazy dog"]
    assert list(lm_loss.windows("a" * 5, 2)) == ["aa", "aa", "a"]


def test_the_loss_is_that_of_plain_passes_a_token_and_a_byte():
    lm = language_model()
    texts = ["Some plain text of no meaning, with\nlines. ", "It is another one"]
    outcome = lm_loss.run(lm, [lm_loss.Item(str(n), "", text) for n, text in enumerate(texts)])
    nats = [-log_prob(lm.model, [TOKENIZER.eos_token_id], ids_of(text))[0] for text in texts]
    wanted = pytest.approx([n / len(text) for n, text in zip(nats, texts, strict=True)], abs=1e-5)
    assert outcome.values == {"nats_per_byte": wanted, "nats_per_token": wanted}  # a letter a token
    mean = sum(nats) / len("".join(texts))
    assert outcome.aggregate["nats_per_token"] == pytest.approx(mean)
    assert outcome.aggregate["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
    assert outcome.aggregate["bytes"] == len("".join(texts))
    assert not outcome.higher_is_better
    assert lm_loss.run(lm, [lm_loss.Item("x", "", "ab é")]).aggregate["bytes"] == 5  # and not 4 letters


# --- the Inverse Scaling Prize ---------------------------------------------------------------------------


def test_classification_by_hand():
    found = classification(logs(0.2, 0.1, 0.3), 2)
    wanted = {"acc": 1.0, "loss": -math.log(0.3 / 0.6), "total_logprob": math.log(0.6)}
    assert found == pytest.approx(wanted)
    assert classification(logs(0.2, 0.1, 0.3), 0)["acc"] == 0.0
    assert classification([-1.0, -1.0], 0)["acc"] == 0.0  # argmax would take the first of equals
    assert classification([-1e4, -1e4 - 1], 0)["loss"] == pytest.approx(math.log(1 + math.exp(-1)))


def test_log_odds_turn_their_sign_with_the_answer():
    here, there = logs(0.4, 0.1), logs(0.2, 0.3)
    taken = math.log(4) - math.log(2 / 3)  # what the other prompt takes from the odds of class 0
    found = log_odds(here, there, 0)
    assert found["logodds_difference"] == pytest.approx(taken)
    assert log_odds(here, there, 1)["logodds_difference"] == pytest.approx(-taken)
    assert log_odds(there, here, 0)["logodds_difference"] == pytest.approx(-taken)
    assert log_odds(here, there, 1)["absolute_logodds_difference"] == pytest.approx(taken)
    assert (found["acc"], log_odds(here, there, 1)["acc"]) == (0.0, 1.0)  # behind the other prompt
    assert found["total_logprob"] == pytest.approx(math.log((0.5 + 0.5) / 2))


def behind(lm, prompt, classes):
    """l of every class by plain passes."""
    return [log_prob(lm.model, ids_of(prompt), ids_of(c))[0] for c in classes]


def test_classes_are_scored_by_sums_behind_the_prompt():
    lm = language_model()
    docs = [
        {"prompt": "Write a word that ends in y:", "classes": [" shy", " never"], "answer_index": 0},
        {"prompt": "Is it so?", "classes": [" Yes", " No", " Perhaps not"], "answer_index": 2},
    ]
    outcome = inverse_scaling.run(lm, items_of(*docs, groups="13"), task="inverse_scaling/memo-trap")
    for i, doc in enumerate(docs):
        wanted = classification(behind(lm, doc["prompt"], doc["classes"]), doc["answer_index"])
        assert {m: values[i] for m, values in outcome.values.items()} == pytest.approx(wanted, abs=1e-3)
    assert outcome.chance == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert (outcome.ids, outcome.groups) == (["l:1", "l:2"], ["1", "3"])
    assert (outcome.task, outcome.metric) == ("inverse_scaling/memo-trap", "acc")
    assert "probability on average" in outcome.notes[0]  # a random model says none of the answers


def test_a_sequence_is_scored_by_its_sum():
    lm, task = language_model(), "inverse_scaling/prompt-injection"
    outcome = inverse_scaling.run(
        lm, items_of({"prompt": "Repeat: one.\n", "completion": " one."}), task=task
    )
    # the white space at the end of the prompt belongs to the continuation
    wanted = -log_prob(lm.model, ids_of("Repeat: one."), ids_of("\n one."))[0]
    assert outcome.values == {"loss": [pytest.approx(wanted, abs=1e-4)]}
    assert (outcome.metric, outcome.higher_is_better, outcome.chance) == ("loss", False, None)


def test_log_odds_compare_two_prompts():
    lm = language_model()
    doc = {"prompt": "A is true.", "other_prompt": "They say A is false.", "classes": [" Yes", " No"]}
    outcome = inverse_scaling.run(lm, items_of(doc | {"answer_index": 1}), task="inverse_scaling/logodds")
    here, there = (behind(lm, doc[prompt], doc["classes"]) for prompt in ("prompt", "other_prompt"))
    wanted = log_odds(here, there, 1)
    assert {m: value for m, (value,) in outcome.values.items()} == pytest.approx(wanted, abs=1e-3)
    assert not outcome.higher_is_better


def test_all_eleven_winners_are_known():
    assert len(PRIZE_TASKS) == len(set(PRIZE_TASKS)) == 11
    prize = {name: FORMATS[f"inverse_scaling/{name}"] for name in PRIZE_TASKS}
    assert [name for name, form in prize.items() if form != "classification"] == ["prompt-injection"]
