"""Comparisons sampled from several policies: who writes what, what is refused, what stays the same."""

import shutil
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
from conftest import noted_anew, stage, tiny_recipe
from safetensors.torch import load_file, save_file

from rlhf.collect import responses, simulated
from rlhf.collect.__main__ import main
from rlhf.collect.responses import deal
from rlhf.errors import UserError
from rlhf.runs.artifacts import WEIGHTS, read_jsonl, write_json
from rlhf.runs.initial_adapter import _same_base

PPO = "runs/tiny/ppo/policy"
SMALL = ("name=several", "collect.prompts=16", "collect.prompts_per_batch=4", "data.held_out=0.3")


@pytest.fixture
def desk(road, inside):
    """A copy of the finished road as the current folder."""
    shutil.copytree(road, inside, dirs_exist_ok=True)
    shifted(f"{PPO}/{WEIGHTS}", 0.3)  # six steps of the tiny run change hardly a token
    noted_anew(Path("runs/tiny/ppo"))
    return inside


def shifted(file, by):
    save_file({name: tensor + by for name, tensor in load_file(file).items()}, file)


def sampled(*overrides):
    stage(main, *SMALL, *overrides)
    return Path("runs/several/comparisons")


# --- who writes what -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("policies", "k"), [(1, 4), (2, 4), (3, 4), (2, 3), (4, 2), (5, 3)])
def test_policies_write_equally_many_and_each_meets_each_other(policies, k):
    names = [f"p{n}" for n in range(policies)]
    dealt = deal(names, 60, k, seed=3)
    counts = Counter(writer for row in dealt for writer in row)
    assert {len(row) for row in dealt} == {k}
    assert max(counts.values()) - min(counts.values()) <= 1
    met = {frozenset(pair) for row in dealt for pair in combinations(row, 2) if len(set(pair)) == 2}
    assert len(met) == policies * (policies - 1) / 2
    assert deal(names, 80, k, seed=3)[:60] == dealt  # more prompts go on from the same beginning
    assert policies == 1 or deal(names, 60, k, seed=4) != dealt


def test_each_policy_writes_what_it_would_write_alone(desk):
    folder = sampled(f"collect.policies=[base, {PPO}]")
    rows = {"both": list(read_jsonl(folder / "sampled.jsonl"))}
    for name, policy in (("base", "base"), ("ppo", PPO)):
        shutil.rmtree("runs/several")
        kept, real = [], simulated.sampled_responses

        def watched(*args, real=real, kept=kept, **options):
            for batch in real(*args, **options):
                kept.extend(batch.responses)
                yield batch

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(simulated, "sampled_responses", watched)
            folder = sampled(f"collect.policies={policy}")
        rows[name] = kept
        assert (folder / "sampled.jsonl").exists() == (name == "ppo")
    differ = 0
    for i, row in enumerate(rows["both"]):
        for j, (text, writer) in enumerate(zip(row["responses"], row["writers"], strict=True)):
            assert text == rows["base" if writer == "base" else "ppo"][i][j]
            differ += rows["base"][i][j] != rows["ppo"][i][j]
    assert differ > 10


def test_the_base_alone_gives_what_it_gave(road, inside):
    """The files of the road, which names no policies, come out bit for bit when `base` is named."""
    shutil.copytree(road / "models", inside / "models")
    stage(main, "collect.policies=[base]")
    for file in (road / "runs/tiny/comparisons").glob("*.jsonl"):
        assert file.read_bytes() == Path("runs/tiny/comparisons", file.name).read_bytes(), file.name


def test_batches_that_were_sampled_are_not_sampled_again(desk, monkeypatch):
    real, calls = responses.sample, []

    def dies(*args, **options):
        calls.append(args[1])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(responses, "sample", dies)
    with pytest.raises(KeyboardInterrupt):
        sampled(f"collect.policies=[base, {PPO}]")
    folder = sampled(f"collect.policies=[base, {PPO}]")
    stopped = (folder / "sampled.jsonl").read_bytes()
    assert len(calls) == 4 + 6  # of 4 batches by two policies, one was whole
    shutil.rmtree("runs/several")
    sampled(f"collect.policies=[base, {PPO}]")
    assert (folder / "sampled.jsonl").read_bytes() == stopped


# --- what is refused -------------------------------------------------------------------------------------


def refusal(*overrides):
    with pytest.raises(UserError) as caught:
        sampled(*overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_that_is_not_there_and_an_empty_list_are_refused_at_once(inside):
    with pytest.raises(UserError, match=r"collect\.policies: runs/no is not a folder; check the path"):
        tiny_recipe("collect.policies=[base, runs/no]")
    with pytest.raises(UserError, match=r"collect\.policies: .*at least 1 item"):
        tiny_recipe("collect.policies=[]")


def test_a_folder_without_an_adapter_is_refused(desk):
    Path("empty").mkdir()
    assert "collect.policies: empty/adapter_model.safetensors is not there" in refusal(
        "collect.policies=empty"
    )


def test_other_lora_settings_and_another_base_are_refused(desk):
    assert "made with other lora settings" in refusal(f"collect.policies={PPO}", "lora.rank=8")
    shutil.copytree("models/tiny", "models/other")
    shifted("models/other/model.safetensors", 0.1)
    noted_anew(Path("models/other"))
    said = refusal(f"collect.policies={PPO}", "model.path=models/other")
    assert said.endswith(f"{PPO} was made on the base models/tiny, and model.path is models/other")


def test_bases_without_a_manifest_are_compared_by_name(inside):
    assert _same_base("owner/Model-1", "models/model-1")
    assert not _same_base("owner/Model-2", "models/model-1")
    for place, identity in (("models/one", 1), ("models/two", 2)):
        Path(place).mkdir(parents=True)
        write_json(
            Path(place) / "manifest.json", {"identity": identity, "files": {}, "source": "owner/Model-1"}
        )
    assert _same_base("owner/Model-1", "models/one")
    assert not _same_base("owner/Model-2", "models/one")
    assert not _same_base("models/two", "models/one")


def test_another_policy_in_the_same_place_is_a_change(desk):
    sampled(f"collect.policies={PPO}")
    sampled(f"collect.policies={PPO}")  # done already
    shifted(f"{PPO}/{WEIGHTS}", 0.3)
    noted_anew(Path("runs/tiny/ppo"))
    assert "data file adapter_model.safetensors" in refusal(f"collect.policies={PPO}")


def test_a_damaged_policy_of_a_finished_stage_is_refused(road, inside):
    shutil.copytree(road, inside, dirs_exist_ok=True)
    weights = Path(PPO, WEIGHTS)
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert "remove runs/tiny/ppo and run `make ppo" in refusal(f"collect.policies={PPO}")


def test_what_is_passed_over_changes_nothing_for_the_others(desk):
    policies = f"collect.policies=[base, {PPO}]"
    whole = list(read_jsonl(sampled(policies) / "sampled.jsonl"))
    shutil.rmtree("runs/several")
    part = list(read_jsonl(sampled(policies, "collect.prompts=6", "collect.skip=10") / "sampled.jsonl"))
    assert part == whole[10:]
