"""A test model beside the reward: its scores in the log, the best policy by them, what it leaves alone."""

import json
import math
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import slow_but, stage, tiny_recipe
from safetensors.torch import load_file
from tiny_ppo import SMALL, backbone_of, trainer, weights

from policy.audit.best import BestPolicy
from policy.audit.scores import AuditedScore
from policy.evaluate import __main__ as evaluate
from policy.ppo import __main__ as ppo
from policy.ppo.rollout import Responses
from reward.training import __main__ as reward_stage
from rlhf.data.comparisons import Message
from rlhf.errors import UserError
from rlhf.recipe.schema import Ppo
from rlhf.runs.artifacts import WEIGHTS, read_json, read_jsonl, write_json
from rlhf.stats.overoptimization import verdict
from rlhf.training.metrics import read_metrics

CPU = torch.device("cpu")
LAB = SMALL | {"steps": 30, "batch_size": 32, "micro_batch_size": 32, "epochs": 2, "learning_rate": 1e-2,
               "limit": 8, "kl_coef": 0.0, "schedule": "constant", "keep_best": True}  # fmt: skip
BASE = backbone_of(Ppo(), width=SMALL["width"]).base.get_output_embeddings().weight.detach()
TASTE = BASE @ torch.randn(SMALL["width"], generator=torch.Generator().manual_seed(3))
TASTE = (TASTE - TASTE.mean()) / TASTE.std()


def taste(said):
    """What the tokens of a response are worth on average: something that a policy can learn to raise."""
    ids, mask = said.ids_BT[:, said.start :], said.mask_BT[:, said.start :]
    return (TASTE[ids] * mask).sum(-1) / mask.sum(-1)


def noise(said, kind):
    return torch.tensor([(sum(map(ord, text)) * kind % 97) / 97 - 0.5 for text in said.texts])


def proxy(said):
    return taste(said) + noise(said, 53)


def honest(said):
    return taste(said) + noise(said, 31)


def goodhart(said):
    """Agrees with the proxy up to 0.5, and finds more of it worse."""
    return -(taste(said) - 0.5).square()


def judged(built):
    return verdict(read_metrics(built.folder), built.section.steps, built.weights.best.chosen().step)


# ---- the verdict on trainings


@pytest.fixture(scope="module")
def hacked(tmp_path_factory):
    """A finished training against a proxy that is wrong beyond a point."""
    built = trainer(tmp_path_factory.mktemp("hacked"), reward_fn=proxy, test_fn=goodhart, **LAB)
    built.train()
    return built


def test_a_proxy_that_is_exploited_is_found_within_some_steps_and_the_best_policy_is_kept(hacked):
    found, rows = judged(hacked), read_metrics(hacked.folder)
    assert found["verdict"] == "over-optimized"
    assert 4 <= found["onset"] <= 12
    assert found["onset"] <= found["seen"] <= 20
    assert found["proxy"]["ci95"][0] > 1
    kept = hacked.weights.best.chosen()
    assert 4 <= kept.step <= 12
    assert f"The saved policy is that of step {kept.step};" in found["text"]
    tests = [row["audit/test"] for row in rows]
    assert sum(tests[kept.step - 3 : kept.step + 2]) / 5 == pytest.approx(
        max(sum(tests[i : i + 5]) / 5 for i in range(26)), abs=0.15
    )


@pytest.mark.slow
def test_a_proxy_that_is_right_is_not_blamed(tmp_path):
    built = trainer(tmp_path, reward_fn=proxy, test_fn=honest, **LAB)
    built.train()
    found = judged(built)
    assert found["verdict"] == "no sign"
    assert found["onset"] is None
    assert found["test"]["ci95"][0] > 1
    assert built.weights.best.chosen().step > 12


# ---- what is saved


def test_the_saved_policy_is_that_which_wrote_the_rollout_and_the_last_one_stands_beside_it(hacked, tmp_path):
    step = hacked.weights.best.chosen().step
    hacked.save()
    for name, steps in (("policy", step - 1), ("policy_last", 30)):
        other = trainer(tmp_path / name, reward_fn=proxy, **LAB | {"steps": steps, "keep_best": False})
        other.train()
        other.save()
        saved, alone = (load_file(at / WEIGHTS) for at in (hacked.folder / name, other.folder / "policy"))
        assert all(torch.equal(saved[key], tensor) for key, tensor in alone.items())


