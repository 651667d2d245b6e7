"""Rewards and judges of one's own through the real stages: servers, classifiers, processes, mistakes."""

import json
import shutil

import pytest
from conftest import stage
from ranks import finish
from stand_in_server import StandIn, length
from test_bad_input import OPENING, lab, made, refused  # noqa: F401 - fixtures
from tiny_classifiers import llama

from benchmarks.faults.killed_process import Plan, Start, link_stages
from policy.evaluate import __main__ as evaluate
from policy.ppo import __main__ as ppo
from reward.card import __main__ as card
from reward.card.scorers import load_scorer
from rlhf.collect import __main__ as collect
from rlhf.data.comparisons import Message
from rlhf.recipe.load import load
from rlhf.runs.artifacts import read_json
from rlhf.training.metrics import read_metrics

FILE = """
import threading


def brevity(prompts, completions, **kwargs):
    return [-len(text) / 10 for text in completions]


def hangs(completions, **kwargs):
    threading.Event().wait()


def raises(completions, **kwargs):
    raise ConnectionError("nobody there")


def wants(completions, answer):
    return answer
"""


@pytest.fixture
def server():
    running = StandIn(length)
    yield running
    running.stop()


@pytest.fixture
def functions(lab):  # noqa: F811
    (lab / "my_rewards.py").write_text(FILE)
    return lab


def judged(server, **options):
    return json.dumps({"url": server.url, "model": "m", "highest": 1000, **options}).replace('"', "'")


def questions(server):
    return [body["messages"][0]["content"] for _, body in server.asked]


# ---- a server


def test_a_server_labels_rewards_and_evaluates(road, inside, server):
    shutil.copytree(road / "models", inside / "models")
    judge = judged(server)
    stage(collect.main, f"collect={{prompts: 16, judge: {judge}, noise: 0.0}}")
    made_rows = [
        json.loads(x) for x in (inside / "runs/tiny/comparisons/train.jsonl").read_text().splitlines()
    ]
    for row in made_rows:
        lengths = [len(text) for text in row["responses"]]
        assert row["ranks"] == [sorted(set(lengths), reverse=True).index(n) for n in lengths]
    options = (
        f"collect={{prompts: 16, judge: {judge}, noise: 0.0}}",
        f"ppo.rewards=[{{judge: {judge}, weight: 0.5}}]",
        f"evaluate={{judge: {judge}, prompts: 4}}",
        "ppo.steps=2",
    )
    stage(ppo.main, *options)
    for row in read_metrics(inside / "runs/tiny/ppo"):
        assert row["objective/score"] == pytest.approx(0.5 * row["reward/m"])
        assert row["reward/m"] > 0
    stage(evaluate.main, *options)
    summary = read_json(inside / "runs/tiny/evaluate/summary.json")
    rows = [json.loads(x) for x in (inside / "runs/tiny/evaluate/responses.jsonl").read_text().splitlines()]
    assert summary["judged_by"] == "m"
    assert summary["gold"]["after"] == pytest.approx(sum(len(r["after"]) for r in rows) / len(rows))
    asked = [q for q in questions(server) if "Hello." not in q]  # which each stage asks once, at its start
    assert len(asked) == len(set(asked))


@pytest.mark.slow
def test_a_killed_run_asks_nothing_twice_and_ends_as_if_it_had_not_been_killed(road, tmp_path, server):
    rewards = f"ppo.rewards=[{{judge: {judged(server)}, normalize: true}}, {{model: reward}}]"
    options = (rewards, "ppo.steps=3", "ppo.checkpoint_every=1")
    whole, here = (link_stages(road, tmp_path / name) for name in ("whole", "here"))
    Start(whole, options).finish()
    asked = len(server.asked)
    assert Start(here, options, Plan("update", 1)).wait() == -9
    Start(here, options).finish()
    assert len(server.asked) == 2 * asked + 1  # the second start's first question
    mine, expected = (read_metrics(folder / "runs/tiny/ppo") for folder in (here, whole))
    for row, wanted in zip(mine, expected, strict=True):
        assert {k: v for k, v in row.items() if not k.startswith("time/")} == {
            k: v for k, v in wanted.items() if not k.startswith("time/")
        }


# ---- models


def test_without_a_reward_model_there_is_no_card(functions, capsys):
    shutil.rmtree(functions / "runs/tiny/reward")
    stage(card.main, "ppo.rewards=[{judge: vader}]")
    assert capsys.readouterr().out == "card: this run has no reward model (ppo.rewards); nothing to do\n"
    assert not (functions / "runs/tiny/card").exists()


