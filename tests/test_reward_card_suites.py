"""The tables of public benchmarks against loops as their own programs have them."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from test_reward_card_figures import card

from reward.card.clusters import clusters
from reward.card.report import as_markdown
from reward.card.suites import SECTIONS, SUBSETS_2, combined, suites
from rlhf.data.comparisons import Comparison, Message

RM_BENCH = Path(os.environ.get("RLHF_DATA", "none")) / "rm_bench"


def item(group, source, responses, ranks, prompt=None):
    return Comparison(
        (Message("user", prompt or group),), tuple(responses), tuple(ranks), source, None, group
    )


def styled(rows):
    """The nine pairs of each item, as the reader makes them."""
    return [
        item(f"rm_bench:{row['id']}:{c}:{r}", row["subset"], (good, bad), (0, 1), row["prompt"])
        for row in rows
        for c, good in enumerate(row["chosen"])
        for r, bad in enumerate(row["rejected"])
    ]


def scored_by_style(rows, seed=0):
    """[items, 3] of the chosen and of the rejected ones, random."""
    rng = np.random.default_rng(seed)
    return rng.normal(0.3, 1, (len(rows), 3)), rng.normal(0, 1, (len(rows), 3))


def flat(chosen, rejected):
    return np.array([x for a, b in zip(chosen, rejected, strict=True) for c in a for r in b for x in (c, r)])


def made(n=40):
    names = ("chat", "math", "safety-refuse", "safety-response")
    return [
        {"id": i, "subset": names[i % 4], "prompt": f"p{i}"}
        | {k: [f"{k} {s} {i}" for s in "abc"] for k in ("chosen", "rejected")}
        for i in range(n)
    ]


def tables(cs, scores):
    return json.loads(json.dumps(suites(cs, np.asarray(scores, float), clusters(cs).of_C)))


def levels(chosen, rejected):
    """As the benchmark's program computes them: the matrix, then the means of its triangles."""
    matrix = np.mean(chosen[:, :, None] > rejected[:, None, :], axis=0)
    upper, lower = np.triu_indices(3, 1), np.tril_indices(3, -1)
    return matrix, matrix[lower].mean(), np.diag(matrix).mean(), matrix[upper].mean()


def test_rm_bench_is_that_of_its_own_program():
    rows = made()
    chosen, rejected = scored_by_style(rows)
    table = tables(styled(rows), flat(chosen, rejected))["rmbench"]
    wanted = {}
    for subset in table["subsets"]:
        inside = [i for i, row in enumerate(rows) if row["subset"] == subset["group"]]
        matrix, easy, normal, hard = levels(chosen[inside], rejected[inside])
        assert subset["matrix"] == pytest.approx(matrix)
        found = [subset[k]["mean"] for k in ("easy", "normal", "hard", "mean")]
        assert found == pytest.approx([easy, normal, hard, matrix.mean()])
        assert (subset["hard"]["n"], subset["pairs"]) == (10, 90)
        wanted[subset["group"]] = hard
    safety = (wanted["safety-refuse"] + wanted["safety-response"]) / 2
    assert table["overall"]["hard"]["mean"] == pytest.approx((wanted["chat"] + wanted["math"] + safety) / 3)


def test_a_model_of_style_is_easy_right_and_hard_wrong_and_equal_scores_are_wrong():
    rows = made(8)
    style = np.tile(np.arange(3.0), (8, 1))
    table = tables(styled(rows), flat(style, style))["rmbench"]["overall"]
    assert [table[k]["mean"] for k in ("easy", "normal", "hard")] == [1, 0, 0]


def test_a_cell_that_lost_pairs_counts_as_much_as_the_others():
    rows = made(4)
    cs = [c for c in styled(rows) if not (c.group.endswith(":0:1") and c.group != "rm_bench:0:0:1")]
    for c in cs:
        assert c.source
    cs = [Comparison(c.prompt, c.responses, c.ranks, "chat", None, c.group) for c in cs]
    right = [c.group == "rm_bench:0:0:1" for c in cs]
    table = tables(cs, [x for r in right for x in (float(r), 0.5)])["rmbench"]
    assert table["subsets"][0]["hard"]["mean"] == pytest.approx(1 / 3)


