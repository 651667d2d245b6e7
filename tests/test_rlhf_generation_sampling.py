"""Sampling against single rows, against the training pass, and against the distribution it should have."""

import numpy as np
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from rlhf.generation.kv_cache import RoomyLayer
from rlhf.generation.sampling import pick, sample, uniforms
from rlhf.models.backbone import Backbone
from rlhf.models.tiny import tiny_model
from rlhf.recipe.schema import Lora

PROMPTS = [[7, 8, 9, 10, 11], [12], [13, 14, 15], [200, 201, 202, 203, 204, 205]]
LIMIT = 10
NEVER = 10**6  # an id that is never sampled


def backbone(layers="top_2"):
    torch.manual_seed(0)
    base = tiny_model(259).requires_grad_(False).eval()
    model = Backbone(base, Lora(rank=4, layers=layers), adapters=["policy"])
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.parameters_of("policy").items():
        if "lora_B" in name:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def drawn(model, prompts=PROMPTS, uniform=None, *, role="policy", eos_id=NEVER, temperature=1.0, **options):
    uniform = uniforms(0, "test", 0, range(len(prompts)), LIMIT) if uniform is None else uniform
    return sample(model, role, prompts, uniform, eos_id=eos_id, pad_id=0, temperature=temperature, **options)


def test_what_a_row_says_depends_on_its_own_uniforms_only():
    model = backbone()
    uniform = uniforms(0, "test", 0, range(len(PROMPTS)), LIMIT)
    whole = drawn(model, uniform=uniform).response_ids_BR
    for order in ([3, 2, 1, 0], [2, 0], [1]):
        part = drawn(model, [PROMPTS[i] for i in order], uniform[order])
        assert part.response_ids_BR.tolist() == whole[order].tolist()
    other = drawn(model, uniform=1 - uniform).response_ids_BR
    assert (other != whole).float().mean() > 0.9


def test_sampling_ends_early_only_when_no_process_is_still_going():
    model = backbone()
    eos_id = int(drawn(model, PROMPTS[:1]).response_ids_BR[0, 0])
    for others_go_on, steps in ((False, 1), (True, LIMIT - 1)):
        asked = []
        drawn(
            model,
            PROMPTS[:1],
            eos_id=eos_id,
            any_process=lambda mine, go=others_go_on, seen=asked: seen.append(mine) or go or mine,
        )
        assert asked == [False] * steps


MANY = [PROMPTS[i] for i in (0, 1, 0, 2, 1, 0, 3, 2)]  # equal prompts, apart from each other


@torch.no_grad()
def plainly(model, prompt, uniform_R, role, eos_id):
    """One response without a cache, a batch, folding or padding: every token reads the whole text anew."""
    model.activate(role)
    said, log_probs = [], []
    for uniform in uniform_R:
        logits = model.base(input_ids=torch.tensor([[*prompt, *said]]), use_cache=False).logits[:, -1]
        token, log_prob = pick(logits, uniform[None], 1.0)
        said.append(int(token))
        log_probs.append(float(log_prob))
        if said[-1] == eos_id:
            break
    rest = len(uniform_R) - len(said)
    return said + [0] * rest, torch.tensor(log_probs + [0.0] * rest)


def assert_plain(model, got, role, uniform, eos_id):
    for row, prompt in enumerate(MANY):
        said, log_probs = plainly(model, prompt, uniform[row], role, eos_id)
        assert got.prompt_ids_BP[row][got.prompt_mask_BP[row]].tolist() == prompt
        assert got.response_ids_BR[row].tolist() == said
        torch.testing.assert_close(got.log_probs_BR[row], log_probs, rtol=0, atol=5e-5)
    assert len(set(got.lengths_B.tolist())) > 1


@pytest.mark.parametrize("role", ["policy", "reference"])
@pytest.mark.parametrize("layers", ["top_2", "all"])
def test_every_row_says_what_it_says_without_any_haste(role, layers):
    model = backbone(layers)
    uniform = uniforms(0, "test", 0, range(len(MANY)), LIMIT)
    eos_id = plainly(model, MANY[0], uniform[0], role, NEVER)[0][4]
    assert_plain(model, drawn(model, MANY, role=role, eos_id=eos_id, keep_trunk=True), role, uniform, eos_id)


