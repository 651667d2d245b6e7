"""Rewards of several kinds as one: their sum, their log, their state, and what a function may not do."""

import json
import re
import shutil

import pytest
import torch
import yaml
from conftest import ROOT, stage, tiny_recipe
from tiny_ppo import PROMPTS, SMALL, TOKENIZER, trainer, varied, weights

from policy.evaluate import __main__ as evaluate
from policy.ppo import __main__ as ppo
from policy.ppo.rollout import Responses
from policy.rewards.mixture import RewardMixture, WeightedReward, text_reward
from rlhf.collect.functions import RewardFunction
from rlhf.collect.judges import vader
from rlhf.errors import UserError
from rlhf.models.masks import left_pad
from rlhf.recipe.schema import Ppo
from rlhf.runs.artifacts import read_json
from rlhf.training.metrics import read_metrics

FILE = """
def brevity(prompts, completions, **kwargs):
    assert isinstance(prompts[0], str) and len(prompts) == len(completions)
    return [-len(text) / 10 for text in completions]


def every_other(completions, completion_ids, log_metric, trainer_state):
    log_metric("step", trainer_state.global_step)
    assert all(isinstance(i, int) for ids in completion_ids for i in ids)
    return [float(len(ids)) if i % 2 else None for i, ids in enumerate(completion_ids)]
"""
MIX = (
    "ppo.rewards=[{model: reward}, {function: my_rewards.py:brevity, weight: 0.5},"
    " {judge: vader, weight: -2}, {function: my_rewards.py:every_other, weight: 0, name: other}]"
)


