"""A run's page: what it shows of what is finished, unfinished, damaged or hostile; that it needs nothing."""

import copy
import itertools
import json
import random
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from audit_cases import PEAK, TIME, log
from conftest import noted_anew, stage
from lxml import html
from tiny_tax import again

from rlhf.errors import UserError
from rlhf.report import __main__ as report
from rlhf.report import figures
from rlhf.report.figures import over_seeds, thinned
from rlhf.report.gather import gather
from rlhf.report.page import MAX_BYTES, samples_of, shown, write_page
from rlhf.report.sections import seed_groups
from rlhf.runs.artifacts import read_json, read_jsonl, write_json, write_jsonl

RUN = Path("runs/tiny")
DRAWN = {}  # figures by what they show: most pages here have the same ones, and drawing takes the time
_EMPTY = {"meta", "link", "input", "br", "img", "hr"}  # elements without an end


@pytest.fixture(autouse=True)
def drawn_once(monkeypatch):
    def remembered(draw):
        def show(*what, **more):
            key = repr((draw.__name__, what, sorted(more.items())))
            if key not in DRAWN:
                DRAWN[key] = draw(*what, **more)
            return DRAWN[key]

        return show

    for name in ("bands", "bars", "curves", "dots", "reliability", "scatter"):
        monkeypatch.setattr(figures, name, remembered(getattr(figures, name)))


class Strict(HTMLParser):
    """Counts elements, and sees to it that each is closed in its order."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.faults = [], [], []

    def handle_starttag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in _EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(tag)


def page(*runs, file="page.html"):
    """The page of runs as text and as a tree; it is whole, and asks for nothing from elsewhere."""
    write_page([gather(Path(run)) for run in runs or [RUN]], Path(file))
    text = Path(file).read_text()
    strict = Strict()
    strict.feed(text)
    assert (strict.open, strict.faults) == ([], [])
    assert len(strict.ids) == len(set(strict.ids))
    assert set(re.findall(r'url\(#([^)"]+)\)|href="#([^"]+)"', text)) <= {
        pair for name in strict.ids for pair in ((name, ""), ("", name))
    }
    tree = html.fromstring(text)
    assert not tree.xpath(
        "//link | //img | //iframe | //object | //script[@src] | //@*[starts-with(name(), 'on')]"
    )
    outside = {x for x in re.findall(r"[a-z]+://[^\s\"'<>]+", text) if "www.w3.org" not in x}
    assert outside == set()
    assert "@import" not in text
    assert len(text.encode()) < MAX_BYTES
    return text, tree


def said(tree, path="//main"):
    return " ".join(tree.xpath(f"string({path})").split())


@pytest.fixture
def run(road, tmp_path, monkeypatch):
    """A copy of the tiny road as the current folder."""
    shutil.copytree(road, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def at(road, tmp_path, monkeypatch):
    """A current folder whose runs are the road's, to be read."""
    (tmp_path / "runs").symlink_to(road / "runs")
    monkeypatch.chdir(tmp_path)


def test_the_page_has_the_figures_of_the_run_and_links_to_their_files(at):
    _, tree = page()
    summary = read_json(RUN / "evaluate/summary.json")
    gold = tree.xpath("//tr[th='gold score']/td/text()")
    ends = "[{:.3f}, {:.3f}]".format(*summary["gold"]["ci95"])
    assert gold == [*(f"{summary['gold'][key]:.3f}" for key in ("before", "after", "diff")), ends]
    minutes = read_json(RUN / "ppo/manifest.json")["seconds"] / 60
    assert tree.xpath("//tr[th='ppo']/td/text()")[:2] == ["finished", f"{minutes:.1f}"]
    links = set(tree.xpath("//a/@href[not(starts-with(., '#'))]"))
    assert {f"runs/tiny/{x}" for x in ("ppo/metrics.jsonl", "evaluate/summary.json")} <= links
    assert all(Path(link).is_file() for link in links)
    titles = [x.text.strip() for x in tree.xpath("//figcaption")]
    wanted = {"Score of the reward model", "Entropy, nats a token", "Response length, tokens"}
    assert wanted | {"Explained variance of the value"} <= set(titles)
    # every figure and every table has its files
    assert not tree.xpath("//figure[not(.//a)]")
    assert not tree.xpath("//div[@class='wide' and .//table and not(.//a)]")