def test_any_sequence_classifier_is_a_reward(functions):
    llama("classifier", template=False)
    stage(ppo.main, "ppo.rewards=[{model: classifier, name: c}, {model: reward}]", "ppo.steps=1")
    row = read_metrics(functions / "runs/tiny/ppo")[0]
    assert row["objective/score"] == pytest.approx(row["reward/c"] + row["reward/reward"], abs=1e-5)
    scorer = load_scorer("classifier", load(functions / "runs/tiny/ppo/recipe.yaml"))
    assert abs(scorer.score([(Message("user", "x"),)], ["y"])[0]) > 1e-4
    assert abs(row["reward/c"]) > 1e-4
    mix = "ppo.rewards=[{model: classifier, name: c}, {model: reward}]"
    judge = ("evaluate.judge=reward", "evaluate.reward_model=classifier", "evaluate.prompts=4")
    stage(evaluate.main, mix, "ppo.steps=1", *judge)
    summary = read_json(functions / "runs/tiny/evaluate/summary.json")
    rows = [
        json.loads(x) for x in (functions / "runs/tiny/evaluate/responses.jsonl").read_text().splitlines()
    ]
    expected = scorer.score([(Message("user", r["prompt"]),) for r in rows], [r["after"] for r in rows])
    assert summary["judge"]["after"] == pytest.approx(float(expected.mean()), abs=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        ("ppo.retokenize=true",),
        ("ppo.algorithm=rloo", "ppo.samples_per_prompt=2"),
        ("ppo.value=shared", "ppo.trunk_gigabytes=0"),
        ("ppo.score_normalization=running", "ppo.score_clip=1.0", "ppo.missing_eos=subtract"),
    ],
)
def test_a_mix_goes_with_the_other_options_of_ppo(functions, options):
    mix = "ppo.rewards=[{model: runs/tiny/reward/model, weight: 2}, {function: my_rewards.py:brevity}]"
    stage(ppo.main, mix, "ppo.steps=1", *options)
    row = read_metrics(functions / "runs/tiny/ppo")[0]
    expected = 2 * row["reward/tiny"] + row["reward/brevity"]
    assert row["objective/score"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])  # which shards the weights, so all score together
def test_two_processes_do_what_one_does(functions, tmp_path_factory, zero):
    mix = (
        "ppo.rewards=[{model: reward}, {function: my_rewards.py:brevity, normalize: true}, {judge: vader}]",
        "ppo.steps=2",
    )
    other = tmp_path_factory.mktemp("pair") / "run"
    shutil.copytree(functions, other)
    stage(ppo.main, *mix)
    finish(other, "ppo", *mix, f"distributed.zero_stage={zero}")
    alone, pair = (read_metrics(folder / "runs/tiny/ppo") for folder in (functions, other))
    for row, wanted in zip(pair, alone, strict=True):
        names = [name for name in wanted if name.startswith(("reward/", "objective/"))]
        assert {"reward/reward", "reward/brevity", "reward/vader"} < set(names)
        assert [row[name] for name in names] == pytest.approx([wanted[name] for name in names], abs=1e-4)
    evaluation = (*mix, "evaluate.judge=my_rewards.py:brevity", "evaluate.prompts=6", "evaluate.batch_size=2")
    shutil.copytree(functions / "runs/tiny/ppo", other / "runs/tiny/ppo", dirs_exist_ok=True)
    stage(evaluate.main, *evaluation)
    finish(other, "evaluate", *evaluation)
    one, two = (read_json(folder / "runs/tiny/evaluate/summary.json") for folder in (functions, other))
    assert [two[name] for name in ("gold", "reward")] == [one[name] for name in ("gold", "reward")]


# ---- mistakes


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (
            "{function: my_rewards.py:gone}",
            "ppo.rewards[0]: gone is no function of the file my_rewards.py; it has br",
        ),
        (
            "{function: my_rewards.py:wants}",
            "ppo.rewards[0]: my_rewards.py:wants needs an argument 'answer': no col",
        ),
        ("{function: broken.py:f}", "ppo.rewards[0]: "),
        (
            "{judge: {url: 'http://127.0.0.1:9/v1', model: m, tries: 1}}",
            "ppo.rewards[0]: http://127.0.0.1:9/v1 cannot be reached (",
        ),
    ],
)
def test_what_cannot_score_is_told_before_anything_is_loaded(functions, refused, rewards, message):  # noqa: F811
    (functions / "broken.py").write_text("import no_such_module_of_anybody\n")
    assert refused(ppo.main, f"ppo.rewards=[{rewards}]").startswith(message)
    assert made("ppo") <= OPENING
    stage(ppo.main, "ppo.rewards=[{function: my_rewards.py:brevity}]", "ppo.steps=1")  # mended, it runs


def test_prose_where_a_number_was_asked_for_is_told(functions, refused):  # noqa: F811
    server = StandIn(lambda *_: "I like it")
    try:
        line = refused(ppo.main, f"ppo.rewards=[{{judge: {judged(server, tries=1)}}}]")
    finally:
        server.stop()
    assert "answered 'I like it', no number from 0 to 1000, in 1 try; say in judge.prompt" in line
    assert made("ppo") <= OPENING


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hangs", "error: ppo: the reward hangs has not answered for 0.05 minutes"),
        (
            "raises",
            "error: ppo.rewards[0]: my_rewards.py:raises failed on 16 responses (ConnectionError: nobody",
        ),
    ],
)
def test_a_function_that_hangs_or_raises_ends_the_run_by_its_name(functions, name, message):
    rewards = f"ppo.rewards=[{{function: my_rewards.py:{name}}}]"
    start = Start(functions, (rewards, "ppo.score_timeout_minutes=0.05"))
    assert start.wait() == 2, start.output()
    (line,) = start.errors()
    assert line.startswith(message)
    assert not (functions / "runs/tiny/ppo/manifest.json").exists()
