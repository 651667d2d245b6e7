"""Hidden states below the first adapted layer: computed once, equal to computing them anew, and used."""

import itertools

import pytest
import torch
from preference_cases import (
    assert_equal_tensors,
    awake,
    cases,
    encoded,
    gradients,
    learning,
    plain_scores,
    taught,
    tiny,
)

from reward.model.batch import pack
from reward.model.forward import forward_packed, score_examples
from reward.model.model import new_reward_model
from reward.model.trunk_cache import build_trunk
from reward.training.probe import features
from rlhf.runs.processes import print_once

SHARED = pytest.mark.parametrize("share", [True, False])
MIXED = [*cases(6, 21), *cases(1, 22, responses=(5, 5), first=6)]


@pytest.fixture
def model():
    return awake(*tiny())


def trunk_of(model, examples=MIXED, *overrides, share=True, gigabytes=1.0):
    recipe, dialogue = tiny(*overrides, f"reward.trunk_gigabytes={gigabytes!r}")
    return build_trunk(recipe, recipe.reward, model, examples, dialogue.pad_id, share=share)


def calls(model, layer):
    """A list that grows with every call of a layer."""
    made = []
    model.base_model.model.model.layers[layer].register_forward_hook(lambda *_: made.append(1))
    return made


@SHARED
def test_trunk_and_top_are_the_whole(model, share):
    trunk = trunk_of(model, share=share)
    assert trunk.cut == 1
    lower, upper = calls(model, 0), calls(model, 1)
    packed = pack(MIXED, 0, share=share)
    weights_R = torch.randn(len(packed.rows_B), generator=torch.Generator().manual_seed(0))
    hidden_NTD, scores_R = forward_packed(model, packed, trunk)
    assert (len(lower), len(upper)) == (0, 1)
    (scores_R * weights_R).sum().backward()
    found = gradients(model)
    whole_NTD, whole_R = forward_packed(model, packed)
    (whole_R * weights_R).sum().backward()
    expected = gradients(model)
    assert set(expected) == learning(model)
    assert_equal_tensors(found, expected)
    torch.testing.assert_close(scores_R, whole_R, rtol=1e-4, atol=2e-5)
    real = packed.segments_NT > 0
    torch.testing.assert_close(hidden_NTD[real], whole_NTD[real], rtol=1e-4, atol=1e-4)


