"""How many operations a PPO step needs, against torch's own counter, and how a step is timed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.ppo import __main__ as ppo
from benchmarks.ppo import task as ppo_task
from benchmarks.ppo.sides import matmul_peak
from benchmarks.ppo.task import Clock, Step, figures
from benchmarks.ppo.work import Linear, Method, Sizes, sizes_of, step_flops
from rlhf.models.tiny import tiny_model

LAYERS, PROMPTS = 3, str(ROOT / ppo.PROMPTS)

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
    assert (sizes.layers, sizes.hidden, sizes.vocabulary) == (3, 32, 40)
    assert Linear("k_proj", 32, 16) in sizes.linears
    assert sizes.layer_weights == 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64


# ------------------------------------------------------------------ measuring


class Time:
    """Clocks that a test sets."""

    def __init__(self, monkeypatch, *wall):
        self.wall = iter(wall)
        monkeypatch.setattr(ppo_task.time, "perf_counter", lambda: next(self.wall))
        monkeypatch.setattr(ppo_task.time, "process_time", lambda: 0.0)


def test_a_step_lasts_from_the_end_of_the_one_before(monkeypatch):
    Time(monkeypatch, 0.0, 10.0, 13.0, 18.0)
    clock = Clock()
    clock.start()
    clock.end_step({"update": 1.0}, 5)
    clock.end_step({"update": 2.0}, 6)
    assert [(s.seconds, s.response_tokens) for s in clock.steps] == [(3.0, 5), (5.0, 6)]


def test_the_peak_is_the_best_of_several_products(monkeypatch):
    Time(monkeypatch, 0.0, 4.0, 4.0, 6.0, 6.0, 9.0, 9.0, 12.0)
    assert matmul_peak(10, repeats=2) == 2 * 10**3 / 2.0  # by either library


def test_the_figures_leave_out_the_first_step():
    sizes, method = Sizes(2, (Linear("q_proj", 3, 3),), 3, 7), Method(1, 1, 1, 4, 2, 3)
    phases = [{"generate": 1.0, "score": 2.0, "update": s} for s in (90.0, 3.0, 5.0)]
    steps = [Step(s["update"] + 3, 7.0, s, n) for s, n in zip(phases, (99, 10, 20), strict=True)]
    found = figures(steps, sizes, method, rows=5, prompt_tokens=25)
    assert found["step_s"] == [93.0, 6.0, 8.0]
    assert (found["s_per_step"], found["update_s"], found["generate_s"], found["score_s"]) == (7, 4, 1, 2)
    assert found["rollout_s"] == 3
    assert (found["measured_steps"], found["response_tokens"], found["mean_response_tokens"]) == (2, 15, 3)
    assert found["tokens_per_s"] == pytest.approx(40 / 7)
    assert found["s_per_token"] == pytest.approx(7 / 40)
    needed = step_flops(sizes, method, rows=5, prompt_tokens=25, response_tokens=15)
    assert found["flops_by_phase"] == needed
    assert found["flops_per_s"] == pytest.approx(sum(needed.values()) / 7)
    assert found["peak_bytes"] > 1e7