@pytest.fixture
def lab(road, tmp_path, monkeypatch):
    """A copy of the tiny road as the current folder, with functions and without PPO."""
    shutil.copytree(road, tmp_path, dirs_exist_ok=True)
    for done in ("ppo", "evaluate"):
        shutil.rmtree(tmp_path / "runs/tiny" / done)
    (tmp_path / "my_rewards.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_ppo_learns_from_a_mix_and_logs_every_part_of_it(lab, capsys):
    stage(ppo.main, MIX, "ppo.steps=2")
    for step, row in enumerate(read_metrics(lab / "runs/tiny/ppo")):
        parts = {name: row[f"reward/{name}"] for name in ("reward", "brevity", "vader", "other")}
        expected = parts["reward"] + 0.5 * parts["brevity"] - 2 * parts["vader"]
        assert row["objective/score"] == pytest.approx(expected, abs=1e-5)
        assert row["reward/other/applies"] == 0.5
        assert row["reward/other/step"] == step
        assert 0 < parts["other"] <= 9
        assert parts["brevity"] < 0
        assert "reward/brevity/applies" not in row
    assert "reward/brevity: 0.5 x my_rewards.py:brevity" in capsys.readouterr().out
    manifest = read_json(lab / "runs/tiny/ppo/manifest.json")
    assert "my_rewards.py" in manifest["fingerprint"]["inputs"]
    assert set(manifest["fingerprint"]["parents"]) == {"comparisons", "reward"}
    stage(evaluate.main, MIX, "ppo.steps=2", "evaluate.judge=my_rewards.py:brevity", "evaluate.prompts=4")
    summary = read_json(lab / "runs/tiny/evaluate/summary.json")
    rows = [json.loads(x) for x in (lab / "runs/tiny/evaluate/responses.jsonl").read_text().splitlines()]
    assert summary["gold"]["after"] == pytest.approx(-sum(len(r["after"]) for r in rows) / 10 / len(rows))
    assert summary["judged_by"] == "my_rewards.py:brevity"
    (lab / "my_rewards.py").write_text(FILE + "# another file")
    with pytest.raises(
        UserError, match=r"was finished with another recipe or data \(data file my_rewards\.py"
    ):
        stage(ppo.main, MIX, "ppo.steps=2")


def test_functions_alone_need_no_reward_model(lab):
    shutil.rmtree(lab / "runs/tiny/reward")
    alone = "ppo.rewards=[{function: my_rewards.py:brevity, normalize: true}, {judge: vader}]"
    stage(ppo.main, alone, "ppo.steps=1")
    manifest = read_json(lab / "runs/tiny/ppo/manifest.json")
    assert set(manifest["fingerprint"]["parents"]) == {"comparisons"}
    number, mean, squares = manifest["results"]["reward_moments"]["brevity"]
    assert number == 16
    assert squares > 0
    row = read_metrics(lab / "runs/tiny/ppo")[0]
    assert row["reward/brevity"] == pytest.approx(mean)
    assert row["objective/score"] == pytest.approx(row["reward/vader"], abs=1e-5)  # the other has mean 0
    stage(evaluate.main, alone, "ppo.steps=1", "evaluate.judge=reward", "evaluate.prompts=4")
    summary = read_json(lab / "runs/tiny/evaluate/summary.json")
    rows = [json.loads(x) for x in (lab / "runs/tiny/evaluate/responses.jsonl").read_text().splitlines()]
    said, deviation = [row["after"] for row in rows], (squares / number) ** 0.5
    expected = [(-len(t) / 10 - mean) / deviation + v for t, v in zip(said, vader(said), strict=True)]
    assert summary["reward"]["after"] == pytest.approx(
        sum(expected) / len(said), abs=1e-5
    )  # as PPO's end saw it


# ---- the mixture by itself


def said(texts=("a b", "c", "de f g")):
    rows = [[7, 8, *TOKENIZER(text, add_special_tokens=False)["input_ids"], 1] for text in texts]
    ids, mask = left_pad(rows, 0)
    return Responses(PROMPTS[: len(texts)], list(texts), ids, mask, None, 2)


def constant(*values):
    return lambda responses: torch.tensor(values)


def test_the_sum_is_weighted_normalized_by_all_scores_so_far_and_passes_over_nan():
    first, second = torch.tensor([1.0, float("nan"), 3.0]), torch.tensor([5.0, 2.0, float("nan")])
    calls = iter([first, second])
    mixture = RewardMixture(
        [
            WeightedReward("a", 2.0, normalize=True, score=lambda _: next(calls), together=True),
            WeightedReward("b", -1.0, score=constant(1.0, 1.0, 1.0), together=True),
        ],
        micro_batch_size=2,
    )
    known = torch.tensor([1.0, 3.0])
    expected = 2 * torch.nan_to_num((first - known.mean()) / known.std(correction=0)) - 1
    torch.testing.assert_close(mixture(said()), expected)
    known = torch.tensor([1.0, 3.0, 5.0, 2.0])
    expected = 2 * torch.nan_to_num((second - known.mean()) / known.std(correction=0)) - 1
    torch.testing.assert_close(mixture(said()), expected)
    figures = mixture.figures(lambda tensor: tensor, torch.device("cpu"))
    assert figures == {"reward/a": 2.75, "reward/a/applies": 4 / 6, "reward/b": 1.0}
    assert mixture.figures(lambda tensor: tensor, torch.device("cpu")) == {}
    before, calls = mixture.state(), iter([second])
    reference = said()._replace(logged=False)  # scored as the others are, and nothing moves
    known_N = (second - 2.75) / known.std(correction=0)
    torch.testing.assert_close(mixture(reference), 2 * torch.nan_to_num(known_N) - 1)
    assert mixture.state() == before
    assert mixture.figures(lambda tensor: tensor, torch.device("cpu")) == {}
    fixed = RewardMixture(mixture.parts, micro_batch_size=2, moments=mixture.moments)
    calls = iter([first, first])
    assert torch.equal(fixed(said()), fixed(said()))


def test_a_model_reads_micro_batches_and_a_function_a_whole_rollout():
    seen = {"model": [], "function": []}

    def note(name):
        def score(responses):
            seen[name].append((responses.texts, responses.ids_BT[:, responses.start :].shape[0]))
            return torch.zeros(len(responses.texts))

        return score

    parts = [
        WeightedReward("m", score=note("model")),
        WeightedReward("f", score=note("function"), together=True),
    ]
    RewardMixture(parts, micro_batch_size=2)(said())
    assert seen["model"] == [(["a b", "c"], 2), (["de f g"], 1)]
    assert seen["function"] == [(["a b", "c", "de f g"], 3)]


@pytest.mark.parametrize(
    ("scores", "together"),
    [((1.0, float("inf"), 0.0), True), ((1.0, 2.0), True), ((1.0, float("nan"), 0.0), False)],
)
def test_a_part_with_other_scores_is_named(scores, together):
    mixture = RewardMixture(
        [WeightedReward("odd", score=constant(*scores), together=together)], micro_batch_size=8
    )
    with pytest.raises(UserError, match=r"ppo\.rewards: odd gave \(\d,\) scores, not all finite, for 3"):
        mixture(said())


def test_a_training_that_is_over_stands_at_its_last_step(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def step(completions, trainer_state):\n"
        "    return [trainer_state.global_step / trainer_state.max_steps for _ in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    step = RewardFunction("my_rewards.py:step", "ppo.rewards[0]", chat=False)
    parts = [WeightedReward("step", score=text_reward(step), together=True, function=step)]
    over = RewardMixture(parts, micro_batch_size=8, steps=5, moments={})
    assert [over(said())[0].item() for _ in range(3)] == [1.0, 1.0, 1.0]
    begun = RewardMixture(parts, micro_batch_size=8, steps=5)
    assert [begun(said())[0].item() for _ in range(3)] == pytest.approx([0.0, 0.2, 0.4])


def test_a_resumed_run_goes_on_with_the_moments_and_the_step_that_it_had(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def later(completions, trainer_state):\n"
        "    return [trainer_state.global_step * len(text) for text in completions]\n"
    )
    monkeypatch.chdir(tmp_path)

    def mixed():
        later = RewardFunction("my_rewards.py:later", "ppo.rewards[0]", chat=False)
        parts = [
            WeightedReward("later", 1.0, True, text_reward(later), True, later),
            WeightedReward("varied", 0.5, score=varied),
        ]
        return RewardMixture(parts, micro_batch_size=4)

    options = SMALL | {"checkpoint_every": 1}
    whole = trainer(tmp_path / "whole", reward_fn=mixed(), steps=4, **options)
    whole.train()
    monkeypatch.setattr(
        "policy.ppo.trainer.PpoTrainer.remaining_steps", lambda self: range(self.done, min(self.done + 2, 4))
    )
    for _ in range(2):
        part = trainer(tmp_path / "parts", reward_fn=mixed(), steps=4, **options)
        part.train()
    assert part.done == 4
    assert part.reward_fn.state() == whole.reward_fn.state()
    assert part.reward_fn.state()["reward_moments"]["later"][0] == 32
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(part)[name], tensor), name


@pytest.mark.parametrize("way", ["in place", "through .data"])
def test_a_reward_function_that_writes_to_the_model_is_told(tmp_path, way):
    def writes(responses):
        with torch.no_grad():
            weight = next(p for p in built.backbone.parameters() if p.requires_grad)
            (weight if way == "in place" else weight.data).add_(1.0)
        return varied(responses)

    built = trainer(tmp_path, reward_fn=writes, steps=1, **SMALL)
    with pytest.raises(UserError, match="the reward function wrote to the weights that are trained"):
        built.train()


# ---- recipes


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ("[{}]", "a reward is one of model, function and judge"),
        ("[{model: reward, judge: vader}]", "a reward is one of model, function and judge"),
        ("[{function: brevity}]", r"brevity is not of the form FILE\.py:NAME"),
        ("[{judge: vador}]", r"name vader, a function as FILE\.py:NAME, or a server"),
        ("[{judge: vader}, {judge: vader, weight: 2}]", "two are called vader"),
        ("[{judge: vader, weight: 0}]", "every weight is 0"),
        ("[{judge: vader, weights: 1}]", r"unknown key ppo\.rewards\.0\.weights"),
        ("[{judge: {url: 'http://127.0.0.1:1/v1'}}]", "model: Field required"),
        ("[{judge: {url: 'http://10.0.0.1/v1', model: m}}]", "is on another machine"),
        ("[{judge: {url: 'file:///etc/passwd', model: m}}]", "is none of http"),
        ("[{judge: {url: 'http://localhost/v1', model: m, prompt: rate it}}]", "does not hold {response}"),
        (
            "[{judge: {url: 'http://localhost/v1', model: m, lowest: 10}}]",
            "lowest 10 is not below highest 10",
        ),
        (
            "[{judge: {url: 'http://localhost/v1', model: m, pattern: '['}}]",
            "pattern is no regular expression",
        ),
        ("[{judge: {url: 'http://localhost/v1', model: m, pattern: 'a'}}]", "pattern has 0 groups"),
        ("[{function: gone.py:brevity}]", r"ppo\.rewards: no file matches gone\.py"),
        ("[{model: runs/gone/reward/model}]", r"ppo\.rewards\[0\]\.model: .* is not a folder"),
    ],
)
def test_rewards_that_cannot_be_are_refused_with_the_recipe(rewards, message):
    with pytest.raises(UserError, match=message):
        tiny_recipe(f"ppo.rewards={rewards}")


