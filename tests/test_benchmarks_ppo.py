"""Both sides of the PPO benchmark on a tiny model, the operations that a step needs, and how it is timed."""

from __future__ import annotations

import json
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from conftest import ROOT
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import Children
from benchmarks.ppo import __main__ as ppo
from benchmarks.ppo import task as ppo_task
from benchmarks.ppo.sides import matmul_peak, ours, prepare
from benchmarks.ppo.task import (
    Clock,
    Linear,
    Method,
    Sizes,
    Step,
    Task,
    dialogue_of,
    figures,
    sizes_of,
    step_flops,
)
from rlhf.errors import UserError
from rlhf.models.base import load_base
from rlhf.models.tiny import tiny_model, write_tiny_model
from rlhf.runs.artifacts import write_json

LAYERS, PROMPTS = 3, str(ROOT / ppo.PROMPTS)

# ------------------------------------------------------------------ the two sides


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_model(folder)
    return str(folder)


@pytest.fixture(scope="module")
def rows(base):
    return prepare(base, PROMPTS, 4, 16, 64, 0)


def test_prompts_have_the_wanted_lengths_and_are_those_of_the_seed(base, rows):
    dialogue = dialogue_of(base)
    assert rows == prepare(base, PROMPTS, 6, 16, 64, 0)[:4]
    assert rows != prepare(base, PROMPTS, 4, 16, 64, 1)
    assert all(row["ids"] == dialogue.tokenizer(row["text"])["input_ids"] for row in rows)
    many = [len(row["ids"]) for row in prepare(base, PROMPTS, 60, 30, 40, 0)]
    assert {min(many), max(many)} <= {30, 31, 39, 40}
    assert len(set(many)) > 5
    assert dialogue.pad_id not in [i for row in rows for i in row["ids"]]


def test_prompts_are_texts_of_the_file_joined(base, tmp_path):
    (tmp_path / "some.txt").write_text("abc\ndef\nghi\n")
    (row,) = prepare(base, str(tmp_path / "some.txt"), 1, 11, 11, 0)
    assert sorted(row["text"].split()) == ["abc", "def", "ghi"]
    with pytest.raises(UserError, match=r"some.txt: 3 texts make 1 prompts of 11 to 11 tokens, 2 are wanted"):
        prepare(base, str(tmp_path / "some.txt"), 2, 11, 11, 0)


def task_of(base, rows, folder, **values):
    write_json(folder / "rows.json", {"rows": rows})
    small = {"response_tokens": 6, "epochs": 2, "micro_batch": 2}
    return Task(base, str(folder / "rows.json"), **{"layers": "top_1", **small, **values})


def test_ours_runs_the_steps_of_a_task(base, rows, tmp_path):
    found = {k: ours(task_of(base, rows, tmp_path, layers=k), rows, tmp_path / k) for k in ("all", "top_1")}
    for figures_ in found.values():
        assert len(figures_["step_s"]) == 3
        assert figures_["prompt_tokens"] == sum(len(row["ids"]) for row in rows)
        assert 1 <= figures_["mean_response_tokens"] <= 6
        phases = figures_["generate_s"] + figures_["score_s"] + figures_["update_s"]
        assert phases == pytest.approx(figures_["s_per_step"], rel=0.5)
    assert (found["all"]["trunk_kept"], found["top_1"]["trunk_kept"]) == (False, True)
    whole, top = (found[k]["trainable_parameters"] - 33 for k in ("all", "top_1"))  # the value's head
    assert whole == LAYERS * top
    lines = [json.loads(line) for line in (tmp_path / "all" / "metrics.jsonl").read_text().splitlines()]
    assert [line["policy/updates"] for line in lines] == [2, 2, 2]
    assert found["all"]["response_tokens"] == pytest.approx(
        sum(4 * line["response/length"] for line in lines[1:]) / 2
    )


def test_ours_runs_over_a_base_of_the_wanted_type(base, rows, tmp_path):
    with patch("rlhf.models.base.load_base", wraps=load_base) as loading:
        found = ours(task_of(base, rows, tmp_path, dtype="bfloat16", steps=2), rows, tmp_path / "half")
    assert loading.call_args[0][0].dtype == "bfloat16"
    assert len(found["step_s"]) == 2


