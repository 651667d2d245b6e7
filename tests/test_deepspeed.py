"""Two processes do what one process does, whatever ZeRO shards.

CPU processes over gloo; one start of either stage goes through the real launcher. Every run of PPO is killed
after its first checkpoint and started again, so each curve that is compared holds a resume. Equal means:
within 5e-6, where float32 sums in another order were seen to differ by up to 1e-6; the gradient clip is low
enough to be at work in most updates.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import ranks
from conftest import ROOT, slow_but, stage
from ranks import finish
from safetensors.torch import load_file

from rlhf.runs.artifacts import MANIFEST

TOLERANCE = 5e-6
ONE_PAIR = 0.02  # of the pairs of a batch in these tests, 57 or more, and a little
PPO = ("ppo.steps=3", "ppo.checkpoint_every=1", "ppo.max_grad_norm=0.3")
REWARD = (
    "reward.batch_size=38",  # all comparisons, so that no batch is padded
    "reward.epochs=4",
    "reward.warmup_ratio=0",
    "reward.max_grad_norm=0.3",
    "reward.tokens_per_micro_batch=380",
    "reward.lm_coef=0.5",
)


def copy_of(road, to, *stages):
    """A folder with the model and some finished stages of the road."""
    to.mkdir()
    shutil.copytree(road / "models", to / "models")
    for name in stages:
        shutil.copytree(road / "runs" / "tiny" / name, to / "runs" / "tiny" / name)
    return to


def interrupt(folder, *overrides):
    """PPO on two processes, killed after its first checkpoint."""
    done = folder / "runs" / "tiny" / "ppo"
    ranks.interrupt(folder, "ppo", lambda: list(done.glob("checkpoints/step-*")), done / MANIFEST, *overrides)


def curve(folder, name):
    lines = (folder / "runs" / "tiny" / name / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def assert_close(folder, alone, name, *adapters):
    """Every figure of every step, and every weight of the result."""
    mine, expected = curve(folder, name), curve(alone, name)
    assert [row["step"] for row in mine] == [row["step"] for row in expected]
    for row, wanted in zip(mine, expected, strict=True):
        # two scores of a random model may be equal up to rounding: such a pair is half right, or right
        for of_one in (row, wanted):
            of_one.pop("sft/filled", None)  # every process packs its own rows
            if of_one["step"] == 1:
                of_one.pop("dpo/accuracy", None)  # the policy is its reference: margins are 0 up to rounding
        share = row.pop("reward/pair_accuracy", 0.0) - wanted.pop("reward/pair_accuracy", 0.0)
        assert abs(share) < ONE_PAIR
        assert row == pytest.approx(wanted, abs=TOLERANCE, rel=TOLERANCE), row["step"]
    for adapter in adapters:
        file = f"runs/tiny/{name}/{adapter}/adapter_model.safetensors"
        tensors, wanted = load_file(folder / file), load_file(alone / file)
        assert set(tensors) == set(wanted)
        for key, tensor in tensors.items():
            assert float((tensor - wanted[key]).abs().max()) <= TOLERANCE, (adapter, key)


def alone_in(folder, main, *overrides):
    """One process, this one."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        stage(main, *overrides)
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(scope="module")
def alone(road, tmp_path_factory):
    """PPO in one process."""
    from policy.ppo import __main__ as train

    folder = copy_of(road, tmp_path_factory.mktemp("alone") / "run", "comparisons", "reward")
    return alone_in(folder, train.main, *PPO)


@pytest.fixture(scope="module")
def stopped(road, tmp_path_factory):
    """PPO on two processes with ZeRO 2, killed after its first checkpoint."""
    folder = copy_of(road, tmp_path_factory.mktemp("stopped") / "run", "comparisons", "reward")
    interrupt(folder, *PPO, "distributed.zero_stage=2")
    return folder


def test_the_clip_is_at_work(alone):
    assert min(row["policy/grad_norm"] for row in curve(alone, "ppo")) > 0.3


@pytest.mark.parametrize("zero", slow_but([0], [0, 3]))
def test_two_processes_and_a_kill_learn_what_one_process_learns(zero, road, alone, tmp_path):
    here = copy_of(road, tmp_path / "here", "comparisons", "reward")
    interrupt(here, *PPO, f"distributed.zero_stage={zero}")
    said = finish(here, "ppo", *PPO, f"distributed.zero_stage={zero}")
    assert "ppo: going on after step" in said
    assert_close(here, alone, "ppo", "policy", "value")