def test_a_group_without_styles_is_left_out():
    cs = [item("rm_bench:1:0:7", "chat", "ab", (0, 1)), item("rm_bench:1", "chat", "ab", (0, 1))]
    table = tables(cs, [1, 0, 1, 0])["rmbench"]
    assert table == {"subsets": [], "domains": [], "overall": None}


@pytest.mark.skipif(not RM_BENCH.is_dir(), reason="needs RLHF_DATA")
def test_the_real_files_of_rm_bench_have_a_table():
    for file in sorted(RM_BENCH.glob("*_filtered.json")):
        rows = json.loads(file.read_text(encoding="utf-8"))[:40]
        chosen, rejected = scored_by_style(rows)
        table = tables(styled(rows), flat(chosen, rejected))["rmbench"]
        assert {d["group"] for d in table["domains"]} <= {
            "chat",
            "code",
            "math",
            "safety-refuse",
            "safety-response",
        }
        assert table["overall"]["hard"]["mean"] == pytest.approx(levels(chosen, rejected)[3])


def test_reward_bench_has_subsets_sections_in_its_weights_and_their_mean():
    rng = np.random.default_rng(0)
    names = [
        name for weights in SECTIONS.values() for name in weights for _ in range(int(rng.integers(2, 5)))
    ]
    cs = [item(f"reward_bench:{i}", name, "ab", (0, 1)) for i, name in enumerate(names)]
    scores = rng.normal(size=(len(cs), 2))
    table = tables(cs, scores.ravel())["rewardbench"]
    right = scores[:, 0] > scores[:, 1]
    by_name = {n: right[[m == n for m in names]].mean() for n in set(names)}
    assert {g["group"]: g["mean"] for g in table["subsets"]} == pytest.approx(by_name)
    sections = [
        sum(by_name[n] * w for n, w in weights.items()) / sum(weights.values())
        for weights in SECTIONS.values()
    ]
    assert [s["mean"] for s in table["sections"]] == pytest.approx(sections)
    assert table["overall"]["mean"] == pytest.approx(np.mean(sections))
    some = [i for i, name in enumerate(names) if name != "donotanswer" and name not in SECTIONS["Chat"]]
    part = tables([cs[i] for i in some], scores[some].ravel())["rewardbench"]
    assert part["overall"] is None
    assert [(s["group"], s["missing"]) for s in part["sections"]] == [
        ("Chat Hard", []), ("Safety", ["donotanswer"]), ("Reasoning", []),
    ]  # fmt: skip
    page = as_markdown(card(cs, scores.ravel()) | {"suites": {"rewardbench": part}})
    assert "unknown until all sections are there" in page


def test_reward_bench_2_is_best_of_four():
    ranks = (0, 1, 1, 1)
    cs = [item(f"reward_bench_2:{i}", s, "abcd", ranks) for i, s in enumerate(("Math", "Math", "Focus"))]
    scores = [[2, 1, 0, 0], [2, 3, 0, 0], [2, 2, 0, 0]]
    table = tables(cs, np.ravel(scores))["rewardbench2"]
    assert [(g["group"], g["mean"]) for g in table["subsets"]] == [("Focus", 0.5), ("Math", 0.5)]
    assert (table["overall"], table["ties"]) == (None, None)
    page = as_markdown(card(cs, np.ravel(scores)) | {"suites": {"rewardbench2": table}})
    assert "unknown until all subsets, ties of both kinds among them, are there" in page


