import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reward.loss import Signals, candidate_scores, needs_language, objective_loss, pair_accuracy
from rlhf.recipe.reward import PreferenceTraining

# every option that is an objective's business, with another, allowed value than the default
SECTIONS = {
    "ranked": {},
    "margin": {"margin": 0.5},
    "label_smoothing": {"label_smoothing": 0.2},
    "label_noise": {"label_noise": 0.2},
    "plackett_luce": {"likelihood": "plackett_luce"},
    "binary": {"objective": "binary"},
    "centering": {"center_rewards_coef": 0.3},
    "lm_coef": {"lm_coef": 0.7},
    "imitation": {"objective": "imitation"},
    "all terms": {"margin": 0.5, "label_noise": 0.1, "center_rewards_coef": 0.3, "lm_coef": 0.7},
    "binary, all terms": {"objective": "binary", "center_rewards_coef": 0.3, "lm_coef": 0.7},
}
every_section = pytest.mark.parametrize("name", SECTIONS)


def _objective(name):
    return functools.partial(objective_loss, PreferenceTraining(**SECTIONS[name]))


def _signals(seed=0, batch=5, width=4):
    """Comparisons that all have an untied pair, with log-probabilities of all responses."""
    generator = torch.Generator().manual_seed(seed)
    scores_BK = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    lengths_BK = torch.randint(1, 9, (batch, width), generator=generator)
    log_probs_BK = -lengths_BK * (1 + torch.rand(batch, width, generator=generator, dtype=torch.float64))
    ranks_BK = torch.randint(0, 3, (batch, width), generator=generator)
    ranks_BK[:, 0], ranks_BK[:, 1] = 0, 1
    mask_BK = torch.rand(batch, width, generator=generator) < 0.7
    mask_BK[:, :2] = True
    return Signals(scores_BK, log_probs_BK, lengths_BK, ranks_BK, mask_BK)


def _softplus(x):
    return math.log(1 + math.exp(x))


# one comparison, best to worst: scores 1, 0.25, -0.5 and ranks 0, 1, 3; only the best has a log-probability
HAND = Signals(
    torch.tensor([[0.25, 1.0, -0.5, math.nan]]),
    torch.tensor([[0.0, -6.0, 0.0, math.nan]]),
    torch.tensor([[0, 4, 0, 0]]),
    torch.tensor([[1, 0, 3, 0]]),
    torch.tensor([[True, True, True, False]]),
)
PAIRS = [(1.0, 0.25, 1), (1.0, -0.5, 3), (0.25, -0.5, 2)]  # better, worse, steps of rank
RANKED = sum(_softplus(w - b) for b, w, _ in PAIRS) / 3
MARGIN = sum(_softplus(w - b + 0.5 * n) for b, w, n in PAIRS) / 3
CENTERING = sum((b + w) ** 2 for b, w, _ in PAIRS) / 3
BINARY = _softplus(-1) / 2 + (_softplus(0.25) + _softplus(-0.5)) / 4


def _noisy(share, margin=0.0):
    leads = [b - w - margin * n for b, w, n in PAIRS]
    return -sum(math.log((1 - share) / (1 + math.exp(-d)) + share / (1 + math.exp(d))) for d in leads) / 3


EXPECTED = {
    "ranked": RANKED,
    "margin": MARGIN,
    "label_smoothing": RANKED + 0.2 * sum(b - w for b, w, _ in PAIRS) / 3,
    "label_noise": _noisy(0.2),
    "plackett_luce": (math.log(math.exp(1) + math.exp(0.25) + math.exp(-0.5)) - 1 + _softplus(-0.75)) / 2,
    "binary": BINARY,
    "centering": RANKED + 0.3 * CENTERING,
    "lm_coef": RANKED + 0.7 * 6 / 4,
    "imitation": 6 / 4,
    "all terms": _noisy(0.1, margin=0.5) + 0.3 * CENTERING + 0.7 * 6 / 4,
    "binary, all terms": BINARY + 0.3 * CENTERING + 0.7 * 6 / 4,
}


@every_section
def test_every_option_changes_the_loss_as_its_closed_form_says(name):
    outcome = _objective(name)(HAND, normalizer=1)
    assert float(outcome.loss) == pytest.approx(EXPECTED[name], rel=1e-6)
    assert len({round(value, 6) for value in EXPECTED.values()}) == len(EXPECTED) == len(SECTIONS)
    halved = _objective(name)(HAND, normalizer=2.0)
    assert float(halved.loss) == pytest.approx(EXPECTED[name] / 2, rel=1e-6)


@every_section
def test_the_parts_are_the_terms_without_their_coefficients_and_without_gradient(name):
    section = SECTIONS[name]
    scores_BK, log_probs_BK = (
        HAND.scores_BK.clone().requires_grad_(),
        HAND.log_probs_BK.clone().requires_grad_(),
    )
    signals = HAND._replace(scores_BK=scores_BK, log_probs_BK=log_probs_BK)
    outcome = _objective(name)(signals, normalizer=1)
    assert not any(part.requires_grad for part in outcome.parts.values())
    expected = {} if name == "imitation" else {"preference": EXPECTED[name]}
    if "center_rewards_coef" in section:
        expected |= {"centering": CENTERING, "preference": expected["preference"] - 0.3 * CENTERING}
    if "lm_coef" in section:
        expected |= {"language": 1.5, "preference": expected["preference"] - 0.7 * 1.5}
    if name == "imitation":
        expected = {"language": 1.5}
    assert {key: float(part) for key, part in outcome.parts.items()} == pytest.approx(expected, rel=1e-5)
    outcome.loss.backward()
    weight = section.get("lm_coef", float(name == "imitation"))
    if weight:
        torch.testing.assert_close(log_probs_BK.grad, torch.tensor([[0, -weight / 4, 0, 0]]))
    else:
        assert log_probs_BK.grad is None
    assert (scores_BK.grad is None) == (name == "imitation")
    assert scores_BK.grad is None or (scores_BK.grad.isfinite().all() and scores_BK.grad[0, 3] == 0)


