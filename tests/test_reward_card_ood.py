"""Distances, exposure and areas under the ROC curve against closed forms, loops and numpy."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_recipe
from hypothesis import given
from hypothesis import strategies as st

import reward.card.ood
from reward.card.__main__ import _out_of_distribution
from reward.card.ood import (
    EXPOSURE_PENALTY,
    LEAST_SHRINKAGE,
    activations,
    auroc,
    fit_gaussian,
    mahalanobis,
    outlier_exposure,
    report,
    simplified_relative_mahalanobis,
)
from reward.card.scorers import load_scorer
from rlhf.data.comparisons import Counts
from rlhf.data.prompts import read_prompts
from rlhf.data.readers.native import read_native
from rlhf.errors import UserError
from rlhf.models.tiny import tiny_model
from rlhf.stats.intervals import Z95, Estimate

STRANGE = f"{ROOT}/recipes/prompts/sentiment_held_out.jsonl"
DISTANCES = (mahalanobis, simplified_relative_mahalanobis)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def paired(seed, rows, correlation):
    """Four units of variance 1: the first two correlated, and so the last two."""
    z = normal(seed, rows, 4)
    other = correlation * z[:, :2] + math.sqrt(1 - correlation**2) * z[:, 2:]
    return torch.stack([z[:, 0], other[:, 0], z[:, 1], other[:, 1]], dim=1)


# ---- area under the ROC curve


@given(
    inside=st.lists(st.integers(0, 6), min_size=2, max_size=8),
    outside=st.lists(st.integers(0, 6), min_size=2, max_size=8),
)
def test_the_area_and_its_error_are_those_of_all_pairs(inside, outside):
    wins = np.array([[1.0 if o > i else 0.5 if o == i else 0.0 for i in inside] for o in outside])
    found = auroc(inside, outside)
    assert found.mean == pytest.approx(wins.mean())
    assert found.n == len(inside) + len(outside)
    if 0 < wins.mean() < 1:
        by_outlier, by_inlier = wins.mean(axis=1), wins.mean(axis=0)
        error = math.sqrt(np.var(by_outlier, ddof=1) / len(outside) + np.var(by_inlier, ddof=1) / len(inside))
        assert found.low == pytest.approx(max(0.0, wins.mean() - Z95 * error))
        assert found.high == pytest.approx(min(1.0, wins.mean() + Z95 * error))


def test_the_interval_holds_the_closed_form_19_times_in_20():
    # N(0, 1) against N(1, 1): Phi(1 / sqrt 2)
    truth = 0.5 * (1 + math.erf(0.5))
    rng = np.random.default_rng(0)
    runs = [auroc(rng.normal(size=60), rng.normal(loc=1, size=40)) for _ in range(600)]
    assert np.mean([run.mean for run in runs]) == pytest.approx(truth, abs=0.006)
    assert 0.92 < np.mean([run.low <= truth <= run.high for run in runs]) < 0.98


@pytest.mark.parametrize("side", [1, -1])
def test_a_perfect_separation_is_not_certain(side):
    found = auroc(np.arange(30) * side, (np.arange(20) + 100) * side)
    wilson = 1 / (1 + Z95**2 / 20)  # of 20 successes in 20 trials, the smaller side
    expected = Estimate(1.0, wilson, 1.0, 50) if side == 1 else Estimate(0.0, 1 - wilson, 0.0, 50)
    assert found.mean == expected.mean
    assert sorted([found.low, found.high]) == pytest.approx(
        sorted([expected.low, 1.0] if side == 1 else [0.0, expected.low])
    )


def test_too_few_scores_are_a_result_and_a_nan_is_an_error():
    for few in (auroc([], [1.0]), auroc([1.0], [])):
        assert math.isnan(few.mean)
    one = auroc([1.0], [1.0, 2.0])
    assert (one.mean, one.n) == (0.75, 3)
    assert math.isnan(one.low)
    assert auroc([1.0], [2.0]).low > 0
    assert auroc([3.0] * 4, [3.0] * 5).mean == 0.5
    for wrong in ([1.0, math.nan], [math.nan]):
        with pytest.raises(ValueError, match="not a number"):
            auroc(wrong, [1.0, 2.0])
        with pytest.raises(ValueError, match="not a number"):
            auroc([1.0, 2.0], wrong)


# ---- distances


def test_without_shrinkage_the_distances_are_those_of_numpy():
    x, y = (normal(1, 50, 4) @ normal(2, 4, 4) + 3).numpy(), normal(3, 9, 4).numpy() * 4
    covariance = np.cov(x.T, bias=True)
    inverse, mean = np.linalg.inv(covariance), x.mean(axis=0)
    gaussian = fit_gaussian(torch.from_numpy(x), shrinkage=0.0)
    full = [float((row - mean) @ inverse @ (row - mean)) for row in y]
    diagonal = [sum((row[d] - mean[d]) ** 2 / covariance[d, d] for d in range(4)) for row in y]
    assert mahalanobis(torch.from_numpy(y), gaussian).tolist() == pytest.approx(full)
    relative = simplified_relative_mahalanobis(torch.from_numpy(y), gaussian)
    assert relative.tolist() == pytest.approx([f - d for f, d in zip(full, diagonal, strict=True)])
    assert min(full) > 0.1
    half = torch.from_numpy(x).bfloat16()  # fitted in double
    distances = [mahalanobis(rows, fit_gaussian(rows)) for rows in (half, half.double())]
    assert torch.equal(*distances)


def test_shrinkage_moves_correlations_and_leaves_variances():
    x = normal(4, 40, 3) @ normal(5, 3, 3)
    covariance = torch.from_numpy(np.cov(x.T.numpy(), bias=True))
    for share in (0.0, 0.3, 1.0):
        gaussian = fit_gaussian(x, shrinkage=share)
        expected = (1 - share) * covariance + share * torch.diag(covariance.diag())
        torch.testing.assert_close(gaussian.factor_DD @ gaussian.factor_DD.T, expected)
        torch.testing.assert_close(gaussian.variance_D, covariance.diag())
    far = normal(6, 5, 3)
    torch.testing.assert_close(
        simplified_relative_mahalanobis(far, fit_gaussian(x, 1.0)), torch.zeros(5).double(), atol=1e-9, rtol=0
    )


def test_the_estimated_shrinkage_is_that_of_a_loop_over_pairs_of_units():
    x = (normal(7, 12, 5) @ normal(8, 5, 5)).numpy()
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    above = below = 0.0
    for i in range(5):
        for j in range(5):
            if i != j:
                products = z[:, i] * z[:, j]
                above += products.var(ddof=1) / 12  # of their mean, which is the correlation
                below += products.mean() ** 2
    found = fit_gaussian(torch.from_numpy(x)).shrinkage
    assert found == pytest.approx(above / below)
    assert 0.05 < found < 0.95


def test_the_shrinkage_is_large_where_correlations_are_noise_and_small_where_they_are_seen():
    assert fit_gaussian(normal(9, 30, 60)).shrinkage > 0.9
    assert fit_gaussian(paired(10, 20000, 0.9)).shrinkage == LEAST_SHRINKAGE
    assert fit_gaussian(normal(11, 30, 1)).shrinkage == 1.0  # one unit has no correlation


@pytest.mark.parametrize("rows", [2, 5, 30])
def test_fewer_rows_than_units_give_finite_distances_that_do_not_depend_on_scales(rows):
    x, y = normal(12, rows, 40), normal(13, 20, 40)
    x[:, 3] = 1.0  # a dead unit
    y[:, 3] = 1.0
    scales = 10 ** torch.linspace(-2, 2, 40).double()
    scales[3] = 1.0
    scaled = fit_gaussian(x * scales + 5)
    for distance in DISTANCES:
        plain = distance(y, fit_gaussian(x))
        assert plain.isfinite().all()
        torch.testing.assert_close(distance(y * scales + 5, scaled), plain, rtol=1e-6, atol=1e-6)
    assert bool((mahalanobis(y, fit_gaussian(x)) > 0).all())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.full((7, 3), 0.1).double(), "all 7 rows are the same"),
        (torch.zeros(1, 3), "1 row"),
        (torch.tensor([[1.0, math.nan], [0, 1]]), "not finite"),
    ],
)
def test_rows_that_have_no_covariance_are_an_error(rows, message):
    with pytest.raises(ValueError, match=message):
        fit_gaussian(rows)


def test_a_turned_correlation_is_told_with_the_areas_of_the_closed_forms():
    # Correlation r against -r in two pairs of units, k = (1 + r) / (1 - r), E exponential:
    # full distance E + E' against k E + E' / k; relative E - E' against k E - E' / k
    r = 0.5
    k = (1 + r) / (1 - r)
    full = (k / (1 + 1 / k) ** 2 - 1 / k / (1 + k) ** 2) / (k - 1 / k)
    relative = (k / ((1 + 1 / k) * (1 + 1 / k**2)) - 1 / (2 * (1 + 1 / k))) / (k - 1)
    gaussian = fit_gaussian(paired(18, 20000, r))
    inside, outside = paired(19, 4000, r), paired(20, 4000, -r)
    areas = [auroc(d(inside, gaussian), d(outside, gaussian)).mean for d in DISTANCES]
    assert areas == pytest.approx([full, relative], abs=0.02)
    assert (full, relative) == (pytest.approx(0.625), pytest.approx(0.825))


# ---- exposure


@pytest.mark.parametrize(("rows", "outliers", "copies"), [(11, 3, 3), (4, 6, 1), (8, 1, 8)])
def test_the_classifier_is_the_optimum_of_the_documented_loss(rows, outliers, copies):
    inside, outside = (
        normal(21, rows, 3) * torch.tensor([1.0, 5.0, 0.1]).double() + 2,
        normal(22, outliers, 3) + 4,
    )
    score = outlier_exposure(inside, outside)
    mean, spread = inside.mean(0), inside.std(0, correction=0)
    bias = score(mean[None])  # it is linear: read its weights off
    weights = score(mean + torch.diag(spread)) - bias
    z = (torch.cat([inside, *[outside] * copies]) - mean) / spread
    target = torch.tensor([0.0] * rows + [1.0] * outliers * copies).double()
    error = torch.sigmoid(z @ weights + bias) - target  # derivative of the cross-entropy
    gradient = (z * error[:, None]).mean(0) + 2 * EXPOSURE_PENALTY * weights
    assert gradient.tolist() == pytest.approx([0.0] * 3, abs=1e-5)
    assert float(error.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(weights.abs().max()) > 0.1


def test_ten_outliers_show_a_direction_that_distances_cannot_find():
    inside, outside = normal(23, 400, 40), normal(24, 410, 40)
    outside[:, 5] = 0.3 * outside[:, 5] + 1.5  # closer together, and well inside the spread of all units
    found = report(inside, outside, exposure=10, seed=0)
    assert found["outlier_exposure"]["ci95"][0] > found["mahalanobis"]["ci95"][1]
    assert found["outlier_exposure"]["mean"] > 0.75
    with pytest.raises(ValueError, match="no outlier"):
        outlier_exposure(inside, outside[:0])


# ---- the report


def test_nothing_is_fitted_on_what_is_judged():
    # the same distribution, fewer rows than units: a fit on the judged rows would see outliers everywhere
    found = [report(normal(s, 40, 80), normal(s + 100, 40, 80), exposure=10, seed=s) for s in range(8)]
    for name in ("mahalanobis", "simplified_relative_mahalanobis", "outlier_exposure"):
        assert np.mean([f[name]["mean"] for f in found]) == pytest.approx(0.5, abs=0.07), name


def test_every_row_goes_into_one_part_and_the_draw_is_the_seeds(monkeypatch):
    parts = {}

    def noting(name, real):
        def call(*tensors):
            parts.setdefault(name, []).extend(
                t[:, 0].tolist() for t in tensors if isinstance(t, torch.Tensor)
            )
            return real(*tensors)

        monkeypatch.setattr(reward.card.ood, name, call)

    for name in ("fit_gaussian", "outlier_exposure", "mahalanobis"):
        noting(name, getattr(reward.card.ood, name))
    inside, outside = normal(25, 21, 3), normal(26, 12, 3)
    found = report(inside, outside, exposure=4, seed=3)
    (fitted,), (also_fitted, exposed) = parts["fit_gaussian"], parts["outlier_exposure"]
    judged, unseen = parts["mahalanobis"][:2]
    assert fitted == also_fitted
    assert sorted(fitted + judged) == sorted(inside[:, 0].tolist())
    assert sorted(exposed + unseen) == sorted(outside[:, 0].tolist())
    sizes = {name: found[name] for name in ("fitted_on", "inside", "outside", "exposed")}
    assert sizes == {"fitted_on": 10, "inside": 11, "outside": 8, "exposed": 4}
    assert (len(fitted), len(judged), len(exposed), len(unseen)) == (10, 11, 4, 8)
    assert fitted != inside[:10, 0].tolist()  # drawn, as files may be sorted
    assert exposed != outside[:4, 0].tolist()
    assert report(inside, outside, exposure=4, seed=3) == found
    other = report(inside, outside, exposure=4, seed=4)
    assert sorted(parts["fit_gaussian"][-1]) != sorted(fitted)
    assert sorted(parts["outlier_exposure"][-1]) != sorted(exposed)
    assert other != found
    json.dumps(found, allow_nan=False)


def test_without_exposure_nothing_is_shown_and_all_outliers_are_judged():
    found = report(normal(27, 20, 3), normal(28, 9, 3) * 5, seed=0)
    assert "outlier_exposure" not in found
    assert (found["outside"], found["exposed"]) == (9, 0)
    assert found["mahalanobis"]["n"] == 10 + 9
    assert found["mahalanobis"]["mean"] > 0.8


@pytest.mark.parametrize(
    ("inside", "outside", "exposure", "message"),
    [
        (normal(29, 3, 2), 9, 0, "3 prompts of the run's own are too few"),
        (normal(29, 9, 2), 9, 8, "of 9 outliers card.exposure takes 8"),
        (normal(29, 9, 2), 1, 0, "of 1 outliers card.exposure takes 0"),
        (torch.ones(9, 2), 9, 0, r"card\.outlier_layer: all 4 rows are the same; choose another layer"),
    ],
)
def test_what_cannot_be_judged_is_an_error_with_a_remedy(inside, outside, exposure, message):
    with pytest.raises(UserError, match=message):
        report(inside, normal(30, outside, 2), exposure=exposure, seed=0)


# ---- activations


@pytest.mark.parametrize("layer", [0, 1, 2, 3, -1, -4])
def test_activations_are_the_last_tokens_states_of_each_prompt_alone(layer, monkeypatch):
    model = tiny_model(259).eval()
    rows = [[5, 6, 7, 8, 9], [10], [11, 12], [13, 14, 15, 16, 17, 18], [19, 20]]
    monkeypatch.setattr(reward.card.ood, "TOKENS_AT_ONCE", 8)
    found = activations(model.get_decoder(), rows, 0, layer)
    assert found.shape == (5, 32)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    for row, vector in zip(rows, found, strict=True):
        with torch.no_grad():
            states = model(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states
        torch.testing.assert_close(vector, states[layer][0, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", [4, -5])
def test_a_layer_that_is_not_there_is_an_error_that_says_which_are(layer):
    with pytest.raises(UserError, match=rf"no layer {layer}; use 0 \(the embeddings\) to 3, or -1"):
        activations(tiny_model(259).get_decoder(), [[5, 6]], 0, layer)


# ---- as the card asks for it


@pytest.fixture
def judged(road, monkeypatch):
    monkeypatch.chdir(road)
    recipe = tiny_recipe(f"card.outliers={STRANGE}", "card.exposure=3", "card.outlier_layer=2")
    return (
        recipe,
        load_scorer("runs/tiny/reward/model", recipe),
        read_native("runs/tiny/comparisons/train.jsonl", "stop", Counts()),
    )


def test_foreign_prompts_are_told_from_the_prompts_of_the_comparisons(judged):
    recipe, scorer, comparisons = judged
    found = _out_of_distribution(recipe, scorer, [*comparisons, comparisons[0]])
    strange, _ = read_prompts([STRANGE], on_bad_rows="stop", key="card.outliers")
    own = [c.prompt for c in comparisons]
    inside, outside = scorer.activations(own, 2), scorer.activations(strange, 2)
    assert found == {"layer": 2, **report(inside, outside, exposure=3, seed=recipe.seed)}
    assert found["outside"] == len(strange) - 3


def test_a_prompt_of_the_comparisons_is_no_outlier(judged, tmp_path):
    _, scorer, comparisons = judged
    file = tmp_path / "mixed.txt"
    lines = [c.prompt[-1].content for c in comparisons[:2]] + ["one", "two", "three", "four", "five", "six"]
    file.write_text("\n".join(lines) + "\n")
    mixed = tiny_recipe(f"card.outliers={file}", "card.outlier_layer=2")
    assert _out_of_distribution(mixed, scorer, comparisons)["outside"] == 6


def test_activations_are_those_of_the_reward_adapter_at_the_last_token(judged):
    _, scorer, comparisons = judged
    prompt = comparisons[0].prompt
    ids = torch.tensor([scorer.model.dialogue.encode_prompt(prompt)])
    decoder = scorer.model.model.base_model.model.base_model
    with torch.no_grad():
        states = decoder(input_ids=ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(scorer.activations([prompt], -1)[0], states[-1][0, -1])


def test_without_outliers_nothing_is_looked_at(judged):
    recipe, scorer, comparisons = judged
    assert _out_of_distribution(tiny_recipe(), scorer, comparisons) is None
    with pytest.raises(UserError, match="only a reward model of this project"):
        _out_of_distribution(recipe, object(), comparisons)