def test_the_ties_of_reward_bench_2_are_those_of_its_own_program():
    tied, ref = (0, 0, 0, 1, 1), (0, 1, 1)
    rng = np.random.default_rng(3)
    cs, scores, stats = [], [], {}
    for n in range(12):
        for kind, ranks in (("tied", tied), ("ref", ref)):
            x = rng.normal(size=len(ranks)) - 2.0 * np.array(ranks)
            cs.append(item(f"reward_bench_2:{kind}:{n}", "Ties", "abcde"[: len(ranks)], ranks))
            scores.append(x)
            good, bad = x[np.array(ranks) == 0], x[np.array(ranks) == 1]
            stats[kind, n] = good.min() - bad.max(), good.max() - good.min()
    spread = np.array([stats["tied", n][1] for n in range(12)])
    between = np.array([stats["tied", n][0] for n in range(12)])
    least = np.minimum(between, [stats["ref", n][0] for n in range(12)])
    accuracy = {k: np.mean([stats[k, n][0] > 0 for n in range(12)]) for k in ("tied", "ref")}
    wanted = 0.3 * (accuracy["tied"] + accuracy["ref"]) + 0.2 * np.mean(between > spread)
    wanted += 0.2 * np.mean(least > spread) + 0.01 * np.mean(np.tanh(least / spread - 1))
    table = tables(cs, np.concatenate(scores))["rewardbench2"]
    assert table["ties"]["score"] == pytest.approx(wanted)
    assert (table["ties"]["prompts"], table["overall"]) == (12, None)
    others = [item(f"reward_bench_2:{s}", s, "abcd", (0, 1, 1, 1)) for s in SUBSETS_2 - {"ties"}]
    every = np.concatenate([*scores, *[np.arange(4.0, 0, -1)] * 5])
    whole = tables([*cs, *others], every)["rewardbench2"]
    assert whole["overall"]["mean"] == pytest.approx((5 + wanted) / 6)
    tied_alone = [i for i, c in enumerate(cs) if "tied" in c.group]
    part = [*(cs[i] for i in tied_alone), *others]
    kind = tables(part, np.concatenate([*(scores[i] for i in tied_alone), every[-20:]]))["rewardbench2"]
    assert (kind["ties"]["score"], kind["ties"]["prompts"], kind["overall"]) == (None, 0, None)
    page = as_markdown(
        card(part, np.ones(sum(len(c.responses) for c in part))) | {"suites": {"rewardbench2": kind}}
    )
    assert "Ties: unknown until" in page
    assert f"Ties: score {wanted:.3f}" in as_markdown(
        card(cs, np.concatenate(scores)) | {"suites": {"rewardbench2": table}}
    )


@pytest.mark.parametrize(("prefix", "name"), [("judge_bench", "JudgeBench"), ("ppe", "PPE")])
def test_other_benchmarks_have_their_subsets(prefix, name):
    cs = [item(f"{prefix}:{i}", "xy"[i % 2], "ab", (0, 1)) for i in range(10)]
    cs.append(item("a debate", "z", "ab", (0, 1)))
    scores = [1, 0, 0, 1] * 5 + [1, 0]
    told = suites(cs, np.array(scores, float), clusters(cs).of_C)
    table = told[prefix.replace("_", "")]
    assert [(g["group"], g["mean"], g["pairs"]) for g in table["subsets"]] == [("x", 1, 5), ("y", 0, 5)]
    assert (table["overall"]["mean"], table["overall"]["n"]) == (0.5, 10)
    assert f"## {name}\n" in as_markdown(card(cs, scores) | {"suites": told})


def test_any_of_several_right_answers_may_be_the_best_of_k():
    cs = [item(f"ppe:{i}", "math", "abcd", (0, 0, 1, 1)) for i in range(3)]
    table = tables(cs, [1, 2, 0, 0, 2, 2, 1, 0, 0, 1, 1, 0])["ppe"]
    assert table["overall"]["mean"] == pytest.approx(2 / 3)


def test_without_a_benchmark_there_is_no_table():
    cs = [item("a debate", "s", "ab", (0, 1))]
    assert tables(cs, [1, 0]) == {}


def test_means_of_figures_have_the_error_of_independent_ones():
    figures = [{"mean": 0.5, "ci95": [0.4, 0.6], "n": 3}, {"mean": 0.9, "ci95": [0.7, 1.1], "n": 4}]
    told = combined(figures)
    half = math.hypot(0.05, 0.1)
    assert told == {"mean": pytest.approx(0.7), "ci95": pytest.approx([0.7 - half, 0.7 + half]), "n": 7}
    assert combined([*figures, {"mean": 0.1, "ci95": None, "n": 1}])["ci95"] is None
