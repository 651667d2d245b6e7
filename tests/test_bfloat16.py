"""Every stage over a base in bfloat16: what is float32 all the same, what is exact, what a restart keeps."""

import itertools

import pytest
import torch
from conftest import ROOT, stage
from safetensors.torch import load_file
from tiny_ppo import trainer, weights

from benchmarks.faults.killed_process import Plan, Start, link_stages, outcome
from policy.ppo import update
from rlhf.runs.artifacts import read_json
from rlhf.training.metrics import read_metrics

HALF = torch.bfloat16
RECIPE = ROOT / "recipes" / "tiny_assistant.yaml"
KINDS = {
    "ppo": {},
    "ppo, value shared": {"value": "shared"},
    "rloo": {"algorithm": "rloo", "samples_per_prompt": 4},
    "reinforce": {"algorithm": "reinforce"},
}
SHUFFLED = {"width": 16, "limit": 4, "batch_size": 8, "minibatches": 2, "micro_batch_size": 3, "epochs": 2}


# ---- the loop


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", ["top", "all"])
def test_the_first_ratio_is_1_and_the_first_kl_0_exactly(kind, layers, tmp_path, monkeypatch):
    errors, check = [], update.check_first_ratio
    monkeypatch.setattr(update, "check_first_ratio", lambda e: (errors.append(float(e)), check(e)))
    built = trainer(tmp_path, dtype=HALF, trunk=layers == "top", **SHUFFLED, **KINDS[kind])
    rollouts, collect = [], built.collect_rollout
    built.collect_rollout = lambda step: rollouts.append(collect(step)) or rollouts[-1]
    built.train()
    assert errors == [0.0, 0.0]
    assert torch.equal(rollouts[0].log_probs_BR, rollouts[0].reference_log_probs_BR)
    assert not torch.equal(rollouts[1].log_probs_BR, rollouts[1].reference_log_probs_BR)
    assert [row["objective/kl"] == 0.0 for row in read_metrics(tmp_path)] == [True, False]


def test_a_policy_that_starts_from_an_adapter_is_its_copy_exactly(tmp_path):
    built = trainer(tmp_path, dtype=HALF, start=True, stir=0.1, steps=1, **SHUFFLED)
    rollout = built.collect_rollout(0)
    assert torch.equal(rollout.log_probs_BR, rollout.reference_log_probs_BR)


def test_what_is_learned_and_what_it_is_learned_from_is_float32(tmp_path):
    built = trainer(tmp_path, dtype=HALF, steps=1)
    seen, policy_loss = {}, built.update._policy_loss

    def note(batch, micro):
        seen["loss"] = policy_loss(batch, micro)
        return seen["loss"]

    built.update._policy_loss = note
    step = built.runtime.step
    built.runtime.step = lambda: seen.update({n: p.grad for n, p in learning(built).items()}) or step()
    built.train()
    rollout = built.collect_rollout(1)
    rewards = built.reward_shaper(rollout, 0.1)
    advantages, returns = built.estimate_advantages(rollout, rewards)
    seen |= learning(built) | {"rewards": rewards, "advantages": advantages, "returns": returns}
    seen |= {k: v for k, v in rollout._asdict().items() if torch.is_tensor(v) and v.is_floating_point()}
    assert seen.pop("hidden_BTD").dtype == HALF
    seen |= built.runtime.optimizer_tensors()
    assert len(seen) > 100
    assert {name: t.dtype for name, t in seen.items() if t.dtype != torch.float32} == {}
    assert {p.dtype for n, p in built.backbone.base.named_parameters() if "lora_" not in n} == {HALF}


def learning(built):
    named = {a: built.backbone.parameters_of(a) for a in ("policy", "value")}
    return {f"{a}.{n}": p for a, part in named.items() for n, p in part.items()}