def fed(model, **options):
    """The shape of what each forward pass of the decoder was fed, and what was sampled."""
    shapes = []
    hook = model.decoder.register_forward_pre_hook(
        lambda _module, _args, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    said = drawn(model, MANY, **options)
    hook.remove()
    return shapes, said


def test_equal_prompts_are_read_once():
    shapes, said = fed(backbone())
    assert shapes == [(4, 6)] + [(8, 1)] * (LIMIT - 1)
    assert len({tuple(row) for row in said.response_ids_BR.tolist()}) == len(MANY)


def batches(free, eos_id):
    """Rows in the batch and rows still going at every step after the prompt, by the rule alone."""
    lengths = [row.index(eos_id) + 1 if eos_id in row else LIMIT for row in free]
    rows, steps = len(free), []
    for t in range(LIMIT - 1):
        going = sum(length > t + 1 for length in lengths)
        if not going:
            break
        steps.append((rows, going))
        if rows - going >= rows / 4:
            rows = going
    return steps


def test_rows_that_have_ended_leave_the_batch_when_they_are_a_quarter_of_it():
    model = backbone()
    uniform = uniforms(0, "test", 0, range(len(MANY)), LIMIT)
    uniform[2] = uniform[0]  # the same prompt: two of eight rows end together
    free = drawn(model, MANY, uniform).response_ids_BR.tolist()
    tried = {eos_id: batches(free, eos_id) for row in free for eos_id in row}
    shrunk = [eos_id for eos_id, steps in tried.items() if len({rows for rows, _ in steps}) > 1]
    waited = [
        eos_id for eos_id, steps in tried.items() if any(3 * n < 4 * going < 4 * n for n, going in steps)
    ]
    assert shrunk
    assert waited
    for eos_id in {*shrunk, *waited}:
        shapes, _ = fed(model, uniform=uniform, eos_id=eos_id)
        assert shapes[1:] == [(rows, 1) for rows, _ in tried[eos_id]]


def test_a_process_whose_rows_have_ended_keeps_step_with_the_others():
    model = backbone()
    eos_id = int(drawn(model, MANY[:1]).response_ids_BR[0, 1])
    alone = drawn(model, MANY[:1], eos_id=eos_id)
    calls = []
    hook = model.decoder.register_forward_hook(lambda *_: calls.append(1))
    waiting = drawn(model, MANY[:1], eos_id=eos_id, any_process=lambda _: True)
    hook.remove()
    assert len(calls) == LIMIT
    for got, expected in zip(waiting[:4], alone[:4], strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("layers", ["top_2", "top_1"])
@pytest.mark.parametrize("ending", ["never", "some", "all at once"])
def test_the_trunk_kept_while_sampling_is_that_of_a_pass_over_the_whole(layers, ending):
    model = backbone(layers)
    free = drawn(model, MANY).response_ids_BR
    prompts = MANY if ending != "all at once" else MANY[:1]
    eos_id = NEVER if ending == "never" else int(free[0, 2])
    if eos_id == NEVER:
        eos_id = next(i for i in range(1, 259) if i not in free)
    said = drawn(model, prompts, eos_id=eos_id, keep_trunk=True)
    closing = torch.full((len(prompts), 1), eos_id)
    response = said.response_ids_BR
    before = (response == eos_id).long().cumsum(1) - (response == eos_id).long()
    open_B1 = ~(response == eos_id).any(1, keepdim=True)
    ids = torch.cat([said.prompt_ids_BP, response, closing], dim=1)
    mask = torch.cat([said.prompt_mask_BP, before == 0, open_B1], dim=1)
    assert {"never": bool(open_B1.all()), "some": 0 < open_B1.sum() < len(prompts)}.get(
        ending, not open_B1.any()
    )
    whole = model.trunk(ids, mask)
    torch.testing.assert_close(said.trunk_BTD[mask], whole[mask], rtol=0, atol=1e-5)
    assert (said.trunk_BTD[~mask] == 0).all()
    for got, expected in zip(said[:4], drawn(model, prompts, eos_id=eos_id)[:4], strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_a_trunk_is_kept_only_on_demand_and_where_there_is_one():
    assert drawn(backbone()).trunk_BTD is None
    assert drawn(backbone("all"), keep_trunk=True).trunk_BTD is None
    model = backbone()
    drawn(model, keep_trunk=True, eos_id=1)
    assert not model.decoder.layers[0]._forward_hooks


def test_the_adapter_is_folded_in_and_the_cache_does_not_move_while_sampling(monkeypatch):
    model, places, maps = backbone("all"), set(), []
    update = RoomyLayer.update

    def spied(layer, *args, **options):
        keys, values = update(layer, *args, **options)
        places.add((id(layer), keys.data_ptr(), values.data_ptr()))
        return keys, values

    monkeypatch.setattr(RoomyLayer, "update", spied)
    layer = model.base.model.layers[1].mlp.up_proj

    def look(going):
        maps.append(layer.__dict__.get("forward"))
        return going

    drawn(model, any_process=look)
    assert len(places) == 3
    merged = layer.base_layer.weight + layer.get_delta_weight("policy")
    x = torch.randn(2, merged.shape[1])
    for forward in maps:
        torch.testing.assert_close(forward(x), x @ merged.T, rtol=0, atol=1e-5)
    drawn(
        model, role="reference", any_process=lambda going: maps.append(layer.__dict__.get("forward")) or going
    )
    assert maps[-1] is None
    assert "forward" not in layer.__dict__


def test_a_model_with_sliding_windows_is_sampled_with_a_cache_of_its_own_kind():
    config = MistralConfig(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    base = MistralForCausalLM(config).requires_grad_(False).eval()
    model = Backbone(base, Lora(rank=4, layers="top_2"), adapters=["policy"])
    uniform = uniforms(0, "test", 0, range(len(MANY)), LIMIT)
    eos_id = plainly(model, MANY[0], uniform[0], "policy", NEVER)[0][4]
    got = drawn(model, MANY, eos_id=eos_id, keep_trunk=True)
    assert got.trunk_BTD is None
    assert_plain(model, got, "policy", uniform, eos_id)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("role", ["policy", "reference"])
def test_recorded_log_probs_are_those_of_the_training_pass(role, temperature):
    model = backbone()
    said = drawn(model, role=role, temperature=temperature)
    start = said.prompt_ids_BP.shape[1]
    closing = torch.ones(len(PROMPTS), 1, dtype=torch.long)
    ids = torch.cat([said.prompt_ids_BP, said.response_ids_BR, closing], dim=1)
    mask = torch.cat([said.prompt_mask_BP, torch.ones(len(PROMPTS), LIMIT + 1, dtype=torch.bool)], dim=1)
    with torch.no_grad():
        log_probs, _ = model(role, ids, mask, start=start, temperature=temperature)
        other, _ = model(role, ids, mask, start=start, temperature=temperature * 1.2)
    torch.testing.assert_close(said.log_probs_BR, log_probs, rtol=0, atol=1e-4)
    assert not torch.allclose(said.log_probs_BR, other, atol=1e-2)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_tokens_are_picked_as_often_as_the_softmax_says(temperature):
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, -3.0, 1.0])
    number = 40_000
    uniform = torch.from_numpy(np.random.default_rng(0).random(number))
    picked, log_probs = pick(logits.expand(number, -1), uniform, temperature)
    expected = torch.softmax(logits / temperature, dim=-1)
    share = torch.bincount(picked, minlength=6) / number
    errors = (expected * (1 - expected) / number).sqrt()
    assert ((share - expected).abs() < 4 * errors).all()
    torch.testing.assert_close(log_probs, expected.log()[picked])


def test_a_low_temperature_says_the_likeliest_token():
    model = backbone()
    cold = drawn(model, temperature=1e-4).response_ids_BR
    uniform = torch.full((len(PROMPTS), LIMIT), 0.9)
    assert cold.tolist() == drawn(model, uniform=uniform, temperature=1e-4).response_ids_BR.tolist()
    assert cold.tolist() != drawn(model).response_ids_BR.tolist()


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("vocabulary", [2, 259, 50_000])
def test_the_smallest_and_the_largest_uniform_pick_a_token_that_can_be_said(uniform, vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(64, vocabulary + 4, generator=generator)
    logits[:, [0, 1, -2, -1]] = -torch.inf  # impossible at both ends
    picked, log_probs = pick(logits, torch.full((64,), uniform, dtype=torch.float64), 1.0)
    assert (picked == (2 if uniform == 0 else vocabulary + 1)).all()
    assert log_probs.isfinite().all()


def test_a_token_without_probability_is_never_picked():
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]).expand(1001, -1)
    picked, _ = pick(logits, torch.linspace(0, 1, 1001, dtype=torch.float64) * (1 - 2**-53), 1.0)
    assert set(picked.tolist()) == {1, 3}


def test_uniforms_are_a_function_of_seed_purpose_step_and_row():
    first = uniforms(1, "rollout", 2, [3, 4], 50)
    assert first.dtype == torch.float64
    assert ((first >= 0) & (first < 1)).all()
    assert torch.equal(uniforms(1, "rollout", 2, [4, 3], 50).flip(0), first)
    assert torch.equal(uniforms(1, "rollout", 2, [3], 20)[0], first[0, :20])
    others = [
        first[1],
        uniforms(2, "rollout", 2, [3], 50)[0],
        uniforms(1, "collect", 2, [3], 50)[0],
        uniforms(1, "evaluate", 2, [3], 50)[0],
        uniforms(1, "rollout", 3, [3], 50)[0],
    ]
    for other in others:
        assert not (other == first[0]).any()


def test_any_seed_a_recipe_can_have_is_accepted():
    for seed in (-1, 0, 2**70):
        assert uniforms(seed, "rollout", 0, [0], 3).shape == (1, 3)