def test_twenty_samples_stand_side_by_side_with_their_scores(at):
    _, tree = page()
    rows = read_jsonl(RUN / "evaluate/responses.jsonl")
    samples = tree.xpath("//article")
    assert len(samples) == 20 < len(rows)
    for sample in samples:
        row = rows[int(sample.xpath("string(h3)").split()[-1]) - 1]
        before, after = (said(p, ".") for p in sample.xpath(".//div[@class='pair']//p"))
        assert (before, after) == tuple(" ".join(shown(row[key]).split()) for key in ("before", "after"))
        scores = [x.text for x in sample.xpath(".//span[@class='score']")]
        assert scores == [
            f"{name} {row['scores'][name][i]:.2f}" for i in (0, 1) for name in ("gold", "reward")
        ]
        change = row["scores"]["gold"][1] - row["scores"]["gold"][0]
        assert sample.get("data-change") == ("more" if change > 0 else "less" if change < 0 else "equal")


def test_the_page_can_be_read_in_both_schemes_on_a_phone_and_by_keyboard(at):
    text, tree = page()
    assert tree.xpath("//meta[@name='viewport' and contains(@content, 'width=device-width')]")
    assert tree.get("lang") == "en"
    style = tree.xpath("string(//style)")
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    names = set(re.findall(r"(--[\w-]+):", light.split("}")[0]))
    assert names == set(re.findall(r"(--[\w-]+):", dark.split("}")[0]))
    assert set(re.findall(r"var\((--[\w-]+)\)", text)) <= names
    assert len(names) > 8
    svg = "".join(html.tostring(x).decode() for x in tree.xpath("//*[local-name()='svg']"))
    assert set(re.findall(r"(?:fill|stroke): ?([^;\"]+)", svg)) <= {
        "none", "currentColor", "var(--line)", *(f"var(--series-{n})" for n in range(8)),
    }  # fmt: skip
    assert len(tree.xpath("//*[local-name()='svg' and @role='img' and @aria-label]")) == len(
        tree.xpath("//figure")
    )
    assert all(x.xpath("ancestor::label") for x in tree.xpath("//input | //select"))
    assert tree.xpath("//a[@class='skip' and @href='#content']")
    assert tree.xpath("//div[@class='scroll']/@tabindex") == ["0"] * len(tree.xpath("//table"))


def test_script_in_a_response_is_text(run):
    evil = '<script>document.title="x"</script><img src=x onerror=alert(1)>"\'>{{ 7 * 7 }}</p></article>'
    evil += "\x00\x1b[31m\ud800"
    file = RUN / "evaluate/responses.jsonl"
    rows = [row | {"prompt": evil, "before": evil, "after": evil} for row in read_jsonl(file)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    noted_anew(RUN / "evaluate")
    text, tree = page()
    assert len(tree.xpath("//script")) == 1
    assert not [x for x in ("<script>document", "<img", "\x00", "\x1b") if x in text]
    assert tree.xpath("//article//p")[0].text.startswith(
        '<script>document.title="x"</script><img src=x onerror'
    )
    assert "{{ 7 * 7 }}" in said(tree, "//article")


def test_the_policy_of_the_page_lets_its_own_script_run_and_no_other(at):
    import base64
    import hashlib

    _, tree = page()
    policy = tree.xpath("string(//meta[@http-equiv='Content-Security-Policy']/@content)")
    script = tree.xpath("string(//script)")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_a_response_of_100000_tokens_is_cut_and_counted(run):
    file = RUN / "evaluate/responses.jsonl"
    rows = [row | {"after": "word " * 100_000} for row in read_jsonl(file)]
    write_jsonl(file, rows)
    noted_anew(RUN / "evaluate")
    text, tree = page()
    assert len(text) < 600_000
    assert "[... 496,000 more characters]" in said(tree, "//article")


def test_texts_are_shorter_where_the_page_would_be_too_large(run, monkeypatch):
    monkeypatch.setattr("rlhf.report.page.MAX_BYTES", 400_000)
    file = RUN / "evaluate/responses.jsonl"
    write_jsonl(file, [row | {"before": "\u4e16" * 4000, "after": "b" * 4000} for row in read_jsonl(file)])
    noted_anew(RUN / "evaluate")
    assert len(page()[0].encode()) < 400_000
    monkeypatch.setattr("rlhf.report.page.MAX_BYTES", 1000)
    with pytest.raises(UserError, match="more than 5 MB"):
        write_page([gather(RUN)], Path("large.html"))
    assert not Path("large.html").exists()


def test_an_unfinished_run_says_what_is_there_and_what_is_missing(run):
    (RUN / "ppo/manifest.json").unlink()
    shutil.rmtree(RUN / "evaluate")
    with (RUN / "ppo/metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "objec')
    text, tree = page()
    faults = said(tree, "//section[@class='faults']")
    assert "ppo: unfinished; begun at step 6 and not finished" in faults
    assert "evaluate: missing; make evaluate RECIPE=..." in faults
    assert "comparisons" not in faults
    assert "Score of the reward model" in text  # the curve so far
    assert all(Path(link).is_file() for link in tree.xpath("//main//a/@href"))
    assert "No responses: they come with the stage evaluate" in text


@pytest.mark.parametrize("how", ["flip", "cut", "other", "gone"])
def test_a_damaged_file_is_told_and_not_shown(run, how):
    file = RUN / "evaluate/summary.json"
    before = f"{read_json(file)['gold']['after']:.3f}"
    if how == "flip":
        write_json(file, read_json(file) | {"seed": 9})
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:100])
    elif how == "other":
        write_json(file, {"gold": [1], "reward": "x", "samples": 3})
        noted_anew(RUN / "evaluate")  # whole by its manifest, and no summary
    else:
        file.unlink()
    _, tree = page()
    if how == "other":
        assert "cannot be shown" in said(tree, "//section[@id='judged']")
    else:
        assert "evaluate: damaged; summary.json is" in said(tree, "//section[@class='faults']")
    assert before not in said(tree, "//section[@id='judged']")
    assert said(tree, "//section[@id='trained']")