def test_ours_refuses_prompts_that_are_other_tokens(base, rows, tmp_path):
    wrong = [{**rows[0], "ids": rows[1]["ids"]}, *rows[1:]]
    with pytest.raises(RuntimeError, match="not the token ids"):
        ours(task_of(base, wrong, tmp_path), wrong, tmp_path)


RELEASE = ROOT / ".stamps" / "trl-1.12.0"


@pytest.mark.skipif(not RELEASE.is_dir(), reason="the peer is installed by `make bench-ppo`")
def test_theirs_runs_the_same_task_with_its_own_release(base, rows, tmp_path):
    children = Children(ppo.CHILD, tmp_path, threads=1, peer=RELEASE)
    found = children.ask("theirs", vars(task_of(base, rows, tmp_path, steps=2)))
    assert (found["trl"], found["threads"]) == ("1.12.0", 1)
    assert len(found["step_s"]) == 2
    assert found["prompt_tokens"] == sum(len(row["ids"]) for row in rows)
    assert 1 <= found["mean_response_tokens"] <= 6
    phases = found["generate_s"] + found["score_s"] + found["update_s"]
    assert phases == pytest.approx(found["s_per_step"], rel=1e-3)
    assert min(found["generate_s"], found["score_s"], found["update_s"]) > 0
    mine = sizes_of(tiny_model(40))
    adapter = 8 * sum(m.inputs + m.outputs for m in mine.linears)
    classifier = (
        259 * 32 + LAYERS * (sum(m.inputs * m.outputs for m in mine.linears) + 2 * 32) + 32 + 32
    )  # embeddings, norms, head
    assert found["trainable_parameters"] == adapter + classifier


# ------------------------------------------------------------------ operations


def counted(work):
    """Operations of the matrix products, by torch's own counter."""
    with FlopCounterMode(display=False) as counter:
        work()
    found = {str(name): number for name, number in counter.get_flop_counts()["Global"].items()}
    return sum(number for name, number in found.items() if name in ("aten.mm", "aten.addmm"))


def adapted(layers):
    base = tiny_model(40)
    names = sorted({m.name for m in sizes_of(base).linears})
    config = LoraConfig(r=4, target_modules=names, layers_to_transform=layers, task_type="CAUSAL_LM")
    return sizes_of(base), get_peft_model(base, config)


IDS = torch.arange(2 * 9).reshape(2, 9) % 40
RESPONSE = 4  # of the nine tokens


@pytest.mark.parametrize("adapters", [1, 2, 3])
def test_an_update_needs_what_torch_counts(adapters):
    sizes, model = adapted(list(range(LAYERS - adapters, LAYERS)))
    decoder, head = model.base_model.model.get_decoder(), model.base_model.model.get_output_embeddings()

    def update():
        head(decoder(IDS).last_hidden_state[:, -RESPONSE:].contiguous()).sum().backward()
        decoder(IDS).last_hidden_state.sum().backward()

    method = Method(1, 4, adapters, passes=0, heads=0, adapters=0)
    found = step_flops(sizes, method, rows=2, prompt_tokens=10, response_tokens=8)
    assert found["update"] == counted(update)
    twice = step_flops(sizes, replace(method, epochs=2), rows=2, prompt_tokens=10, response_tokens=8)
    assert twice["update"] == 2 * found["update"]
    alone = step_flops(sizes, replace(method, value=False), rows=2, prompt_tokens=10, response_tokens=8)

    def policy():
        head(decoder(IDS).last_hidden_state[:, -RESPONSE:].contiguous()).sum().backward()

    assert alone["update"] == counted(policy)


def test_an_update_over_a_cached_trunk_needs_what_torch_counts():
    sizes, model = adapted([2])
    decoder, head = model.base_model.model.get_decoder(), model.base_model.model.get_output_embeddings()
    hidden = decoder(IDS).last_hidden_state.detach()
    decoder.layers = decoder.layers[2:]

    def update():
        head(decoder(inputs_embeds=hidden).last_hidden_state[:, -RESPONSE:].contiguous()).sum().backward()
        decoder(inputs_embeds=hidden).last_hidden_state.sum().backward()

    method = Method(1, 4, 1, passes=0, heads=0, adapters=0, cached=True)
    assert step_flops(sizes, method, rows=2, prompt_tokens=10, response_tokens=8)["update"] == counted(update)