@SHARED
def test_each_row_of_any_batch_gets_its_own_states(model, share):
    trunk = trunk_of(model, share=share)
    with torch.no_grad():
        for order in ([4, 0, 6], [6, 5, 4, 3, 2, 1, 0], [2], [3, 3, 1]):  # one twice, as in a padded batch
            some = [MIXED[i] for i in order]
            scores_R = forward_packed(model, pack(some, 0, share=share), trunk)[1]
            torch.testing.assert_close(scores_R, plain_scores(model, some), rtol=1e-4, atol=2e-5)
        expected = score_examples(model, MIXED, 0, share=share)[0]
        found = score_examples(model, MIXED, 0, share=share, trunk=trunk)[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(
            features(model, MIXED, 0, share=share, trunk=trunk),
            features(model, MIXED, 0),
            rtol=1e-4,
            atol=1e-4,
        )


@SHARED
def test_the_states_are_those_that_enter_the_first_adapted_layer(model, share):
    trunk = trunk_of(model, share=share)
    seen = []
    first = model.base_model.model.model.layers[1]
    first.register_forward_pre_hook(
        lambda _, args, options: seen.append(args[0] if args else options["hidden_states"]), with_kwargs=True
    )
    for example in MIXED:
        packed = pack([example], 0, share=share)
        with torch.no_grad():
            forward_packed(model, packed)
        states_NTD = trunk.of(packed)
        real_NT = packed.segments_NT > 0
        torch.testing.assert_close(states_NTD[real_NT], seen.pop()[real_NT], rtol=1e-4, atol=1e-5)
        assert states_NTD.shape[:2] == packed.ids_NT.shape
        assert not states_NTD[packed.segments_NT == 0].any()


def test_the_states_are_the_same_bits_however_far_the_training_has_come(model, tmp_path):
    def bits(trunk):
        return {piece: tensor.numpy().tobytes() for piece, tensor in trunk.pieces.items()}

    recipe, dialogue = tiny()
    rows = encoded(8)
    fresh = trunk_of(new_reward_model(recipe, dialogue), rows)
    trained = taught(tmp_path, rows, "reward.learning_rate=0.1")
    assert bits(trunk_of(trained, rows)) == bits(fresh)
    assert bits(trunk_of(awake(recipe, dialogue), rows, "reward.tokens_per_micro_batch=3")) == bits(fresh)
    assert not any(tensor.requires_grad for tensor in fresh.pieces.values())


@SHARED
def test_what_several_comparisons_hold_goes_through_the_layers_once(model, share):
    responses = [[10 + n] * (n + 1) + [1] for n in range(4)]
    pairs = [
        {"prompt": [5, 6, 7], "responses": [a, b], "spoken": [1, 1], "ranks": [0, 1], "index": n}
        for n, (a, b) in enumerate(itertools.permutations(responses, 2))
    ]
    trunk = trunk_of(model, pairs, share=share)
    assert len(trunk.pieces) == 1 + len(responses)
    alone = torch.cat([score_examples(model, [pair], 0, share=False)[0] for pair in pairs])
    read = []
    model.base_model.model.model.layers[-1].register_forward_hook(
        lambda _, inputs, output: read.append((output[0] if isinstance(output, tuple) else output).shape[:2])
    )
    for kept in (None, trunk):
        read.clear()
        found = score_examples(model, pairs, 0, share=share, trunk=kept)[0]
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
        assert sum(rows for rows, _ in read) == (1 if share else len(responses))


@SHARED
def test_training_with_the_cache_never_runs_a_layer_below(share, tmp_path):
    recipe, dialogue = tiny()
    rows = encoded(8)
    weights = {}
    for name in ("cached", "anew"):
        model = new_reward_model(recipe, dialogue).eval()
        trunk = trunk_of(model, rows, share=share) if name == "cached" else None
        lower, upper = calls(model, 0), calls(model, 2)
        taught(tmp_path / name, rows, "reward.epochs=2", share=share, trunk=trunk, model=model)
        assert len(upper) >= 2
        assert len(lower) == (0 if name == "cached" else len(upper))
        weights[name] = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    for parameter, tensor in weights["anew"].items():
        torch.testing.assert_close(weights["cached"][parameter], tensor, rtol=0, atol=1e-5)


def test_a_trunk_over_the_memory_limit_is_left_alone(model, capsys):
    tokens = sum(len(e["prompt"]) + sum(map(len, e["responses"])) for e in MIXED)
    needed = tokens * 32 * 4 / 1e9
    assert trunk_of(model, gigabytes=needed * 1.001) is not None
    assert capsys.readouterr().out == ""
    assert trunk_of(model, gigabytes=needed * 0.999) is None
    assert "reward.trunk_gigabytes: the hidden states" in capsys.readouterr().out
    assert trunk_of(model, gigabytes=0.0) is None


def test_there_is_no_trunk_where_all_layers_are_adapted(capsys):
    for layers in ("lora.layers=all", "lora.layers=top_3"):
        assert trunk_of(awake(*tiny(layers)), MIXED, layers) is None
    assert capsys.readouterr().out.count("reward.trunk_gigabytes has no effect") == 1
    recipe, dialogue = tiny("lora.layers=all")
    assert build_trunk(recipe, recipe.reward, awake(recipe, dialogue), MIXED, 0, share=True) is None
    assert capsys.readouterr().out == ""  # it was not set


def test_there_is_no_trunk_where_weights_are_sharded(model, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert trunk_of(model, MIXED, "distributed.zero_stage=3") is None
    assert capsys.readouterr().out.startswith("reward.trunk_gigabytes has no effect: ZeRO 3 gathers all")
    assert trunk_of(model, MIXED, "distributed.zero_stage=2") is not None


def test_an_architecture_that_cannot_be_split_has_no_trunk_and_is_told(model, monkeypatch, capsys):
    decoder = type(model.base_model.model.model)
    forward = decoder.forward

    def with_a_layer_of_its_own(self, *args, **options):
        out = forward(self, *args, **options)
        out.last_hidden_state = out.last_hidden_state + len(self.layers)
        return out

    monkeypatch.setattr(decoder, "forward", with_a_layer_of_its_own)
    assert trunk_of(model) is None
    assert "warning: trunk and top differ from the whole" in capsys.readouterr().out

    def of_a_fixed_depth(self, *args, **options):
        if len(self.layers) < 3:
            raise RuntimeError("three layers, please")
        return forward(self, *args, **options)

    monkeypatch.setattr(decoder, "forward", of_a_fixed_depth)
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "1")
        assert trunk_of(model) is None
    assert capsys.readouterr().out == ""
    print_once.cache_clear()
    assert trunk_of(model) is None
    assert "cannot be split at layer 1 (three layers, please)" in capsys.readouterr().out
    assert len(model.base_model.model.model.layers) == 3
