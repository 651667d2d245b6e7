"""The parts of a PPO run with one and with several reward models, on a tiny model with stirred adapters."""

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_recipe

import policy.ppo.setup
from policy.evaluate.run import _reward_fns
from policy.ppo.rollout import Responses
from policy.ppo.setup import SPREAD, EnsembleScore, assemble, check_rewards, reward_folders, score_function
from reward.model.model import CONFIG, RewardModelConfig, TextRewardModel
from rlhf.data.comparisons import Message
from rlhf.errors import UserError
from rlhf.models.backbone import Backbone
from rlhf.models.base import load_base
from rlhf.models.masks import left_pad
from rlhf.models.tiny import write_tiny_model
from rlhf.runs.stage import open_stage
from rlhf.tokenization.dialogue import load_dialogue

ROWS = [[7, 8, 9, 20, 21, 1], [12, 24, 25, 26, 1], [13, 14, 15, 16, 30, 31, 32, 1]]
OFFSETS = (0.5, -1.25, 3.0)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with a base and three members of a reward stage, each with weights and offset of its own."""
    monkeypatch.chdir(tmp_path)
    write_tiny_model(tmp_path / "models" / "tiny")
    recipe = tiny_recipe()
    for number, offset in enumerate(OFFSETS):
        folder = tmp_path / "runs/tiny/reward" / ("model" if number == 0 else f"model-{number}")
        single = Backbone(load_base(recipe.model), recipe.lora, adapters=["reward"], heads=["reward"])
        stir(single, seed=number + 1)
        single.save_adapter("reward", folder)
        write_card(folder, offset=offset)
    return tmp_path


def write_card(folder, **changes):
    plain = (
        dict.fromkeys(RewardModelConfig._fields)
        | RewardModelConfig._field_defaults
        | {
            "base": "models/tiny",
            "contract": load_dialogue(tiny_recipe()).fingerprint(),
            "template": "plain",
            "max_prompt_tokens": 96,
            "max_response_tokens": 8,
        }
    )
    (folder / CONFIG).write_text(json.dumps(plain | changes))


@torch.no_grad()
def stir(backbone, *, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in backbone.named_parameters():
        if "lora_B" in name or name.startswith("heads."):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def opened(recipe):
    """The open stage, which a second start in the same test may open too."""
    run = open_stage(recipe, "ppo")
    run.lock.close()
    return run


def built(*overrides):
    recipe = tiny_recipe("reward.members=3", *overrides)
    run, dialogue = opened(recipe), load_dialogue(recipe)
    backbone = assemble(recipe, run, dialogue)
    return backbone, score_function(recipe, run, backbone, dialogue)


def member(number):
    return f"runs/tiny/reward/{'model' if number == 0 else f'model-{number}'}"


def said(backbone=None, rows=ROWS):
    ids, mask = left_pad(rows, 0)
    # a closing column, as of responses that ended themselves
    ids = torch.cat([ids, torch.zeros_like(ids[:, :1])], dim=1)
    mask = torch.cat([mask, torch.zeros_like(mask[:, :1])], dim=1)
    prompts = [(Message("user", str(row)),) for row in rows]
    hidden = None if backbone is None else backbone.trunk(ids, mask)
    return Responses(prompts, [str(row) for row in rows], ids, mask, hidden)


@torch.no_grad()
def alone(number, rows=ROWS):
    """Scores of one member on a base of its own, a row at a time without padding."""
    recipe = tiny_recipe()
    backbone = Backbone(load_base(recipe.model), recipe.lora, adapters=["reward"], heads=["reward"])
    backbone.load_adapter("reward", Path(member(number)))
    scores = [
        backbone("reward", torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool)) for row in rows
    ]
    return torch.cat(scores) + OFFSETS[number]


# ---- one reward model


def test_one_reward_model_scores_as_its_adapter(world, capsys):
    backbone, score = built(f"ppo.reward_model={member(1)}")
    part = said(backbone)
    assert part.hidden_BTD is not None
    with torch.no_grad():
        expected = backbone("reward", part.ids_BT, part.mask_BT, part.hidden_BTD)
        torch.testing.assert_close(score(part), expected, rtol=0, atol=1e-5)  # folded in, so to rounding
    torch.testing.assert_close(expected, alone(1), rtol=0, atol=1e-4)
    assert float(expected.std()) > 0.1
    assert list(backbone.heads) == ["value", "reward"]
    assert score.figures(lambda sums: sums, torch.device("cpu")) == {}
    printed = capsys.readouterr().out
    assert "score:" not in printed
    assert printed.count("\nvalue:     ") == printed.count("\nreward:    ") == 1
    assert f" tensors of {member(1)} (" in printed


def test_one_member_is_assembled_with_the_numbers_of_a_backbone_made_by_hand(world):
    backbone, _ = built(f"ppo.reward_model=[{member(0)}]")
    recipe = tiny_recipe()
    torch.manual_seed(recipe.seed)
    names = ("policy", "value", "reward")
    by_hand = Backbone(
        load_base(recipe.model), recipe.lora, adapters=names, heads=names[1:], trainable=names[:2]
    )
    for name in names[1:]:
        by_hand.load_adapter(name, Path(member(0)))
    assert {n for n, _ in backbone.named_parameters()} == {n for n, _ in by_hand.named_parameters()}
    for name, parameter in by_hand.named_parameters():
        assert torch.equal(backbone.get_parameter(name), parameter), name
    assert backbone.offsets == {"value": OFFSETS[0], "reward": OFFSETS[0]}


# ---- several


@pytest.mark.parametrize("how", ["mean", "minimum", "pessimistic"])
def test_the_score_is_that_of_members_scored_alone_and_combined(world, how):
    backbone, score = built(f"ppo.ensemble={how}", "ppo.ensemble_penalty=0.7")
    assert list(backbone.heads) == ["value", "reward", "reward_1", "reward_2"]
    with torch.no_grad():
        got = score(said(backbone))
    each = torch.stack([alone(number) for number in range(3)])
    deviation = ((each - each.mean(0)) ** 2).mean(0).sqrt()
    expected = {
        "mean": each.mean(0),
        "minimum": each.min(0).values,
        "pessimistic": each.mean(0) - 0.7 * deviation,
    }
    torch.testing.assert_close(got, expected[how], rtol=0, atol=1e-4)
    assert got.shape == (3,)
    assert float(deviation.min()) > 0.1


def test_the_value_starts_from_the_first_member_and_every_part_says_where_it_is_from(world, capsys):
    backbone, _ = built(f"ppo.reward_model=[{member(2)}, {member(0)}]", "ppo.ensemble=pessimistic")
    value, first, second = (backbone.parameters_of(name) for name in ("value", "reward", "reward_1"))
    assert all(torch.equal(value[name], first[name]) for name in value)
    assert not all(torch.equal(value[name], second[name]) for name in value)
    assert backbone.offsets == {"value": OFFSETS[2], "reward": OFFSETS[2], "reward_1": OFFSETS[0]}
    learning = {name.split(".")[-2] for name, p in backbone.named_parameters() if p.requires_grad}
    assert learning == {"policy", "value"}
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines() if ":" in line)
    for part, folder in (("value", member(2)), ("reward", member(2)), ("reward_1", member(0))):
        assert f" tensors of {folder} (" in lines[part]
    assert lines["score"].strip() == "mean - 1 x standard deviation of the 2 reward models"


@pytest.mark.parametrize(("read", "told"), [(7, True), (8, False), (9, False)])
def test_a_reward_model_that_has_read_less_than_ppo_samples_is_told(world, capsys, read, told):
    write_card(world / "runs/tiny/reward/model", max_response_tokens=read)
    built()
    assert (f"max_response_tokens={read} is less than the 8 tokens" in capsys.readouterr().out) is told


def test_without_a_trunk_its_memory_limit_is_named_as_without_effect(world, capsys):
    for layers, line in (("all", "none: no layers are frozen"), ("top_1", "frozen layers")):
        recipe = tiny_recipe(f"lora.layers={layers}", "ppo.retokenize=true")
        assemble(recipe, opened(recipe), load_dialogue(recipe))
        assert line in capsys.readouterr().out.partition("trunk: ")[2]


def test_without_a_name_all_members_of_the_run_are_taken(world):
    recipe = tiny_recipe()
    run = opened(recipe)
    assert reward_folders(recipe, run) == [Path(member(number)) for number in range(3)]
    named = tiny_recipe(f"ppo.reward_model=[{member(2)}, {member(1)}]")
    assert [str(folder) for folder in reward_folders(named, run)] == [member(2), member(1)]


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("model.dtype=bfloat16", "model.dtype is float32 there, bfloat16 here"),
        ("model.quantization=nf4", "model.quantization is none there, nf4 here"),
        ("model.revision=v2", "model.revision is None there, v2 here"),
    ],
)
def test_a_model_over_a_base_that_was_loaded_otherwise_is_refused(world, option, said):
    recipe = tiny_recipe(option)
    with pytest.raises(UserError, match=rf"{member(1)} does not fit \({said}\); set ppo\.retokenize=true"):
        check_rewards(recipe, load_dialogue(tiny_recipe()), [Path(member(1))])


@pytest.mark.parametrize("change", [{"base": "models/other"}, {"contract": "0"}])
def test_members_that_do_not_fit_each_other_or_the_policy_are_refused(world, change):
    write_card(Path(member(1)), offset=0.0, **change)
    with pytest.raises(UserError, match=r"ppo\.retokenize=true") as caught:
        built()
    assert f"{member(0)} and {member(1)} cannot share one base" in str(caught.value)
    for number in (0, 2):
        write_card(Path(member(number)), offset=0.0, **change)
    with pytest.raises(UserError, match=rf"{member(0)} does not fit .*this recipe's.*ppo\.retokenize=true"):
        built()


@pytest.mark.parametrize("retokenize", ["true", "false"])
def test_a_member_trained_by_imitation_is_refused_before_a_base_is_loaded(world, monkeypatch, retokenize):
    write_card(Path(member(1)), offset=0.0, objective="imitation")
    monkeypatch.setattr(policy.ppo.setup, "load_base", lambda *_: pytest.fail("too late"))
    with pytest.raises(UserError) as caught:
        built(f"ppo.retokenize={retokenize}")
    expected = f"{member(1)} was trained by imitation and gives no score; train it with reward.objec"
    assert str(caught.value).startswith(expected)


def test_a_model_trained_by_imitation_is_refused_wherever_it_would_score(world):
    recipe = tiny_recipe()
    write_card(Path(member(0)), offset=0.0, objective="imitation")
    for scorer in (
        lambda: check_rewards(recipe, load_dialogue(recipe), [Path(member(0))]),
        lambda: TextRewardModel(Path(member(0))),
        lambda: score_function(
            tiny_recipe("ppo.retokenize=true"), opened(recipe), None, load_dialogue(recipe)
        ),
    ):
        with pytest.raises(UserError, match=r"reward/model was trained by imitation and gives no score"):
            scorer()


class Reader:
    """Stands in for a reward model that reads text."""

    def __init__(self, folder, device, *, trust_remote_code):
        assert not trust_remote_code
        self.number = OFFSETS[("model", "model-1", "model-2").index(folder.name)]
        assert device == torch.device("cpu")

    def score(self, prompts, responses):
        assert [str(prompt[-1].content) for prompt in prompts] == list(responses)
        return torch.tensor([self.number * len(text) for text in responses])


def test_with_retokenize_each_reads_the_text_by_itself_whatever_its_base(world, monkeypatch, capsys):
    monkeypatch.setattr(policy.ppo.setup, "TextRewardModel", Reader)
    write_card(Path(member(1)), base="models/other", contract="0")
    backbone, score = built("ppo.retokenize=true", "ppo.ensemble=minimum")
    assert list(backbone.heads) == ["value"]
    assert not any(bool(p.any()) for p in backbone.heads.parameters())
    part = said()
    expected = [min(offset * len(text) for offset in OFFSETS) for text in part.texts]
    assert score(part).tolist() == pytest.approx(expected)
    lines = capsys.readouterr().out.splitlines()
    assert "value:     fresh, zero head" in lines
    for name, number in (("reward:   ", 0), ("reward_1: ", 1), ("reward_2: ", 2)):
        assert f"{name} {member(number)}, on its own base, reads the text" in lines


# ---- where the score is read


@pytest.mark.parametrize("number", [1, 3])
def test_with_an_end_of_context_token_the_score_is_read_on_it(world, number):
    folders = [member(n) for n in range(number)]
    overrides = [f"ppo.reward_model=[{', '.join(folders)}]", "dialogue.end_of_context=<|start|>"]
    recipe = tiny_recipe(*overrides)
    dialogue = load_dialogue(recipe)
    assert dialogue.end_of_context_id == 2
    for n in range(number):
        write_card(Path(member(n)), offset=OFFSETS[n], contract=dialogue.fingerprint())
    backbone, score = built(*overrides)
    part = said(backbone)
    assert part.hidden_BTD is not None
    ids, mask = part.ids_BT.clone(), part.mask_BT.clone()
    with torch.no_grad():
        got = score(part)
        on_eos = torch.stack([alone(n) for n in range(number)]).mean(0)
    expected = torch.stack([alone(n, [[*row, 2] for row in ROWS]) for n in range(number)]).mean(0)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert float((got - on_eos).abs().min()) > 1e-3
    assert torch.equal(part.ids_BT, ids)
    assert torch.equal(part.mask_BT, mask)


# ---- the disagreement


def test_the_disagreement_is_the_mean_over_all_responses_since_it_was_last_asked_for():
    rounds = [
        ([1.0, 2.0, 3.0], [3.0, 2.0, 9.0]),  # deviations 1, 0, 3
        ([0.0], [4.0]),  # 2
        ([5.0, 5.0], [5.0, 7.0]),  # 0, 1
    ]
    now = iter([rows for rows in rounds for _ in range(2)])
    members = [lambda part: torch.tensor(next(now)[0]), lambda part: torch.tensor(next(now)[1])]
    score = EnsembleScore(members, "mean", 1.0)
    assert score(said()).tolist() == [2, 2, 6]
    assert score(said()).tolist() == [2]
    cpu = torch.device("cpu")
    assert score.figures(lambda sums: sums, cpu) == {SPREAD: pytest.approx((1 + 0 + 3 + 2) / 4)}
    score(said())
    # another process has three responses with a sum of 5
    assert score.figures(lambda sums: sums + torch.tensor([5.0, 3.0]), cpu) == {SPREAD: pytest.approx(6 / 5)}
    assert score.figures(lambda sums: sums, cpu) == {}  # nothing was scored since
    assert score.figures(lambda sums: sums + torch.tensor([5.0, 2.0]), cpu) == {SPREAD: 2.5}


def test_the_log_has_the_disagreement_of_the_adapters(world):
    backbone, score = built()
    with torch.no_grad():
        score(said(backbone))
    each = torch.stack([alone(number) for number in range(3)])
    deviation = ((each - each.mean(0)) ** 2).mean(0).sqrt()
    found = score.figures(lambda sums: sums, torch.device("cpu"))
    assert found == {"ppo/score_spread": pytest.approx(float(deviation.mean()), abs=1e-4)}


# ---- evaluation, and the recipe


def test_the_evaluation_judges_with_the_same_ensemble(world):
    overrides = ["reward.members=3", "ppo.ensemble=minimum", "evaluate.judge=reward"]
    _, score = built(*overrides)
    recipe = tiny_recipe(*overrides)
    run, dialogue = opened(recipe), load_dialogue(recipe)
    names = ("policy", "reward", "reward_1", "reward_2")
    backbone = Backbone(load_base(recipe.model), recipe.lora, adapters=names, heads=names[1:])
    found = _reward_fns(recipe, run, backbone, dialogue)
    assert list(found) == ["reward"]
    with torch.no_grad():
        assert found["reward"](said()).tolist() == pytest.approx(score(said()).tolist(), abs=1e-5)
        expected = torch.stack([alone(number) for number in range(3)]).min(0).values
        assert found["reward"](said()).tolist() == pytest.approx(expected.tolist(), abs=1e-4)


def test_every_named_reward_model_must_be_a_folder(world):
    assert tiny_recipe(f"ppo.reward_model={member(1)}").ppo.reward_model == [member(1)]
    assert tiny_recipe("ppo.reward_model=null").ppo.reward_model == []
    for value, named in (
        (f"[{member(0)}, runs/no]", "runs/no"),
        (f"[runs/no, {member(0)}]", "runs/no"),
        ("runs/no", "runs/no"),
        ("['']", "''"),
        (f"{member(0)}/{CONFIG}", f"{member(0)}/{CONFIG}"),
    ):
        with pytest.raises(UserError) as caught:
            tiny_recipe(f"ppo.reward_model={value}")
        assert str(caught.value).endswith(f"ppo.reward_model: {named} is not a folder; check the path")
