"""The stage on the tiny run, and what it says of bad input."""

import os
import shutil
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import noted_anew, stage
from lxml import etree, html
from safetensors.torch import load_file, save_file
from tiny_inside import batch, llama

from policy.inside import __main__ as command
from policy.inside import effects, minimal_pairs, questions, report
from policy.inside.circuit import question
from policy.inside.circuit.page import section
from policy.inside.effects import Change, examine, runs_of
from policy.inside.minimal_pairs import KINDS, Kind, Pair, own_pairs, pairs_of
from policy.inside.patching import record
from policy.inside.questions import Inspection
from policy.inside.solutions.others import check_others
from policy.inside.subject import Site, of_model
from rlhf.data.comparisons import Message
from rlhf.errors import UserError
from rlhf.recipe.evaluate import Inside
from rlhf.report.gather import gather
from rlhf.report.page import write_page
from rlhf.runs.artifacts import read_json, write_jsonl

FEW = (
    "inside.prompts=4",
    "inside.top=3",
    "inside.random_sets=2",
    "inside.soft_prompts=0",
    "inside.edges=none",
)


@pytest.fixture
def run(road, inside):
    """A folder with the finished stages of the tiny run, and PPO's adapter made larger."""
    os.symlink(road / "models", inside / "models")
    shutil.copytree(road / "runs", inside / "runs")
    file = inside / "runs/tiny/ppo/policy/adapter_model.safetensors"
    tensors = {
        name: t + 0.05 * torch.sin(torch.arange(t.numel()).view(t.shape))
        for name, t in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    noted_anew(inside / "runs/tiny/ppo")
    return inside / "runs/tiny"


def test_the_stage_on_the_tiny_run(run, capsys):
    pairs = run / "pairs.jsonl"
    write_jsonl(pairs, [{"prompt": "It was", "chosen": " a joy.", "rejected": " a bore"}])
    stage(command.main, *FEW, f"inside.pairs=[{pairs}]")
    found = read_json(run / "inside/inside.json")
    policy = found["policy"]
    assert policy["into"]["components"] == 2 * (4 + 64)  # lora.layers: top_2 of 3
    assert policy["into"]["states"][-1][1]["mean"] == pytest.approx(1, abs=1e-4)
    assert policy["into"]["states"][0][1]["mean"] == pytest.approx(0, abs=1e-6)  # lora.layers: top_2 of 3
    assert len(policy["into"]["alone"]) == 3
    assert [row["size"] for row in policy["back"]["together"]] == [1, 10, 100]
    assert "change" in policy["reward"] or policy["reward"]["skipped"]
    assert list(found["reads"]["kinds"]) == [*(kind.name for kind in KINDS), "your pairs"]
    for kind in (one for one in found["reads"]["kinds"].values() if one["pairs"]):
        low, high = kind["expected"]["ci95"]
        assert 0 <= low <= kind["expected"]["mean"] <= high <= 1
        assert low < high  # also where all are alike
    page = (run / "inside/inside.md").read_text()
    assert page in capsys.readouterr().out
    assert policy["gain"]["mean"] == pytest.approx(policy["into"]["change"], rel=1e-4)
    for change in (policy["gain"], policy["rise"]):
        change["ci95"] = [-0.5, 0.5]
    assert report.as_markdown(found).count("not distinguishable from 0, so that shares") == 2
    for change in (policy["gain"], policy["rise"]):
        change["ci95"] = [0.5, 0.6]
    assert "not distinguishable from 0, so that shares" not in report.as_markdown(found)
    assert "## What the reward model reads" in page
    assert (run / "inside/policy.png").is_file()
    assert (run / "inside/reads.png").is_file()
    assert (run / "inside/manifest.json").is_file()
    stage(command.main, *FEW, f"inside.pairs=[{pairs}]")
    assert "done already" in capsys.readouterr().out


@pytest.mark.slow
def test_the_circuits_of_what_the_reward_model_reads(run, monkeypatch):
    texts = [(" a joy.", " a bore")]  # short, and one pair is looked into as it is
    asked = tuple(Kind(name, "a word", lambda: iter(texts)) for name in question.ASKED)
    for module in (questions, question):
        monkeypatch.setattr(module, "KINDS", asked)
    stage(command.main, *FEW, "inside.prompts=1", "inside.edges=eap_ig")
    found, page = read_json(run / "inside/inside.json"), (run / "inside/inside.md").read_text()
    kinds = found["circuit"]["kinds"]
    assert list(kinds) == ["sentiment", "order"]
    for name, kind in kinds.items():
        assert kind["change"] == pytest.approx(found["reads"]["kinds"][name]["difference"]["mean"], rel=1e-4)
        assert kind["curves"]["first"][-1] == pytest.approx(1, abs=1e-3)
        assert etree.parse(run / f"inside/circuit-{name}.svg").getroot().tag.endswith("svg")
        assert (run / f"inside/circuit-{name}.png").is_file()
        assert f"| {' -> '.join(kind['alone'][0]['edge'])} |" in page
        assert f"CPR {kind['areas']['first'][0]:.3f} (random" in page


def test_pairs_that_were_not_looked_into_have_no_circuit():
    models: Any = SimpleNamespace(recipe=SimpleNamespace(inside=Inside()))
    why = {"skipped": "the mean difference is not distinguishable from 0"}
    found = question.circuits(models, "reward", {"kinds": {"sentiment": why, "order": why}}, None)
    assert found["kinds"] == {"sentiment": why, "order": why}
    lines = section(found)
    assert lines[1:] == [
        "### Circuit of sentiment\n", f"Not looked into: {why['skipped']}.\n",
        "### Circuit of order\n", f"Not looked into: {why['skipped']}.\n",
    ]  # fmt: skip
    found = question.circuits(models, "reward", {"skipped": "there is none"}, None)
    assert section(found) == ["Not looked into: there is none.\n"]


@pytest.mark.slow
def test_the_ways_between_soft_prompts_and_between_policies(run, capsys, monkeypatch):
    from policy.inside.solutions import soft_prompts

    monkeypatch.setattr(soft_prompts, "STEPS", 2)
    others = [another_policy(run, f"other-{n}", n) for n in (1, 2)]
    named = ",".join(map(str, others))
    with pytest.raises(
        UserError, match="others: an interval over pairs needs three policies; name two or more"
    ):
        stage(command.main, *FEW, "inside.neurons=0", f"inside.others=[{others[0]}]")
    stage(command.main, *FEW, "inside.soft_prompts=3", f"inside.others=[{named}]")
    found = read_json(run / "inside/inside.json")
    prompts = found["prompts"]
    gained = prompts["before"] - prompts["after"]
    whole = found["policy"]["into"]["change"]  # a response, measured by other code
    assert gained * prompts["tokens"] / prompts["rows"] == pytest.approx(whole, rel=1e-3)
    share = (prompts["before"] - sum(prompts["ends"]) / 3) / gained
    assert prompts["recovered"]["mean"] == pytest.approx(share, rel=1e-3)
    assert len(prompts["ends"]) == len(found["policies"]["reward"]["ends"]) == 3
    assert len(set(found["policies"]["log_prob"]["ends"])) == 3
    page = capsys.readouterr().out
    assert "## Soft prompts" in page
    assert "### Score of sampled responses, with its sign turned" in page
    assert f"**{prompts['verdict']}**" in page
    file = others[0] / "adapter_model.safetensors"
    save_file({k: t[:, :2].contiguous() for k, t in load_file(file).items()}, file, metadata={"format": "pt"})
    noted_anew(others[0].parent)
    shutil.rmtree(run / "inside")
    with pytest.raises(UserError, match=r"inside\.others: .* made with other lora settings or another base"):
        stage(command.main, *FEW, f"inside.others=[{named}]")
    assert not (run / "inside/inside.json").exists()


def another_policy(run, name, turn=1):
    """A finished PPO stage beside the run's, with other weights; returns the policy's folder."""
    folder = run.with_name(name) / "ppo/policy"
    if not folder.exists():
        shutil.copytree(run / "ppo", folder.parent)
    tensors = load_file(run / "ppo/policy/adapter_model.safetensors")
    file = folder / "adapter_model.safetensors"
    save_file({k: t.roll(turn, 0) for k, t in tensors.items()}, file, metadata={"format": "pt"})
    noted_anew(folder.parent)
    return folder


def test_another_policy_that_was_trained_anew_is_other_data(run, monkeypatch):
    def look(_, opened):
        (opened.folder / "inside.md").write_text("page")
        return {}

    monkeypatch.setattr("policy.inside.run.look", look)
    other = another_policy(run, "other")
    stage(command.main, *FEW, f"inside.others=[{other}]")
    stage(command.main, *FEW, f"inside.others=[{other}]")
    another_policy(run, "other", turn=2)
    with pytest.raises(UserError, match=r"with another recipe or data \(data file adapter_model"):
        stage(command.main, *FEW, f"inside.others=[{other}]")


def test_other_policies_are_compared_with_the_run_s_own_before_the_first_question(run, monkeypatch):
    monkeypatch.setattr("policy.inside.run.look", None)  # nothing is asked
    other = another_policy(run, "other")

    def by_stage(_, others):
        stage(command.main, *FEW, f"inside.others=[{','.join(others)}]")

    def refused(*named, act=by_stage):
        with pytest.raises(UserError) as caught:
            act(run / "ppo/policy", list(map(str, named)))
        return str(caught.value)

    assert "inside.others: runs/none/adapter_model.safetensors is not there" in refused("runs/none")
    assert "inside.others: `base` is no policy of another run" in refused("base", other)
    settings = other / "adapter_config.json"
    text = settings.read_text()
    settings.write_text(text.replace("models/tiny", "models/another"))
    noted_anew(other.parent)
    assert "was made on the base models/another, and model.path is models/tiny" in refused(other)
    settings.write_text(text)
    noted_anew(other.parent)
    assert f"{run}/ppo/policy has the weights of this run's own policy" in refused(other, run / "ppo/policy")
    assert f"{other} has the weights of {other}, and nothing" in refused(other, other, act=check_others)
    shutil.copytree(other.parent, run / "copy")
    assert f"copy/policy has the weights of {other}" in refused(other, run / "copy/policy", act=check_others)
    file = other / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({k: t for k, t in tensors.items() if k != name}, file)  # of fewer layers or targets
    said = refused(other, act=check_others)
    assert said.startswith(f"inside.others: {other} does not fit this run's policy ({name} is not there")
    file.write_bytes(b"cut")
    assert "is no safetensors file" in refused(other, act=check_others)


@pytest.mark.slow
def test_the_run_s_report_shows_it_where_the_run_was_looked_into(run):
    def shown():
        write_page([gather(run)], run / "report.html")
        return html.fromstring((run / "report.html").read_text())

    assert not shown().xpath("//*[@id='inside']")
    write_jsonl(run / "pairs.jsonl", [{"prompt": "It was", "chosen": " a joy.", "rejected": " a bore"}])
    stage(command.main, *FEW, f"inside.pairs=[{run / 'pairs.jsonl'}]")
    page, found = shown(), read_json(run / "inside/inside.json")
    shares = found["policy"]["back"]["together"]
    assert [row["size"] for row in shares] == [1, 10, 100]
    texts = page.xpath("//*[@id='inside']//*[local-name()='text']/text()")
    assert sum("100 back to the model before" in text for text in texts) == 2  # and random ones
    row = page.xpath("//*[@id='inside']//tr[th='your pairs']/td/text()")
    kind = found["reads"]["kinds"]["your pairs"]
    assert row[0] == " / ".join(text.strip() for text in kind["example"])
    assert row[1].startswith(f"{kind['difference']['mean']:+.3f}")
    assert "inside/inside.md" in page.xpath("//*[@id='inside']//a/@href")


def test_it_goes_on_with_the_question_that_was_open(run, monkeypatch):
    pairs = f"inside.pairs=[{run / 'pairs.jsonl'}]"
    write_jsonl(run / "pairs.jsonl", [{"prompt": "It was", "chosen": " a joy.", "rejected": " a bore"}])

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(questions.Inspection, "_length", stop)
        with pytest.raises(KeyboardInterrupt):
            stage(command.main, *FEW, pairs)
    assert not (run / "inside/inside.json").exists()
    for asked in ("change", "_kind"):  # not again
        monkeypatch.setattr(questions.Inspection, asked, stop)
    stage(command.main, *FEW, pairs)
    assert read_json(run / "inside/inside.json")["policy"]["into"]["rows"] == 4


def test_without_ppo_it_says_what_to_run(run):
    shutil.rmtree(run / "ppo")
    with pytest.raises(UserError, match=r"inside needs the ppo stage, .*make ppo RECIPE="):
        stage(command.main)


def test_a_policy_that_has_learned_nothing_is_told(run):
    file = run / "ppo/policy/adapter_model.safetensors"
    save_file({n: torch.zeros_like(t) for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    noted_anew(run / "ppo")
    with pytest.raises(UserError, match="PPO: log-prob: both runs measure the same"):
        stage(command.main, *FEW)
    assert not (run / "inside/inside.json").exists()


def test_own_pairs_of_unequal_length_are_named_with_their_tokens(inside):
    write_jsonl(inside / "p.jsonl", [{"prompt": "It was", "chosen": "very good", "rejected": "bad"}])
    with pytest.raises(UserError, match=r"'very good' and 'bad' .* 2 \(very good\) against 1 \(bad\)"):
        own_pairs(["p.jsonl"], str.split, str, 8)
    write_jsonl(inside / "p.jsonl", [{"prompt": "It was", "responses": ["a", "b", "c"], "ranks": [0, 1, 2]}])
    with pytest.raises(UserError, match="one of 3 responses; give two"):
        own_pairs(["p.jsonl"], str.split, str, 8)
    write_jsonl(inside / "p.jsonl", [{"prompt": "It was", "chosen": "good " * 9, "rejected": "bad " * 9}])
    with pytest.raises(UserError, match=r"has 9 tokens, more than the 8 of dialogue.max_response_tokens"):
        own_pairs(["p.jsonl"], str.split, str, 8)


def test_the_advice_about_a_bad_own_pair_is_one_that_helps(inside):
    row = {"prompt": "It was", "responses": ["a", "b"]}
    for bad, why in (({"ranks": [0, 0]}, "are tied, .*"), ({"responses": ["a", ""], "ranks": [0, 1]}, "")):
        write_jsonl(inside / "p.jsonl", [row | bad])
        with pytest.raises(UserError, match=rf"p\.jsonl:1: .*{why}; mend that row, or remove it$"):
            own_pairs(["p.jsonl"], str.split, str, 8)


def test_an_own_pair_without_a_difference_is_named(run):
    file = run / "reward/model/adapter_model.safetensors"
    save_file({n: torch.zeros_like(t) for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    noted_anew(run / "reward")
    write_jsonl(run / "pairs.jsonl", [{"prompt": "It was", "chosen": " a joy.", "rejected": " a bore"}])
    with pytest.raises(UserError, match=r"' a joy\.' and ' a bore' have the same score"):
        stage(command.main, *FEW, f"inside.pairs=[{run / 'pairs.jsonl'}]")
    assert not (run / "inside/parts").exists()  # before the first question


def test_wrong_pairs_are_told_before_the_first_question_and_the_mended_file_is_taken(run, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(questions.Inspection, "change", stop)
    pairs, row = run / "pairs.jsonl", {"prompt": "It was", "chosen": " a joy.", "rejected": " a bore"}
    write_jsonl(pairs, [row, row | {"rejected": " a long, long bore"}])
    with pytest.raises(UserError, match="have unequally many tokens"):
        stage(command.main, *FEW, f"inside.pairs=[{pairs}]")
    write_jsonl(pairs, [row])
    with pytest.raises(KeyboardInterrupt):
        stage(command.main, *FEW, f"inside.pairs=[{pairs}]")


def test_pairs_of_the_templates_differ_as_they_say():
    prompts = [(Message("user", "One"),), (Message("user", "Two"),)]
    for kind in KINDS:
        pairs, uneven = pairs_of(kind, prompts, str.split, 8, 20)
        assert (len(pairs), uneven) == (8, 0)
        assert pairs[1].prompt == prompts[1]

        assert pairs_of(kind, prompts, str.split, 8, 2)[0] == []  # too long
        assert all(pair.good != pair.bad for pair in pairs)
    assert pairs_of(KINDS[0], prompts, list, 8, 40)[1] > 0  # words of unequally many letters
    by_kind = {kind.name: list(kind.texts()) for kind in KINDS}
    for good, bad in by_kind["order"]:
        assert sorted(good.strip(".").split()) == sorted(bad.strip(" .").split())
    assert all(
        sum(a != b for a, b in zip(*map(str.split, pair), strict=True)) == 1 for pair in by_kind["sentiment"]
    )


def change(rows, weights=None):
    """A planted difference: neuron 11 of layer 1 writes something else."""
    model, other = llama(), llama()
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[:, 11] += 0.05
    weights = torch.ones(6) if weights is None else weights
    batches = [(batch(seed=n), batch(seed=n)) for n in range(2)]
    return Change(of_model(model), of_model(other), batches, weights, [0, 1, 2] * 2, "planted")


def test_the_planted_neuron_carries_all_of_it():
    ticks = []
    planted, options = change(6), Inside(top=2, random_sets=2)
    found = examine(planted, options, 0, tick=lambda: ticks.append(1))
    assert len(ticks) == runs_of(planted, options)
    assert found["alone"][0]["name"] == "L1.N11"
    assert found["alone"][0]["exact"]["mean"] == pytest.approx(1, abs=1e-4)
    assert found["alone"][0]["exact"]["n"] == 3  # groups of rows
    assert found["alone"][1]["exact"]["mean"] == pytest.approx(0, abs=1e-4)
    assert found["together"][0]["first"]["mean"] == pytest.approx(1, abs=1e-4)
    assert found["all"]["heads"]["mean"] == pytest.approx(0, abs=1e-4)
    assert found["all"]["neurons"]["mean"] == pytest.approx(1, abs=1e-4)
    assert [round(value["mean"], 3) for _, value in found["states"]] == [0, 1]
    whole = sum(
        (record(planted.source, b).measured_B - record(planted.target, a).measured_B).sum()
        for a, b in planted.batches
    )
    assert found["change"] == pytest.approx(float(whole), rel=1e-5)


def test_random_sets_are_of_the_same_kinds_and_from_the_seed():
    ranked = [((Site(n // 40, "neurons" if n % 40 > 3 else "heads"), n % 40), 1.0) for n in range(80)]
    draws = [effects._random(ranked, 10, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert sum(site.kind == "heads" for site, _ in draws[0]) == 4
    assert len(set(draws[0])) == 10


def test_a_metric_that_is_constant_is_told():
    with pytest.raises(UserError, match="planted: both runs measure the same"):
        examine(change(6, torch.zeros(6)), Inside(), 0)


def test_scores_that_do_not_differ_on_average_have_no_parts():
    looked: Any = Inspection(SimpleNamespace(inside=Inside()), None, None, [], None)
    looked._laid_out = lambda part, side: [float(getattr(pair, side)) for pair in part]
    looked._examine = lambda _change: "parts"
    subject = SimpleNamespace(measure_plainly=torch.tensor)
    one, other = Pair((), "1", "0"), Pair((), "0", "0.9")
    found = looked._kind(subject, "kind", [one, other] * 4)
    assert "not distinguishable from 0" in found["skipped"]
    assert "parts" not in found
    assert looked._kind(subject, "kind", [one, one, one, other] * 4)["parts"] == "parts"


def test_the_filler_is_neither_good_nor_bad():
    assert not set(minimal_pairs.FILLER.lower().strip(".").split()) & {
        word for pair in minimal_pairs._WORDS for word in pair
    }