HOSTILE = (None, "x", [], {}, 0, float("nan"), True, [1], {"mean": "a"}, "<b>")


@pytest.mark.parametrize("name", ["evaluate/summary.json", "ppo/manifest.json", "comparisons/manifest.json"])
def test_whatever_stands_in_a_file_there_is_a_page(run, name):
    """A value anywhere in a file, at random, is another one."""
    chance = random.Random(name)
    whole = read_json(RUN / name)
    whole.pop("checksum", None)
    for _ in range(6):
        value = copy.deepcopy(whole)
        inside, key = {"": value}, ""
        while isinstance(inside[key], dict | list) and inside[key] and chance.random() < 0.8:
            inside = inside[key]
            key = chance.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
        inside[key] = chance.choice(HOSTILE)
        write_json(RUN / name, value)
        if "manifest" not in name:
            noted_anew(RUN / "evaluate")
        _, tree = page()
        assert len(tree.xpath("//section")) >= 8


def test_the_tax_has_its_table_and_its_figure(here, no_picture):
    again("tax.variants=[base,policy]", tasks=("lm_loss",))
    tax = read_json(RUN / "tax/tax.json")
    _, tree = page()
    task = tax["tasks"][0]
    metric, _, gain, verdict = tree.xpath(f"//tr[th='{task['task']}' and td='policy']/td/text()")
    found = task["differences"]["policy"]
    assert (metric, verdict) == (task["metric"], found["verdict"])
    assert gain.startswith(f"{found['gain']:+.3f} [")
    assert tree.xpath("//tr[th='tax: tasks']/td/text()")[0].endswith("worse of 1")
    assert f"{task['task']}, policy" in said(tree, "//section[@id='tax']//figure")


def test_best_of_n_and_the_policy_of_dpo_are_shown(run):
    file = RUN / "evaluate/summary.json"
    figure = {"mean": 0.5, "ci95": [0.4, 0.6], "n": 3}
    scores = {"scores": {"gold": figure, "reward": figure}}
    best = {"best_of_n": {"policy": scores, "rows": [{"n": n, **scores} for n in (1, 2)]}}
    write_json(file, read_json(file) | best)
    noted_anew(RUN / "evaluate")
    shutil.copytree(RUN / "evaluate", RUN / "evaluate_dpo")
    _, tree = page()
    judged = said(tree, "//section[@id='judged']")
    assert "best of 2, gold" in judged
    assert "before and after PPO" in judged
    assert "before and after DPO" in judged


def test_an_empty_folder_has_a_page(inside):
    Path("runs/none").mkdir(parents=True)
    _, tree = page("runs/none")
    assert "comparisons: missing" in said(tree, "//section[@class='faults']")


