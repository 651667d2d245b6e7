import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, softplus

from studies.engine.ladder import matrix_weights
from studies.engine.training import Schedule, index_stream
from studies.preference import data, losses
from studies.preference.model import count, make_rung

WORLD = data.make_world(np.random.default_rng(5))


def rng(*seed):
    return np.random.default_rng(seed or 0)


def words_of(ids):
    return [t - data.FIRST_WORD for t in ids if t >= data.FIRST_WORD]


def fillers_of(ids):
    return [t - data.FIRST_FILLER for t in ids if data.FIRST_FILLER <= t < data.FIRST_WORD]


# the grammar


def test_the_quality_is_the_number_of_words_that_fit_the_topic():
    text = data.corpus(WORLD, 300, rng(1))
    for ids, mask, topic, fillers, quality in zip(
        text.ids_NT, text.mask_NT, text.topic_N, text.fillers_N, text.quality_N, strict=True
    ):
        tokens = ids[mask].tolist()
        assert tokens[:2] == [data.START, data.FIRST_TOPIC + topic]
        assert tokens[-1] == data.END
        assert set(ids[~mask]) <= {data.PAD}
        assert len(words_of(tokens)) == data.SLOTS
        assert len(fillers_of(tokens)) == fillers == len(tokens) - 3 - data.SLOTS
        assert sum(WORLD.fits[topic, w] for w in words_of(tokens)) == quality
    assert data.VOCABULARY <= 64
    assert data.WIDTH <= 24