def test_a_value_that_learns_with_all_its_weights_needs_what_torch_counts():
    sizes, model = adapted([1, 2])
    decoder, head = model.base_model.model.get_decoder(), model.base_model.model.get_output_embeddings()
    value = tiny_model(40).get_decoder()  # its embeddings learn too, so every input needs its gradient

    def update():
        head(decoder(IDS).last_hidden_state[:, -RESPONSE:].contiguous()).sum().backward()
        value(IDS).last_hidden_state.sum().backward()

    method = Method(1, 4, 2, passes=0, heads=0, adapters=0, full_value=True)
    assert step_flops(sizes, method, rows=2, prompt_tokens=10, response_tokens=8)["update"] == counted(update)


@pytest.mark.parametrize("cached", [False, True])
def test_scoring_and_generating_need_what_torch_counts(cached):
    sizes, model = adapted([2])
    decoder, head = model.base_model.model.get_decoder(), model.base_model.model.get_output_embeddings()
    layers = decoder.layers

    def score():
        with torch.no_grad():
            inputs = {"input_ids": IDS}
            if cached:
                decoder.layers = layers[:2]
                inputs = {"inputs_embeds": decoder(IDS).last_hidden_state}
                decoder.layers = layers[2:]
            for _ in ("policy", "value", "reward"):
                hidden = decoder(**inputs).last_hidden_state
            head(hidden[:, -RESPONSE:].contiguous())
            with model.disable_adapter():
                head(decoder(**inputs).last_hidden_state[:, -RESPONSE:].contiguous())
        decoder.layers = layers

    def generate():
        with torch.no_grad():
            head(decoder(IDS[:, :-1]).last_hidden_state[:, -RESPONSE:].contiguous())

    method = Method(4, 4, 1, passes=4, heads=2, adapters=3, cached=cached)
    found = step_flops(sizes, method, rows=2, prompt_tokens=10, response_tokens=8)
    assert found["score"] == counted(score)
    assert found["generate"] == counted(generate)


def test_the_sizes_are_those_of_one_layer():
    sizes = sizes_of(tiny_model(40))
    assert (sizes.layers, sizes.head) == (LAYERS, 32 * 40)
    assert Linear("k_proj", 32, 16) in sizes.linears
    weights = sum(m.inputs * m.outputs for m in sizes.linears)
    assert weights == 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64


# ------------------------------------------------------------------ measuring


def set_clocks(monkeypatch, *wall):
    times = iter(wall)
    monkeypatch.setattr(ppo_task.time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(ppo_task.time, "process_time", lambda: 0.0)


def test_a_step_lasts_from_the_end_of_the_one_before(monkeypatch):
    set_clocks(monkeypatch, 0.0, 10.0, 13.0, 18.0)
    clock = Clock()
    clock.start()
    clock.end_step({"update": 1.0}, 5)
    clock.end_step({"update": 2.0}, 6)
    assert [(s.seconds, s.response_tokens) for s in clock.steps] == [(3.0, 5), (5.0, 6)]


def test_the_peak_is_the_best_of_several_products(monkeypatch):
    set_clocks(monkeypatch, 0.0, 4.0, 4.0, 6.0, 6.0, 9.0, 9.0, 12.0)
    assert matmul_peak(10, repeats=2) == 2 * 10**3 / 2.0  # by either library


def test_the_figures_leave_out_the_first_step():
    sizes, method = Sizes(2, (Linear("q_proj", 3, 3),), 21), Method(1, 1, 1, 4, 2, 3)
    phases = [{"generate": 1.0, "score": 2.0, "update": s} for s in (90.0, 3.0, 5.0)]
    steps = [Step(s["update"] + 3, 7.0, s, n) for s, n in zip(phases, (99, 10, 20), strict=True)]
    found = figures(steps, sizes, method, rows=5, prompt_tokens=25)
    assert found["step_s"] == [93.0, 6.0, 8.0]
    assert (found["s_per_step"], found["update_s"], found["generate_s"], found["score_s"]) == (7, 4, 1, 2)
    assert (found["measured_steps"], found["response_tokens"], found["mean_response_tokens"]) == (2, 15, 3)
    assert found["tokens_per_s"] == pytest.approx(40 / 7)
    assert found["s_per_token"] == pytest.approx(7 / 40)
    needed = step_flops(sizes, method, rows=5, prompt_tokens=25, response_tokens=15)
    assert found["flops_by_phase"] == needed
    assert found["flops_per_s"] == pytest.approx(sum(needed.values()) / 7)
    assert found["peak_bytes"] > 1e7