@pytest.mark.parametrize("stops", slow_but([5], [5, 9, 12]))
def test_an_interrupted_run_keeps_the_same_policy_bit_for_bit(stops, hacked, tmp_path):
    calls = []

    def interrupted(said):
        calls.append(said)
        if len(calls) == stops:
            raise KeyboardInterrupt
        return proxy(said)

    options = {"test_fn": goodhart, **LAB, "checkpoint_every": 3}
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, reward_fn=interrupted, **options).train()
    again = trainer(tmp_path, reward_fn=proxy, **options)
    assert 0 < again.done < stops
    again.train()
    one, other = again.weights.best.chosen(), hacked.weights.best.chosen()
    assert (one.step, one.bound) == (other.step, other.bound)
    assert all(torch.equal(one.tensors[name], tensor) for name, tensor in other.tensors.items())
    audited = [{k: v for k, v in r.items() if k.startswith("audit/")} for r in read_metrics(tmp_path)]
    whole = [{k: v for k, v in r.items() if k.startswith("audit/")} for r in read_metrics(hacked.folder)]
    assert audited == whole


def test_without_a_test_model_nothing_is_chosen(tmp_path):
    with pytest.raises(UserError, match=r"keep_best chooses by a test model"):
        trainer(tmp_path, **SMALL, keep_best=True).train()
    with pytest.raises(UserError, match=r"ppo\.keep_best chooses by a test model: set reward\.test_share"):
        tiny_recipe("ppo.keep_best=true")
    with pytest.raises(UserError, match="keep_best and ema_decay both say"):
        tiny_recipe("ppo.keep_best=true", "ppo.ema_decay=0.9", "reward.test_share=0.5")
    with pytest.raises(UserError, match="test_reward_model is a reward that is trained on"):
        tiny_recipe("ppo.reward_model=a", "ppo.test_reward_model=a")
    tiny_recipe("ppo.keep_best=true", "reward.test_share=0.5")


def test_the_best_is_smoothed_and_bounded_and_the_last_ones_count_by_what_there_is():
    def best_of(scores, error=0.1):
        best = BestPolicy()
        for number, score in enumerate(scores, 1):
            best.sampled({"w": torch.tensor(float(number))})
            best.judged(score, error)
            assert len(best.waiting) <= 3
        assert best.chosen().tensors["w"] == best.chosen().step
        return best.chosen()

    assert best_of([0, 1, 2, 3, 2, 1, 0]).step == 4
    assert best_of([0, 0, 0, 9, 0, 0, 0, 5, 5, 5, 5, 5]).step == 10  # one lucky rollout
    assert best_of([0, 1, 2, 3, 4, 5]).step == 6
    assert best_of([3.0]).bound == pytest.approx(3 - 1.96 * 0.1, abs=1e-4)
    assert best_of([1.0] * 5).step == 3  # equal means: the one that is known best
    assert best_of([1.0, 2.0], error=math.nan).bound == 1.5


# ---- what the log says


def responses(texts, prompts=None):
    prompts = prompts or texts
    ids = torch.ones(len(texts), 3, dtype=torch.long)
    asked = [(Message("user", prompt),) for prompt in prompts]
    return Responses(asked, list(texts), ids, ids.bool(), None, 1)


def scored(values):
    return lambda said: torch.tensor([values[text] for text in said.texts])


