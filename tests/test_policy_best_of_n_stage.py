"""Best of n in the summary: its figures beside the policy's, its page, the stage, the recipe."""

import json
import shutil

import numpy as np
import pytest
from conftest import stage, tiny_recipe

from policy.evaluate import __main__ as evaluate
from policy.evaluate.best_of_n import best_of_figures, kl_bound
from policy.evaluate.report import as_markdown
from rlhf.errors import UserError

# --- figures and page ------------------------------------------------------------------------------------


def figures(policy_gold=(2.0, 4.0), *, judge="gold"):
    found = {"gold": np.array([[0.0, 1.0, 2.0, 3.0]] * 2), "reward": np.array([[0.0, 1.0, 2.0, 3.0]] * 2)}
    after = {"gold": np.array(policy_gold), "reward": np.array([5.0, 6.0])}
    before = {"gold": np.array([1.0, 5.0]), "reward": np.array([0.0, 9.0])}
    return best_of_figures(found, before, after, np.array([0.5, 1.5]), proxy="reward", judge=judge)


def test_the_figures_stand_beside_the_policy():
    found = figures(policy_gold=(1.0, 2.8))
    assert (found["samples"], found["prompts"], found["tied"]) == (4, 2, 0)
    assert [row["n"] for row in found["rows"]] == [1, 2, 4]
    assert [row["scores"]["gold"]["mean"] for row in found["rows"]] == pytest.approx([3 / 2, 7 / 3, 3])
    assert [row["kl_bound"] for row in found["rows"]] == [kl_bound(n) for n in (1, 2, 4)]
    assert [row["win_rate_bound"] for row in found["rows"]] == pytest.approx([1 / 2, 2 / 3, 4 / 5])
    over = found["rows"][1]["over_policy"]  # 7/3 - 1 and 7/3 - 2.8, paired
    mean = 7 / 3 - 1.9
    assert over["mean"] == pytest.approx(mean)
    half = 12.706205 * 0.9  # Student's t; their deviation is 1.8 / sqrt 2, of two prompts
    assert over["ci95"] == pytest.approx([mean - half, mean + half], abs=1e-5)
    assert found["policy"]["kl"]["mean"] == 1
    assert found["policy"]["win_rate"]["mean"] == 0.25  # 1 against 1 is a tie, 2.8 against 5 is lost
    assert found["policy"]["scores"]["reward"]["mean"] == 5.5


@pytest.mark.parametrize(
    ("policy_gold", "reaches"), [((1.0, 1.8), 1), ((1.0, 2.8), 2), ((3.0, 3.0), 4), ((3.0, 3.1), None)]
)
def test_the_page_says_at_which_n_the_policy_is_reached(policy_gold, reaches, summary):
    found = figures(policy_gold)
    assert found["reaches"] == reaches
    page = as_markdown(summary | {"best_of_n": found})
    mean = f"{sum(policy_gold) / 2:.3f}"
    if reaches is None:
        assert f"Best of n does not reach the policy's gold score, {mean}, up to n = 4.\n" in page
    else:
        assert (
            f"Best of n reaches the policy's gold score, {mean}, at n = {reaches}, with a KL of at most "
            f"{kl_bound(reaches):.2f} nats; the policy's is 1.00.\n"
        ) in page


def test_the_judge_decides_and_not_the_proxy():
    assert figures((0.0, 0.0))["reaches"] == 1
    assert figures((0.0, 0.0), judge="reward")["reaches"] is None  # the policy's proxy is 5.5


# --- the stage -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def summary(road):
    return json.loads((road / "runs/tiny/evaluate/summary.json").read_text())


@pytest.fixture(scope="module")
def with_best_of(road, tmp_path_factory):
    """The folder of the evaluate stage of the same run, with best-of-n."""
    folder = tmp_path_factory.mktemp("best")
    shutil.copytree(road, folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "runs/tiny/evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        stage(evaluate.main, "evaluate.best_of=5", "evaluate.best_of_prompts=6")
    return folder / "runs/tiny/evaluate"


def test_best_of_n_changes_no_other_figure(summary, with_best_of, road):
    other = json.loads((with_best_of / "summary.json").read_text())
    assert set(other) - set(summary) == {"best_of_n"}
    for name in set(summary) - {"stages"}:  # which are seconds
        assert other[name] == summary[name], name
    name = "runs/tiny/evaluate/responses.jsonl"
    assert (with_best_of / "responses.jsonl").read_text() == (road / name).read_text()


def test_the_summary_has_the_curve_and_the_page_shows_it(with_best_of):
    found = json.loads((with_best_of / "summary.json").read_text())["best_of_n"]
    lines = [json.loads(line) for line in (with_best_of / "responses.jsonl").read_text().splitlines()]
    assert (found["samples"], found["prompts"], found["judge"], found["proxy"]) == (5, 6, "gold", "reward")
    assert found["policy"]["kl"]["n"] == 6 < len(lines)
    proxies = [row["scores"]["reward"]["mean"] for row in found["rows"]]
    assert proxies == sorted(proxies)
    assert proxies[0] < proxies[-1]
    page = (with_best_of / "summary.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if "|" in line]
    table = {row[0]: row[1:] for row in rows if len(row) == 6}
    assert list(table)[1:] == ["---", "1", "2", "4", "policy"]
    assert table["n"] == ["KL, nats", "win rate", "gold score", "proxy score", "gold score less the policy's"]
    for row in found["rows"]:
        cells = table[str(row["n"])]
        assert cells[:2] == [f"at most {row['kl_bound']:.3f}", f"at most {row['win_rate_bound']:.3f}"]
        shown = [row["scores"]["gold"], row["scores"]["reward"]]
        for text, figure in zip(cells[2:4], shown, strict=True):
            low, high = figure["ci95"]
            assert text == f"{figure['mean']:.3f} [{low:.3f}, {high:.3f}]"
        assert cells[4].startswith(f"{row['over_policy']['mean']:+.3f} [")
    assert table["policy"][0].startswith(f"{found['policy']['kl']['mean']:.3f} [")
    assert "5 responses of the reference to each of 6 prompts" in page


def test_without_it_the_page_says_nothing_of_it(summary):
    assert "best_of_n" not in summary
    assert "Best of n" not in as_markdown(summary)


# --- the recipe ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluate.best_of=1"], "best_of 1 has nothing to choose from"),
        (["evaluate.best_of=-1"], "evaluate.best_of"),
        (["evaluate.best_of=2.5"], "evaluate.best_of"),
        (["evaluate.best_of_prompts=4"], "best_of_prompts is only used with best_of"),
        (["evaluate.best_of=4", "evaluate.best_of_prompts=25"], "more than the 24 prompts"),
        (["evaluate.best_of=4", "evaluate.best_of_prompts=0"], "evaluate.best_of_prompts"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        tiny_recipe(*overrides)


def test_all_prompts_are_accepted():
    assert tiny_recipe("evaluate.best_of=64", "evaluate.best_of_prompts=24").evaluate.best_of == 64