# each process's states, and with ZeRO-3 its weights, lie on the CPU by DeepSpeed's own ways of offloading
@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero", "options"),
    [
        (2, ["distributed.offload_optimizer=cpu", "model.gradient_checkpointing=true"]),
        (3, ["distributed.offload_optimizer=cpu", "distributed.offload_param=cpu",
             "model.gradient_checkpointing=true",
             "distributed.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}"]),
    ],
    ids=["2", "3"],
)  # fmt: skip
def test_offloaded_and_checkpointed_processes_learn_the_same(zero, options, road, alone, tmp_path):
    here = copy_of(road, tmp_path / "here", "comparisons", "reward")
    options = [*PPO, *options, f"distributed.zero_stage={zero}"]
    interrupt(here, *options)
    said = finish(here, "ppo", *options)
    assert "ppo: going on after step" in said
    assert_close(here, alone, "ppo", "policy", "value")


# from ZeRO 2 to ZeRO 2 and, because a checkpoint holds whole tensors, to ZeRO 3
@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_a_run_of_zero_2_goes_on_with_any_zero_stage(zero, stopped, alone, tmp_path):
    here = Path(shutil.copytree(stopped, tmp_path / "here"))
    start = ranks.Launched if zero == 3 else ranks.Forked
    said = finish(here, "ppo", *PPO, f"distributed.zero_stage={zero}", start=start)
    assert "ppo: going on after step" in said
    assert_close(here, alone, "ppo", "policy", "value")
    results = json.loads((here / "runs" / "tiny" / "ppo" / MANIFEST).read_text())["results"]
    assert (results["processes"], results["zero"]) == (2, zero)


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_with_one(stopped, alone, tmp_path, capfd):
    from policy.ppo import __main__ as train

    here = Path(shutil.copytree(stopped, tmp_path / "here"))
    alone_in(here, train.main, *PPO)
    assert "ppo: going on after step" in capfd.readouterr().out
    assert_close(here, alone, "ppo", "policy", "value")


@pytest.fixture(scope="module")
def single(road, tmp_path_factory):
    """The reward stage in one process, and the numbers of micro-batches that halves of its steps make."""
    from reward.model.batch import micro_batches
    from reward.training import __main__ as train
    from reward.training.trainer import PreferenceTrainer

    folder = copy_of(road, tmp_path_factory.mktemp("single") / "run", "comparisons")
    parts, step = [], PreferenceTrainer.training_step

    def watched(self, model, inputs, *rest, **more):
        examples, own = inputs["examples"], len(inputs["examples"]) // 2
        halves = examples[:own], examples[own:]  # what each of two processes gets of a batch
        parts.append(tuple(len(micro_batches(half, self._budget, share=self._share)) for half in halves))
        return step(self, model, inputs, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreferenceTrainer, "training_step", watched)
        alone_in(folder, train.main, *REWARD)
    return folder, parts


@pytest.mark.parametrize("zero", slow_but([0], [0, 2, 3]))
def test_two_processes_train_the_reward_model_of_one(zero, single, road, tmp_path, monkeypatch):
    from reward.model.model import TextRewardModel
    from rlhf.data.comparisons import Message

    alone, parts = single
    assert len(parts) == 4
    assert {first > second for first, second in parts if first != second} == {True, False}, (
        "their work must differ"
    )
    assert min(row["reward/grad_norm"] for row in curve(alone, "reward")) > 0.3
    here = copy_of(road, tmp_path / "here", "comparisons")
    start = ranks.Launched if zero == 2 else ranks.Forked
    finish(here, "reward", *REWARD, f"distributed.zero_stage={zero}", start=start)
    assert_close(here, alone, "reward", "model")
    figures = [json.loads((f / "runs/tiny/reward" / MANIFEST).read_text())["results"] for f in (here, alone)]
    for name in ("held_out_accuracy", "train_accuracy", "probe_accuracy"):
        assert figures[0][name] == figures[1][name]
    monkeypatch.chdir(road)  # the card names the base relative to the run
    prompts = [(Message("user", text),) for text in ("The film was", "We waited", "I")]
    scores = [
        TextRewardModel(folder / "runs/tiny/reward/model").score(prompts, ["great fun.", "for an hour.", ""])
        for folder in (here, alone)
    ]
    assert scores[0].tolist() == pytest.approx(scores[1].tolist(), abs=1e-4)
    assert scores[1].std() > 0.01