def test_two_runs_stand_on_one_page_with_what_differs_in_bold(run, monkeypatch, capsys):
    shutil.copytree(RUN, "runs/other")
    for file in Path("runs/other").glob("*/recipe.yaml"):
        file.write_text(file.read_text().replace("seed: 0", "seed: 1").replace("name: tiny", "name: other"))
    monkeypatch.setenv("RUNS", "tiny other")
    report.main()
    file = Path(capsys.readouterr().out.splitlines()[-1])
    assert file == Path("runs/report-tiny-other.html")
    _, tree = page("runs/tiny", "runs/other", file=str(file))
    assert tree.xpath("//tr[th='seed' and @class='differs']/td/text()") == ["0", "1"]
    assert not tree.xpath("//tr[th='ppo.steps' and @class='differs']")
    assert len(tree.xpath("//article")) == 40
    assert tree.xpath("//select[@id='f-run']/option/text()") == ["all", "tiny", "other"]
    assert "95% intervals over the seeds" in said(tree, "//section[@id='policy']")
    assert {"tiny/ppo/metrics.jsonl", "other/ppo/metrics.jsonl"} <= set(tree.xpath("//a/@href"))
    runs = [gather(Path("runs/tiny")), gather(Path("runs/other"))]
    assert [[r.name for r in group] for group in seed_groups(runs)] == [["tiny", "other"]]
    runs[1].recipe["ppo"]["kl_coef"] = 9.0
    assert len(seed_groups(runs)) == 2


def test_intervals_over_seeds_are_students():
    from scipy import stats

    x = [1.0, 2.5, 4.0]
    ((step, mean, low, high),) = over_seeds([[(3, y), (4, 0.0)] for y in x[:1]] + [[(3, y)] for y in x[1:]])
    expected = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert (step, mean) == (3, 2.5)
    assert (low, high) == pytest.approx((expected.low, expected.high))
    points = [(float(n), 2.0 * n) for n in range(100_000)]
    assert len(thinned(points)) == 400
    assert sum(y for _, y in thinned(points)) / 400 == pytest.approx(99_999)


def test_a_run_that_is_not_there_is_named_with_the_nearest(at, monkeypatch):
    monkeypatch.setenv("RUNS", "tinny")
    with pytest.raises(UserError, match="no run tinny in runs/: did you mean tiny"):
        report.main()


def test_the_path_is_the_last_line(run, capsys):
    stage(report.main)
    assert capsys.readouterr().out.splitlines()[-1] == "runs/tiny/report.html"
    assert (RUN / "report.html").is_file()


def test_scores_of_an_earlier_version_are_found_among_the_pairs_it_showed(run):
    file = RUN / "evaluate/responses.jsonl"
    write_jsonl(file, [{k: v for k, v in row.items() if k != "scores"} for row in read_jsonl(file)])
    noted_anew(RUN / "evaluate")
    found = [sample["scores"] for sample in samples_of(gather(RUN))]
    assert any(found)
    assert not all(found)


# ---- over-optimization


def test_a_run_that_games_its_reward_says_so_at_the_top_with_both_scores_and_the_step(run):
    rows = [row | log for row, log in zip(itertools.cycle(read_jsonl(RUN / "ppo/metrics.jsonl")),
                                          log(0, 2 * np.sqrt(TIME), PEAK), strict=False)]  # fmt: skip
    write_jsonl(RUN / "ppo/metrics.jsonl", rows)
    text, tree = page()
    first = tree.xpath("//main/section")[0]
    assert first.get("aria-labelledby") == "h-notices"
    assert "tiny: over-optimized from about step" in said(first, ".")
    assert first.xpath(".//a/@href") == ["#overoptimization"]
    section = tree.get_element_by_id("overoptimization")
    assert "Set ppo.keep_best=true" in said(section, ".")
    assert len(section.xpath(".//figure")) == 2
    assert re.search(r"over-optimized from 1\d", text)
    assert section.xpath(".//figcaption//a/@href") == ["runs/tiny/ppo/metrics.jsonl"] * 2
    write_jsonl(RUN / "ppo/metrics.jsonl", [row | {"audit/gap": "far"} for row in rows])  # no number
    assert "h-notices" not in page()[0]


def test_a_run_without_a_test_model_says_what_it_does_not_know(at):
    _, tree = page()
    assert "Without a test model nobody checks the score itself" in said(tree, "//*[@id='overoptimization']")
    assert not tree.xpath("//*[@id='h-notices']")