@every_section
def test_an_objective_says_what_it_needs_and_runs_on_that_alone(name):
    chosen = _objective(name)
    section = SECTIONS[name]
    language = name == "imitation" or "lm_coef" in section
    assert needs_language(PreferenceTraining(**section)) is language
    needed = {"scores_BK": name != "imitation", "log_probs_BK": language, "lengths_BK": language}
    least = HAND._replace(**{field: None for field, is_needed in needed.items() if not is_needed})
    assert float(chosen(least, normalizer=1).loss) == pytest.approx(EXPECTED[name], rel=1e-6)
    for field in (field for field, is_needed in needed.items() if is_needed):
        with pytest.raises(ValueError, match=f"needs {field}"):
            chosen(least._replace(**{field: None}), normalizer=1)


@every_section
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10_000))
def test_micro_batches_add_up_and_neither_order_nor_padding_matters(name, seed):
    chosen, signals = _objective(name), _signals(seed)
    whole = chosen(signals, normalizer=5)
    halves = [chosen(Signals(*(x[s] for x in signals)), normalizer=5) for s in (slice(0, 2), slice(2, 5))]
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    permuted = chosen(Signals(*(x[:, order] for x in signals)), normalizer=5)
    absent = ~signals.mask_BK
    spoilt = signals._replace(
        scores_BK=signals.scores_BK.masked_fill(absent, math.nan),
        log_probs_BK=signals.log_probs_BK.masked_fill(absent, math.nan),
        lengths_BK=signals.lengths_BK.masked_fill(absent, -1),
        ranks_BK=signals.ranks_BK.masked_fill(absent, -1),
    )
    for other in (permuted, chosen(spoilt, normalizer=5)):
        torch.testing.assert_close(other, whole)
    for field in ("loss", "correct", "pairs"):
        torch.testing.assert_close(sum(getattr(half, field) for half in halves), getattr(whole, field))
    for key, part in whole.parts.items():
        torch.testing.assert_close(sum(half.parts[key] for half in halves), part)


@every_section
def test_accuracy_is_that_of_the_candidates_whatever_the_loss(name):
    signals = _signals(3)
    outcome = _objective(name)(signals, normalizer=5)
    ranking = signals.scores_BK if name != "imitation" else signals.log_probs_BK / signals.lengths_BK
    correct_B, pairs_B = pair_accuracy(ranking, *signals[3:])
    assert (float(outcome.correct), int(outcome.pairs)) == (float(correct_B.sum()), int(pairs_B.sum()))
    by_sum = pair_accuracy(signals.log_probs_BK, *signals[3:])[0].sum()
    assert len({float(by_sum), float(outcome.correct)}) == 2  # so that the two cannot be mistaken


def test_imitation_ranks_only_the_responses_whose_log_probability_is_known():
    chosen = _objective("imitation")
    assert int(chosen(HAND, normalizer=1).pairs) == 0  # the best alone
    some = HAND._replace(
        log_probs_BK=torch.tensor([[-5.0, -6.0, math.nan, 0.0]]), lengths_BK=torch.tensor([[2, 4, 3, 5]])
    )
    outcome = chosen(some, normalizer=1)
    assert (float(outcome.correct), int(outcome.pairs)) == (1.0, 1)


def test_candidates_are_ranked_by_sum_or_by_mean_and_not_at_all_where_nothing_was_computed():
    log_probs_BK = torch.tensor([[-4.0, -6.0, 0.0, -2.5]], dtype=torch.bfloat16)
    lengths_BK = torch.tensor([[2, 6, 0, 1]])
    ranks_BK, known_BK = torch.tensor([[1, 0, 0, 2]]), torch.tensor([[True, True, False, True]])
    expected = {"sum": [-4.0, -6.0, math.nan, -2.5], "mean": [-2.0, -1.0, math.nan, -2.5]}
    accuracy = {}
    for how, values in expected.items():
        scores_BK = candidate_scores(log_probs_BK, lengths_BK, how)
        assert scores_BK.dtype == torch.float32
        torch.testing.assert_close(scores_BK, torch.tensor([values]), equal_nan=True)
        assert candidate_scores(log_probs_BK.double(), lengths_BK, how).dtype == torch.float64
        accuracy[how] = float(pair_accuracy(scores_BK, ranks_BK, known_BK)[0])
    assert accuracy == {"sum": 0.0, "mean": 3.0}
    torch.testing.assert_close(  # counts may be floats, in any shape
        candidate_scores(log_probs_BK[0], lengths_BK[0].float(), "mean")[:2], torch.tensor([-2.0, -1.0])
    )