def test_rises_are_in_deviations_of_the_first_rollout_and_errors_know_the_samples_of_a_prompt():
    first, later = {"a": 1.0, "b": 3.0, "c": 5.0, "d": 7.0}, {"e": 5.0, "f": 9.0, "g": 4.0, "h": 8.0}
    tests = {"a": 0.0, "b": 1.0, "c": 0.0, "d": 1.0, "e": 2.0, "f": 0.0, "g": 1.0, "h": 0.0}
    audited = AuditedScore(scored(first | later), scored(tests), 3)
    assert audited(responses("abcd")).tolist() == [1.0, 3.0, 5.0, 7.0]
    found = audited.figures(lambda sums: sums, CPU)
    assert found["audit/proxy"] == found["audit/test"] == found["audit/gap"] == 0
    assert found["audit/score"] == 0.5
    audited(responses("ef", "xy"))
    audited(responses("gh", "xy"))  # two prompts, two samples each, in two micro-batches
    found = audited.figures(lambda sums: sums, CPU)
    deviation = 5**0.5  # of 1, 3, 5, 7
    rises = [(v - 4) / deviation for v in later.values()]
    others = [(tests[t] - 0.5) / 0.5 for t in "efgh"]
    assert found["audit/score"] == pytest.approx(0.75)
    for name, x in (("proxy", rises), ("test", others), ("gap", [p - t for p, t in zip(rises, others)])):  # noqa: B905
        mean = sum(x) / 4
        clusters = [(x[0] + x[2] - 2 * mean), (x[1] + x[3] - 2 * mean)]
        assert found[f"audit/{name}"] == pytest.approx(mean)
        assert found[f"audit/{name}_error"] == pytest.approx(math.sqrt(2 * sum(c * c for c in clusters)) / 4)

    again = AuditedScore(scored(first | later), scored(tests), 2)
    again.restore(json.loads(json.dumps(audited.state())))
    again(responses("efgh", "xyxy"))
    assert again.figures(lambda sums: sums, CPU) == pytest.approx(found)


def test_two_processes_log_what_one_does():
    values, tests = ({t: (ord(t) * k % 11) / 3 for t in "abcdefgh"} for k in (5, 7))
    halves, whole = ([AuditedScore(scored(values), scored(tests), 8) for _ in range(n)] for n in (2, 1))
    barrier, sent = threading.Barrier(2), [torch.zeros(0)] * 2

    def of_process(rank):
        def all_sum(sums):
            sent[rank] = sums
            barrier.wait(10)
            total = sent[0] + sent[1]
            barrier.wait(10)
            return total

        return halves[rank].figures(all_sum, CPU)

    with ThreadPoolExecutor(2) as both:
        for texts in ("abcd", "efgh"):
            whole[0](responses(texts))
            for half, own in zip(halves, (texts[:2], texts[2:]), strict=True):
                half(responses(own))
            expected = pytest.approx(whole[0].figures(lambda sums: sums, CPU))
            assert list(both.map(of_process, (0, 1))) == [expected, expected]


def test_a_test_score_that_is_not_finite_ends_the_run_with_a_line(tmp_path):
    bad = lambda said: torch.full((len(said.texts),), math.nan)  # noqa: E731
    with pytest.raises(UserError, match="scores of the test model are not finite"):
        trainer(tmp_path, test_fn=bad, **SMALL).train()


def test_the_training_has_the_same_bits_with_and_without_it(tmp_path):
    options = SMALL | {"steps": 3, "score_normalization": "running", "micro_batch_size": 4}
    plain, audited = (
        trainer(tmp_path / str(n), test_fn=fn, **options) for n, fn in enumerate((None, honest))
    )
    for built in (plain, audited):
        built.train()
    assert all(torch.equal(weights(audited)[name], tensor) for name, tensor in weights(plain).items())
    logs = [read_metrics(built.folder) for built in (plain, audited)]
    for one, other in zip(*logs, strict=True):
        assert {k for k in other if k not in one} == {k for k in other if k.startswith("audit/")} != set()
        assert all(other[k] == v for k, v in one.items() if not k.startswith("time/"))


# ---- the stages