def test_half_of_the_words_fit_each_topic():
    assert (WORLD.fits.sum(axis=1) == data.WORDS // 2).all()
    assert pytest.approx(1.0) == WORLD.frequency.sum()


@pytest.mark.parametrize("part", ["train", "held_out"])
def test_the_quality_has_its_prior_in_both_parts(part):
    n = 8000
    text = data.sample(WORLD, rng(2).integers(data.TOPICS, size=n), rng(3), part=part)
    share = np.bincount(text.quality_N, minlength=8) / n
    expected = np.arange(1, 9) / 36
    assert (np.abs(share - expected) < 4 * np.sqrt(expected / n)).all()
    assert (data.part_of(text.ids_NT) == part).all()


def test_training_and_held_out_sentences_are_disjoint():
    trained = {tuple(x) for x in data.corpus(WORLD, 4000, rng(4)).ids_NT}
    held_out = data.ranked_pairs(WORLD, 500, rng(4), part="held_out")
    assert not trained & {tuple(x) for x in [*held_out.good.ids_NT, *held_out.bad.ids_NT]}
    share = np.mean(data.part_of(rng(5).integers(0, 50, size=(5000, 13))) == "held_out")
    assert abs(share - 1 / 5) < 4 * math.sqrt(0.16 / 5000)


def test_the_log_probability_equals_a_count_by_hand():
    text = data.corpus(WORLD, 50, rng(6))
    for ids, topic, quality, log_p in zip(
        text.ids_NT, text.topic_N, text.quality_N, text.log_p_N, strict=True
    ):
        p = (quality + 1) / 36 / math.comb(7, quality)
        fits = WORLD.fits[topic]
        for w in words_of(ids):
            p *= WORLD.frequency[w] / WORLD.frequency[fits == fits[w]].sum()
        f = len(fillers_of(ids))
        p *= 1 / 4 / math.comb(7 + f, f) / 6**f
        assert log_p == pytest.approx(math.log(p))


def test_a_ranked_pair_has_one_topic_and_its_better_sentence_in_front():
    pairs = data.ranked_pairs(WORLD, 2000, rng(7), part="train")
    assert len(pairs) == 2000
    assert (pairs.good.topic_N == pairs.bad.topic_N).all()
    assert (pairs.good.quality_N > pairs.bad.quality_N).all()
    assert set(pairs.good.quality_N) & set(pairs.bad.quality_N) >= {1, 2, 3, 4, 5, 6}
    other_way = data.ranked_pairs(WORLD, 2000, rng(7), part="train", reverse=True)
    assert (other_way.good.quality_N < other_way.bad.quality_N).all()


def test_perfect_imitation_is_the_distribution_of_the_good_sides():
    pairs = data.ranked_pairs(WORLD, 20000, rng(8), part="train")
    shares = np.bincount(pairs.good.quality_N, minlength=8) / 20000
    weight = np.exp(data.perfect_imitation(pairs.good) - pairs.good.log_p_N)
    by_quality = np.array([weight[pairs.good.quality_N == q].mean() for q in range(1, 8)])
    expected = data.QUALITY_PRIOR[1:] * by_quality
    assert np.abs(shares[1:] - expected / expected.sum()).max() < 0.015
    worst = data.sample(WORLD, np.zeros(3, dtype=int), rng(9), part="train", quality=np.zeros(3, dtype=int))
    assert (data.perfect_imitation(worst) == -np.inf).all()


def test_a_binary_pair_is_a_valid_and_a_corrupted_sentence():
    pairs = data.binary_pairs(WORLD, 1000, rng(10), part="train")
    assert set(pairs.good.quality_N) == {7}
    assert set(pairs.bad.quality_N) == {5, 6}
    assert (pairs.good.topic_N == pairs.bad.topic_N).all()


def test_the_shifted_preference_looks_at_the_last_four_words_and_the_disliked_fillers():
    pairs = data.shifted_pairs(WORLD, 300, rng(11), part="train")
    for sides in (pairs.good, pairs.bad):
        for ids, topic, score in zip(sides.ids_NT, sides.topic_N, data.shifted_score(sides), strict=True):
            fit = sum(WORLD.fits[topic, w] for w in words_of(ids)[-4:])
            assert score == fit - sum(f < 3 for f in fillers_of(ids))
    assert (data.shifted_score(pairs.good) > data.shifted_score(pairs.bad)).all()
    agree = np.mean(pairs.good.quality_N > pairs.bad.quality_N)
    assert 0.55 < agree < 0.9  # related to the source, and not the same


def test_noisy_labels_follow_the_bradley_terry_model():
    pairs = data.noisy_pairs(WORLD, 20000, rng(12), part="train", sharpness=0.7)
    gap = pairs.good.quality_N - pairs.bad.quality_N
    for size in (1, 2, 3):
        n = (np.abs(gap) == size).sum()
        right = (gap == size).sum() / n
        assert abs(right - 1 / (1 + math.exp(-0.7 * size))) < 4 * 0.5 / math.sqrt(n)
    turned = data.in_random_order(data.ranked_pairs(WORLD, 4000, rng(13), part="train"), rng(14))
    assert abs(np.mean(turned.good.quality_N > turned.bad.quality_N) - 0.5) < 0.04


def test_a_ranked_set_gives_every_comparison_once_with_bradley_terry_odds():
    text, ranks = data.ranked_sets(WORLD, 1500, 6, rng(15), part="train", sharpness=0.7)
    assert (np.sort(ranks, axis=1) == np.arange(6)).all()
    assert (text.topic_N.reshape(-1, 6) == text.topic_N.reshape(-1, 6)[:, :1]).all()
    pairs = data.pairs_of_sets(text, ranks)
    found = {(tuple(g), tuple(b)) for g, b in zip(pairs.good.ids_NT[:15], pairs.bad.ids_NT[:15], strict=True)}
    expected = {
        (tuple(text.ids_NT[i]), tuple(text.ids_NT[j]))
        for i in range(6)
        for j in range(6)
        if ranks[0, i] < ranks[0, j]
    }
    assert found == expected
    assert len(pairs) == 1500 * 15
    gap = pairs.good.quality_N - pairs.bad.quality_N
    assert abs(np.mean(gap[np.abs(gap) == 2] > 0) - 1 / (1 + math.exp(-1.4))) < 0.03


# the models and their losses


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_ladder_has_the_sizes_of_its_formula(layers):
    width = 128 * layers
    counts = count(make_rung(layers, 0))
    assert counts["matrix_weights"] == matrix_weights(layers) == 196_608 * layers**3
    layers_of_all = counts["non_embedding_parameters"]
    assert layers_of_all == counts["matrix_weights"] + 13 * width * layers + 2 * width
    embeddings = (data.VOCABULARY + data.WIDTH) * width
    assert counts["parameters"] == layers_of_all + embeddings + width + 1


def test_a_fresh_model_depends_on_its_seed_alone():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first, other = make_rung(1, 3), make_rung(1, 4)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(first.head.weight, make_rung(1, 3).head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)


@pytest.fixture(scope="module")
def model():
    return make_rung(1, 7)


def test_the_score_is_read_at_the_last_token_whatever_stands_behind_it(model):
    text = data.corpus(WORLD, 20, rng(16))
    ids, mask = torch.from_numpy(text.ids_NT), torch.from_numpy(text.mask_NT)
    scores = model.score(ids, mask)
    for row, n in enumerate(mask.sum(dim=1)):
        alone = model.score(ids[row : row + 1, :n], mask[row : row + 1, :n])
        assert alone.item() == pytest.approx(scores[row].item(), abs=1e-5)
    assert torch.allclose(model.score(torch.where(mask, ids, data.BAD), mask), scores, atol=1e-6)


def test_imitation_is_the_cross_entropy_of_the_tokens_after_the_topic(model):
    text = data.corpus(WORLD, 30, rng(17))
    items = np.array([3, 8, 21])
    ids = torch.from_numpy(text.ids_NT[items])
    logits = model.body(input_ids=ids).last_hidden_state @ model.body.wte.weight.T
    targets = torch.where(torch.from_numpy(text.mask_NT[items]), ids, -100)[:, 2:]
    expected = cross_entropy(logits[:, 1:-1].flatten(0, 1), targets.flatten(), ignore_index=-100)
    assert losses.imitation_loss(model, text, items).item() == pytest.approx(expected.item(), abs=1e-5)
    per_token = (
        losses.scores_of(model, text.take(items), losses.summed_log_prob).sum() / (targets >= 0).sum().item()
    )
    assert -per_token == pytest.approx(expected.item(), abs=1e-5)


def score_of(model, sentences, row, control=data.START):
    ids = torch.from_numpy(sentences.ids_NT[row : row + 1].copy())
    ids[0, 0] = control
    return model.score(ids, torch.from_numpy(sentences.mask_NT[row : row + 1]))[0]


def test_the_preference_losses_equal_a_loop_over_their_comparisons(model):
    pairs = data.ranked_pairs(WORLD, 10, rng(18), part="train")
    items = np.array([1, 4, 7])
    plain = [softplus(score_of(model, pairs.bad, i) - score_of(model, pairs.good, i)) for i in items]
    assert losses.preference_loss(model, pairs, items).item() == pytest.approx(
        torch.stack(plain).mean().item(), abs=1e-5
    )
    absolute = []
    for i in items:
        good_a, bad_a = (score_of(model, pairs.good, i, c) for c in (data.GOOD, data.BAD))
        good_b, bad_b = (score_of(model, pairs.bad, i, c) for c in (data.GOOD, data.BAD))
        absolute += [softplus(bad_a - good_a), softplus(good_b - bad_b)]
    expected = torch.stack(absolute).mean().item()
    assert losses.binarized_loss(model, pairs, items).item() == pytest.approx(expected, abs=1e-5)

    text, ranks = data.ranked_sets(WORLD, 4, 3, rng(19), part="train", sharpness=1.0)
    terms = [
        softplus(score_of(model, text, 3 * p + j) - score_of(model, text, 3 * p + i))
        for p in (2, 0)
        for i in range(3)
        for j in range(3)
        if ranks[p, i] < ranks[p, j]
    ]
    expected = torch.stack(terms).mean().item()
    assert losses.set_loss(model, text, ranks, np.array([2, 0])).item() == pytest.approx(expected, abs=1e-5)
    scores = losses.scores_of(model, text, losses.reward).reshape(4, 3)
    assert losses.set_losses(scores, ranks)[[2, 0]].mean() == pytest.approx(expected, abs=1e-5)


def test_every_pass_takes_every_item_once_and_the_rate_warms_up_and_falls():
    stream = index_stream(12, 4, 6, rng(20))
    assert stream.shape == (6, 4)
    assert sorted(stream[:3].ravel()) == sorted(stream[3:].ravel()) == list(range(12))
    schedule = Schedule(1.0, 100, warmup=10)
    rates = [schedule.rate(s) for s in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) < 1.0
    assert rates[55] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.55)))
    assert rates[100] == pytest.approx(0.1)