def test_a_run_that_goes_on_keeps_the_floor_and_every_bit(tmp_path, capsys):
    options = {"dtype": HALF, "checkpoint_every": 1, **SHUFFLED}
    alone = trainer(tmp_path / "alone", steps=3, **options)
    alone.train()
    trainer(tmp_path / "here", steps=3, **options).collect_rollout(0)
    first = trainer(tmp_path / "here", steps=3, **options)
    first.remaining_steps = lambda: range(2)
    first.train()
    capsys.readouterr()
    again = trainer(tmp_path / "here", steps=3, **options)
    again.train()
    assert again.sampler_gap.floor == alone.sampler_gap.floor
    assert alone.sampler_gap.floor[0] > 0.0
    assert "before the first update" not in capsys.readouterr().out
    mine, wanted = weights(again), weights(alone)
    assert all(torch.equal(mine[name], tensor) for name, tensor in wanted.items())
    untimed = [
        [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(tmp_path / name)]
        for name in ("here", "alone")
    ]
    assert untimed[0] == untimed[1]
    assert {"policy/sampler_gap", "policy/sampler_gap_p99"} <= set(untimed[0][0])


# ---- the stages


def test_every_stage_of_the_road_runs_and_leaves_float32(inside, monkeypatch):
    from policy.alignment_tax import preflight
    from policy.distillation import __main__ as distill
    from policy.evaluate import __main__ as evaluate
    from policy.ppo import __main__ as ppo
    from policy.sft import __main__ as sft
    from reward.card import __main__ as card
    from reward.pretraining import __main__ as pmp
    from reward.training import __main__ as reward
    from rlhf.collect import __main__ as collect
    from rlhf.models import prepare

    (inside / "recipes").symlink_to(ROOT / "recipes")
    options = [
        "model.dtype=bfloat16",
        "data.prompts=[]",
        "data.held_out_prompts=[]",
        "dialogue.max_prompt_tokens=112",
        "pmp={sources: [{files: recipes/tiny/comparisons.jsonl}], limit: 16, batch_size: 4,"
        " start: distill, learning_rate: 1e-3}",
        "reward.start=null",
        "data.limit=16",
        "distill.sequences=8",
    ]
    for module in (prepare, preflight, collect, sft, distill, pmp, reward, card, ppo, evaluate):
        stage(module.main, *options, recipe=RECIPE)
    folder = inside / "runs" / "tiny-assistant"
    files = [p for p in folder.rglob("*.safetensors") if "checkpoint" not in str(p)]
    stages = {p.relative_to(folder).parts[0] for p in files}
    assert stages >= {"sft", "distill", "pmp", "reward", "ppo"}
    trained = [p for p in files if p.name == "adapter_model.safetensors"]
    assert {t.dtype for p in trained for t in load_file(p).values()} == {torch.float32}
    for name in ("sft", "distill", "pmp", "reward", "ppo"):
        rows = read_metrics(folder / name)
        assert rows
        for key, value in itertools.chain.from_iterable(row.items() for row in rows):
            assert key == "response/distinct_2" or abs(value) < 1e6, (name, key)
    assert read_metrics(folder / "ppo")[0]["objective/kl"] == 0.0
    assert read_json(folder / "evaluate" / "summary.json")


@pytest.mark.slow
def test_ppo_killed_in_bfloat16_ends_bit_for_bit_where_a_run_left_alone_does(tmp_path):
    options = ("model.dtype=bfloat16", "ppo.steps=4", "ppo.checkpoint_every=1", "ppo.epochs=1")
    lab = tmp_path / "lab"
    lab.mkdir()
    for name in ("model", "comparisons", "reward"):
        Start(lab, options[:1], name=name).finish()
    alone, here = (link_stages(lab, tmp_path / name) for name in ("alone", "here"))
    assert "the rounding of bfloat16" in Start(alone, options).finish()
    for plan in (Plan("update", 1), Plan("rollout", 1, 0.02), Plan("rename", 3)):
        assert Start(here, options, plan).wait() == -9
    said = Start(here, options).finish()
    assert "going on after step" in said
    assert outcome(here) == outcome(alone)