@pytest.fixture
def before_ppo(road, tmp_path, monkeypatch):
    """A current folder with everything before PPO done."""
    shutil.copytree(road, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for name in ("ppo", "evaluate"):
        shutil.rmtree(f"runs/tiny/{name}")
    return tmp_path


def test_ppo_is_the_same_to_the_bit_beside_a_test_model(road, before_ppo, capsys):
    shutil.copytree("runs/tiny/reward/model", "other")
    stage(ppo.main, "ppo.test_reward_model=other")
    printed = capsys.readouterr().out
    assert "test model: " in printed
    assert "no part of the reward" in printed
    for adapter in ("policy", "value"):
        mine, theirs = (load_file(at / "runs/tiny/ppo" / adapter / WEIGHTS) for at in (Path(), road))
        assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())
    rows = read_metrics(Path("runs/tiny/ppo"))
    assert all(row["audit/score"] == pytest.approx(row["objective/score"], abs=1e-5) for row in rows)
    assert all(row["audit/gap"] == pytest.approx(0, abs=1e-5) for row in rows)
    results = read_json(Path("runs/tiny/ppo/manifest.json"))["results"]
    assert "audits and does not foresee" in results["audit"]["text"]
    assert results["audit"]["text"] in printed


def test_a_run_without_one_says_what_its_verdict_is_worth(road):
    results = read_json(road / "runs/tiny/ppo/manifest.json")["results"]
    assert results["audit"]["verdict"] == "no sign"
    assert "Without a test model nobody checks the score itself" in results["audit"]["text"]
    assert "kept_step" not in results


@pytest.mark.slow
def test_the_whole_road_with_a_test_model_of_its_own(road, before_ppo, capsys):
    words = ("reward.test_share=0.5", "ppo.keep_best=true", "evaluate.best_of=2", "evaluate.judge=reward")
    with pytest.raises(UserError, match=r"reward/test_model is not there.*make reward"):
        stage(ppo.main, *words)  # the reward stage has run without
    shutil.rmtree("runs/tiny/reward")
    shutil.rmtree("runs/tiny/ppo")
    for main in (reward_stage.main, ppo.main, evaluate.main):
        stage(main, *words)
    printed = capsys.readouterr().out
    results = read_json(Path("runs/tiny/ppo/manifest.json"))["results"]
    assert (
        f"ppo: kept the policy of step {results['kept_step']} of {results['steps']}, the test model's best"
        in printed
    )
    assert (Path("runs/tiny/ppo/policy_last") / WEIGHTS).is_file()
    summary = read_json(Path("runs/tiny/evaluate/summary.json"))
    assert list(summary["samples"][0]["scores"]) == ["test", "reward"]
    assert summary["over_optimization"] == results["audit"]
    assert summary["best_of_n"]["judge"] == "test"
    rows = [row["scores"] for row in read_jsonl(Path("runs/tiny/evaluate/responses.jsonl"))]
    change = {}
    for name in ("reward", "test"):
        before, after = (np.array([row[name][side] for row in rows]) for side in (0, 1))
        change[name] = (after - before).mean() / before.std()
    assert summary["gap"]["mean"] == pytest.approx(change["reward"] - change["test"])
    low, high = summary["gap"]["ci95"]
    assert low < summary["gap"]["mean"] < high
    page = Path("runs/tiny/evaluate/summary.md").read_text()
    assert f"Over-optimization: {results['audit']['text']}" in page
    assert "| test model (never a reward) |" in page
    (before_ppo / "runs/tiny/reward/test_model" / WEIGHTS).write_bytes(b"damaged")
    shutil.rmtree("runs/tiny/ppo")
    with pytest.raises(UserError, match="test_model"):
        stage(ppo.main, *words)


@pytest.mark.slow
def test_a_test_model_on_another_base_reads_the_text_and_one_that_is_not_there_is_told(before_ppo, capsys):
    with pytest.raises(UserError, match=r"ppo\.test_reward_model: .*nowhere"):
        stage(ppo.main, "ppo.test_reward_model=nowhere")
    shutil.copytree("models/tiny", "other/base")
    shutil.copytree("runs/tiny/reward/model", "other/model")
    config = read_json(Path("other/model/reward_model.json")) | {"base": "other/base"}
    write_json(Path("other/model/reward_model.json"), config)
    stage(ppo.main, "ppo.test_reward_model=other/model", "ppo.steps=2")
    assert "test model: other/model, on its own base, reads the text" in capsys.readouterr().out
    rows = read_metrics(Path("runs/tiny/ppo"))
    assert all(row["audit/score"] == pytest.approx(row["objective/score"], abs=0.1) for row in rows)