def test_rewards_stand_instead_of_a_reward_model(tmp_path):
    with pytest.raises(UserError, match="name the reward model in rewards"):
        tiny_recipe(f"ppo.reward_model={tmp_path}", "ppo.rewards=[{judge: vader}]")
    recipe = tiny_recipe("ppo.rewards=[{judge: vader}]")
    assert (recipe.ppo.own_reward, recipe.ppo.named_models) == (False, [])
    recipe = tiny_recipe(f"ppo.rewards=[{{model: reward}}, {{model: {tmp_path}, name: other}}]")
    assert (recipe.ppo.own_reward, recipe.ppo.named_models) == (True, [str(tmp_path)])


def test_the_recipe_and_the_function_of_the_page_are_valid(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/rewards.md").read_text(encoding="utf-8")
    ((kind, recipe), (_, function)) = re.findall(r"```(yaml|python)\n(.*?)```", page, re.S)
    section = Ppo.model_validate(yaml.safe_load(recipe)["ppo"])
    assert kind == "yaml"
    assert [r.label for r in section.rewards] == [
        "reward", "OTHER", "CLASSIFIER", "brevity", "vader", "helpful"
    ]  # fmt: skip
    (tmp_path / "own.py").write_text(function)
    judge = RewardFunction("own.py:brevity", "ppo.rewards[0]", chat=False)
    assert judge([PROMPTS[0]], ["x" * 50]) == [-0.5]
