"""Before against after: what must be equal is equal, what differs is averaged and shown as it should be."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_evaluate import backbone_and_dialogue

from policy.evaluate.before_after import (
    EvaluatedResponses,
    compare,
    paired_jackknife,
    per_prompt,
    response_rows,
    reward_fn_of,
    sample,
    sample_and_score,
    spread,
)
from policy.evaluate.report import as_markdown
from policy.ppo.metrics import distinct_n, rollout_metrics, tokens_per_second
from rlhf.data.comparisons import Message
from rlhf.generation.sampling import uniforms
from rlhf.models.backbone import REFERENCE

PROMPTS = [(Message("user", text),) for text in ("one", "and two", "three or so", "4", "five")]
FIGURE = {"before", "after", "diff", "ci95", "n"}


def talk(role, *, stir=0.0, prompts=PROMPTS, batch_size=2, temperature=1.0, layers="top_2", seed=0,
         against=REFERENCE):  # fmt: skip
    model, dialogue = backbone_and_dialogue(stir=stir, max_response_tokens=12, layers=layers)
    reward_fns = {"gold": reward_fn_of(lambda prompts, texts: [float(len(set(t))) for t in texts])}
    return sample_and_score(model, role, dialogue, prompts, reward_fns, seed=seed, temperature=temperature,
               batch_size=batch_size, against=against)  # fmt: skip


def test_a_fresh_adapter_says_what_the_reference_says():
    before, after = talk(REFERENCE), talk("policy")
    assert after == before == talk(REFERENCE, against="policy")
    assert before.kl == before.kl_k3 == [0.0] * len(PROMPTS)
    assert len(set(before.texts)) > 1
    assert talk("policy", stir=0.2).texts != before.texts
    assert talk(REFERENCE, seed=1).texts != before.texts


@pytest.mark.parametrize("change", [{"batch_size": 5}, {"batch_size": 1}, {"layers": "all"}])
def test_what_is_measured_does_not_depend_on_the_batches(change):
    if "layers" in change:  # the reference has no adapter, so the layers of the adapter do not matter
        one, other = talk(REFERENCE), talk(REFERENCE, **change)
    else:
        one, other = talk("policy", stir=0.2), talk("policy", stir=0.2, **change)
    assert one.texts == other.texts
    assert one.length == other.length
    assert one.ended == other.ended
    assert one.scores == other.scores
    for name in ("entropy", "kl", "kl_k3"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-3), name


def test_the_drift_of_a_policy_that_moved_is_positive():
    side = talk("policy", stir=0.3, prompts=PROMPTS * 20, batch_size=100)
    assert np.mean(side.kl) > 0.5
    assert min(side.kl_k3) >= 0
    assert np.mean(side.kl_k3) == pytest.approx(np.mean(side.kl), rel=0.5)


def test_the_forward_kl_is_that_of_the_references_own_responses():
    many = PROMPTS * 20
    forward = talk(REFERENCE, stir=0.3, prompts=many, batch_size=100, against="policy")
    backward = talk("policy", stir=0.3, prompts=many, batch_size=100)
    assert forward.texts == talk(REFERENCE, prompts=many, batch_size=100).texts
    model, dialogue = backbone_and_dialogue(stir=0.3, max_response_tokens=12, layers="top_2")
    uniform_BR = uniforms(0, "evaluate", 0, range(3), 12)
    batch = sample(model, REFERENCE, dialogue, many[:3], uniform_BR, temperature=1.0)
    assert batch.responses.texts == forward.texts[:3]
    ids_BT, mask_BT = batch.responses.ids_BT, batch.responses.mask_BT
    theirs, ours = (model(r, ids_BT, mask_BT, None, start=batch.start)[0] for r in (REFERENCE, "policy"))
    assert forward.kl[:3] == pytest.approx(((theirs - ours) * batch.actions_BR).sum(-1).tolist(), abs=1e-3)
    assert np.mean(forward.kl) > 0.5
    assert np.mean(forward.kl) != pytest.approx(np.mean(backward.kl))
    figures = compare(forward, backward, samples=1)
    assert figures["forward_kl"]["mean"] == pytest.approx(np.mean(forward.kl))
    assert figures["kl"]["mean"] == pytest.approx(np.mean(backward.kl))


def test_length_and_ending_are_those_of_the_response():
    side = talk(REFERENCE, prompts=PROMPTS * 40, batch_size=200)
    for text, length, ended, score in zip(
        side.texts, side.length, side.ended, side.scores["gold"], strict=True
    ):
        assert ended in (0.0, 1.0)
        assert length == 12 or ended == 1
        assert len(text) <= length - ended  # a token is a byte, and EOS is left out
        assert score == len(set(text))
    assert 0 < sum(side.ended) < len(side.ended)


def test_a_side_against_itself_differs_by_nothing():
    side = talk("policy", stir=0.2)
    figures = compare(side, side, samples=1)
    for name in ("gold", "response_length", "eos_rate", "entropy", "distinct_1", "distinct_2"):
        assert set(figures[name]) == FIGURE, name
        unknown = name == "distinct_2" and figures[name]["before"] is None  # no text has two words
        assert figures[name]["diff"] == (None if unknown else 0), name
        assert figures[name]["ci95"] in ([0, 0], None), name
        assert figures[name]["n"] == len(PROMPTS), name
    assert figures["gold_win_rate"]["mean"] == 0.5
    assert figures["kl"]["mean"] == pytest.approx(np.mean(side.kl))
    assert figures["kl_k3"]["mean"] == pytest.approx(np.mean(side.kl_k3))


def sides(before, after):
    """Two sides with given scores; the other figures are the scores too."""
    both = (list(before), list(after))
    return [EvaluatedResponses([f"word{x}" for x in xs], {"gold": xs}, *([xs] * 5)) for xs in both]


def test_the_samples_of_a_prompt_are_averaged_before_the_interval():
    before, after = [0.0, 2.0, 1.0, 1.0, 5.0, 3.0], [2.0, 2.0, 0.0, 1.0, 4.0, 6.0]
    figures = compare(*sides(before, after), samples=2)
    changes = np.array([1.0, -0.5, 1.0])  # of the means 1, 1, 4 and 2, 0.5, 5
    half = 4.302653 * changes.std(ddof=1) / np.sqrt(3)  # Student's t, two degrees of freedom
    for name in ("gold", "response_length", "eos_rate", "entropy"):
        figure = figures[name]
        assert figure["n"] == 3
        assert [figure[k] for k in ("before", "after", "diff")] == pytest.approx([2.0, 2.5, 0.5])
        assert figure["ci95"] == pytest.approx([0.5 - half, 0.5 + half], abs=1e-5)
    assert figures["gold_win_rate"]["mean"] == pytest.approx(2 / 3)
    assert figures["gold_win_rate"]["n"] == 3
    assert figures["kl"]["n"] == 3
    assert figures["kl"]["mean"] == pytest.approx(2.5)
    assert per_prompt(before, 3).tolist() == [1.0, 3.0]


def test_before_and_after_are_not_swapped():
    figures = compare(*sides([0.0, 0.0, 1.0], [1.0, 2.0, 2.0]), samples=1)
    assert figures["gold"]["diff"] == pytest.approx(4 / 3)
    assert figures["gold_win_rate"]["mean"] == 1


def length(texts):
    return sum(map(len, texts)) / len(texts)


def test_the_paired_jackknife_covers_the_truth_and_uses_the_pairs():
    rng = np.random.default_rng(0)
    covered, widths, sets = 0, [], 60
    for _ in range(sets):
        easy = rng.integers(10, 50, size=40)  # shared by both sides: pairing takes it out
        before = ["x" * int(n) for n in easy]
        after = ["x" * int(n) for n in easy + rng.integers(0, 7, size=40)]  # 3 longer on average
        figure = paired_jackknife(before, after, length)
        assert figure["diff"] == pytest.approx(length(after) - length(before))
        low, high = figure["ci95"]
        covered += low <= 3 <= high
        widths.append(high - low)
    assert 0.85 <= covered / sets < 1
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 2 / np.sqrt(40), rel=0.1)


def test_a_figure_that_some_subsets_do_not_have_is_taken_from_the_others():
    def two_words(texts):
        return distinct_n(texts, 2)

    figure = paired_jackknife(["a b", "c", "d"], ["a b", "c", "d e"], two_words)
    assert (figure["before"], figure["after"], figure["diff"]) == (1, 1, 0)
    assert np.isfinite(figure["ci95"]).all()
    figure = paired_jackknife(["a", "c"], ["a b", "c d"], two_words)
    assert figure == {"before": None, "after": 1, "diff": None, "ci95": None, "n": 2}


def test_distinct_n_by_hand():
    assert distinct_n(["a b a b"], 1) == 2 / 4
    assert distinct_n(["a b a b"], 2) == 2 / 3
    assert distinct_n(["a b", "b a", "a b"], 2) == 2 / 3  # no bigram spans two texts
    assert distinct_n(["a", "a b c"], 3) == 1
    assert distinct_n(["same same same same"], 1) == 1 / 4
    assert np.isnan(distinct_n(["a", ""], 2))


def test_sample_pairs_are_spread_and_belong_together():
    before, after = sides(range(5), range(10, 15))
    rows = response_rows(PROMPTS, before, after)
    pairs = spread(rows, 3)
    assert [p["prompt"] for p in pairs] == ["one", "three or so", "five"]
    assert [p["before"] for p in pairs] == ["word0", "word2", "word4"]
    assert [p["after"] for p in pairs] == ["word10", "word12", "word14"]
    assert [p["scores"]["gold"] for p in pairs] == [[0, 10], [2, 12], [4, 14]]
    assert len(spread(rows, 99)) == 5
    assert spread(rows, 0) == []


@pytest.fixture
def summary(road):
    return json.loads((road / "runs/tiny/evaluate/summary.json").read_text())


def test_the_summary_has_every_figure(summary):
    for name in (
        "gold", "reward", "response_length", "eos_rate", "distinct_1", "distinct_2", "entropy",
    ):  # fmt: skip
        figure = summary[name]
        assert set(figure) == FIGURE, name
        assert figure["n"] == 24, name
        if figure["diff"] is not None:
            assert figure["diff"] == pytest.approx(figure["after"] - figure["before"], abs=1e-6), name
            assert figure["ci95"][0] <= figure["diff"] <= figure["ci95"][1], name
    assert summary["forward_kl"]["mean"] != summary["kl"]["mean"]
    for name in ("gold_win_rate", "reward_win_rate", "kl", "kl_k3", "forward_kl"):
        assert set(summary[name]) == {"mean", "ci95", "n"}, name
    assert summary["kl_k3"]["mean"] > 0  # the policy has moved
    assert 0 <= summary["gold_win_rate"]["mean"] <= 1
    assert set(summary["stages"]) == {"comparisons", "reward", "ppo", "evaluate"}
    for name, cost in summary["stages"].items():
        assert cost["seconds"] > 0, name
        assert cost["peak_bytes"] > 1e7, name
    assert {"held_out_accuracy", "probe_accuracy", "noise_ceiling"} <= set(summary["reward_model"])
    assert len(summary["samples"]) == 10
    json.dumps(summary, allow_nan=False)


def test_the_page_shows_every_figure_of_the_summary(summary, road):
    page = as_markdown(summary)
    assert page == (road / "runs/tiny/evaluate/summary.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if "|" in line]
    table = {row[0]: row[1:] for row in rows if len(row) == 5}
    for key, label, digits in (
        ("gold", "gold score", 3),
        ("reward", "reward model (the training proxy)", 3),
        ("response_length", "response length, tokens", 1),
        ("eos_rate", "share that ended itself", 3),
        ("entropy", "entropy, nats a token", 2),
        ("distinct_1", "distinct-1", 3),
        ("distinct_2", "distinct-2", 3),
    ):
        shown = [f"{summary[key][k]:.{digits}f}" for k in ("before", "after", "diff")]
        low, high = summary[key]["ci95"]
        assert table[label] == [*shown, f"[{low:.{digits}f}, {high:.{digits}f}]"], key
    for name in ("gold", "reward model"):
        assert f"Win rate by {name}: " in page
    assert f"KL(policy || reference), nats a response: {summary['kl']['mean']:.2f}" in page
    assert {row[0] for row in rows if len(row) == 3} >= {"comparisons", "reward", "ppo", "evaluate", "all"}
    assert len([row for row in rows if len(row) == 3 and "(" in row[1] and ")" in row[2]]) >= 10


def test_an_unknown_figure_is_said_to_be_unknown(summary):
    unknown = {"before": None, "after": 1.0, "diff": None, "ci95": None, "n": 1}
    page = as_markdown(summary | {"gold": unknown, "kl": {"mean": 0.5, "ci95": None, "n": 1}})
    assert "| gold score | unknown | 1.000 | unknown | unknown |" in page
    assert "0.50 (k1)" in page


def test_the_responses_are_all_written(road, summary):
    lines = [
        json.loads(line) for line in (road / "runs/tiny/evaluate/responses.jsonl").read_text().splitlines()
    ]
    assert len(lines) == 24
    assert {line["prompt"] for line in lines} >= {sample["prompt"] for sample in summary["samples"]}


def test_the_interval_of_distinct_n_holds_its_own_figure():
    rng = np.random.default_rng(1)
    before = [" ".join(map(str, rng.integers(0, 400, size=20))) for _ in range(60)]
    after = [" ".join(map(str, rng.integers(0, 200, size=20))) for _ in range(60)]
    figure = paired_jackknife(before, after, lambda texts: distinct_n(texts, 1))
    low, high = figure["ci95"]
    assert low < figure["diff"] < high < 0


def test_the_explained_variance_of_the_value_is_that_of_its_tokens():
    rng = np.random.default_rng(2)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    values, returns = (torch.tensor(rng.normal(size=(2, 3)), dtype=torch.float32) for _ in range(2))
    values = values + returns
    rest = {name: torch.zeros(2, 3) for name in ("log_probs_BR", "reference_log_probs_BR", "entropy_BR")}
    rollout = SimpleNamespace(
        actions_BR=mask, values_BR=values, scores_B=torch.zeros(2), ended_B=torch.ones(2, dtype=torch.bool),
        texts=["a b", "c d"], **rest,
    )  # fmt: skip
    alone = SimpleNamespace(all_sum=lambda x: x, gather=lambda x: [x])

    def explained(returns_BR):
        return rollout_metrics(alone, rollout, returns_BR, returns_BR, 2)["value/explained_variance"]

    r, e = returns[mask].numpy(), (returns - values)[mask].numpy()
    assert explained(returns) == pytest.approx(1 - e.var() / r.var(), abs=1e-5)
    assert explained(values) == pytest.approx(1)
    assert np.isnan(explained(torch.zeros(2, 3)))


def test_tokens_a_second_are_those_of_all_responses_once():
    found = {"response/length": 20.0, "time/generate": 2.0, "time/rollout": 4.0, "time/update": 6.0}
    assert tokens_per_second(found, 30) == {
        "time/generated_tokens_per_second": 300.0,
        "time/updated_tokens_per_second": 100.0,
        "time/tokens_per_second": 60.0,
    }