@pytest.mark.slow
def test_offloaded_processes_train_the_reward_model_of_one(single, road, tmp_path):
    here = copy_of(road, tmp_path / "here", "comparisons")
    options = [f"distributed.offload_{name}=cpu" for name in ("optimizer", "param")]
    options += ["distributed.zero_stage=3", "model.gradient_checkpointing=true"]
    finish(here, "reward", *REWARD, *options)
    assert_close(here, single[0], "reward", "model")


SHORT = ("reward.layers=2", "reward.pooling=mean")


@pytest.mark.slow
def test_two_processes_agree_with_one_on_a_reward_model_of_fewer_layers(road, tmp_path):
    """ZeRO-3 takes the layers apart, and a role goes through some of them only."""
    from policy.ppo import __main__ as ppo
    from reward.training import __main__ as train

    alone = copy_of(road, tmp_path / "alone", "comparisons")
    few = [option for option in REWARD if "lm_coef" not in option]
    options = (*SHORT, *few, *PPO[:1], "distributed.zero_stage=3")
    alone_in(alone, train.main, *options)
    here = copy_of(alone, tmp_path / "here", "comparisons", "reward")
    alone_in(alone, ppo.main, *options)
    finish(here, "ppo", *options)
    assert_close(here, alone, "ppo", "policy", "value")
    shutil.rmtree(here / "runs/tiny/reward")
    finish(here, "reward", *options)
    assert_close(here, alone, "reward", "model")
    assert json.loads((here / "runs/tiny/reward/model/reward_model.json").read_text())["layers"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero", "base", "name", "more"),
    [(3, "quantization=nf4", "reward", ()), (2, "dtype=bfloat16", "ppo", ()),
     (1, "quantization=int8", "reward", SHORT), (0, "dtype=float16", "ppo", ()),
     (3, "quantization=int8", "ppo", SHORT)],
)  # fmt: skip
def test_two_processes_train_over_any_base(zero, base, name, more, inside):
    from reward.training import __main__ as train
    from rlhf.collect import __main__ as collect
    from rlhf.models import prepare

    options = (
        *more, f"model.{base}", "collect={prompts: 8, responses: 2}", "data.held_out=0.3",
        "reward.batch_size=4",
        "reward.reference_responses=8", "ppo.steps=1", "ppo.batch_size=8", "ppo.micro_batch_size=2",
    )  # fmt: skip
    for main in (prepare.main, collect.main, *([train.main] if name == "ppo" else [])):
        stage(main, *options)
    if (zero, base) == (3, "quantization=nf4"):
        options = (*options, *(f"distributed.offload_{part}=cpu" for part in ("param", "optimizer")))
    finish(inside, name, *options, f"distributed.zero_stage={zero}")
    assert (inside / "runs" / "tiny" / name / MANIFEST).is_file()


@pytest.mark.slow
def test_two_processes_keep_the_policy_that_one_keeps_by_a_test_model(road, tmp_path):
    """And train two reward models one after the other, each with an engine of its own."""
    from policy.ppo import __main__ as ppo
    from reward.training import __main__ as train

    alone = copy_of(road, tmp_path / "alone", "comparisons")
    options = ("reward.test_share=0.5", "reward.batch_size=8", "ppo.keep_best=true", *PPO,
               "distributed.zero_stage=3")  # fmt: skip
    alone_in(alone, train.main, *options)
    here = copy_of(alone, tmp_path / "here", "comparisons", "reward")
    alone_in(alone, ppo.main, *options)
    finish(here, "ppo", *options)
    assert_close(here, alone, "ppo", "policy", "policy_last", "value")
    results = [json.loads((f / "runs/tiny/ppo" / MANIFEST).read_text())["results"] for f in (here, alone)]
    assert results[0]["kept_step"] == results[1]["kept_step"]
    shutil.rmtree(here / "runs/tiny/reward")
    finish(here, "reward", *options)
    assert (here / "runs/tiny/reward/test_model/reward_model.json").is_file()


def made(*arguments):
    """The last command that make would run."""
    command = ["make", "--no-print-directory", "-n", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("target", "module"),
    [("ppo", "policy.ppo"), ("reward", "reward.training"), ("card", "reward.card"),
     ("evaluate", "policy.evaluate"), ("tax", "policy.alignment_tax")],
)  # fmt: skip
def test_make_starts_what_processes_can_share_through_the_launcher(target, module):
    recipe, setting = "RECIPE=recipes/tiny.yaml", "SET=name=x ppo.steps=2"
    launched = f"-m rlhf.training.launch {module} recipes/tiny.yaml name=x ppo.steps=2"
    assert launched in made(target, "PROCS=2", recipe, setting)
    assert "launch" not in made("comparisons", "PROCS=2", recipe, setting)
