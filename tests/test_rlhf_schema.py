"""The fields of a recipe: each explained, each read, and none that contradicts another."""

import ast
import typing

import pytest
from conftest import ROOT
from pydantic import ValidationError

from rlhf.recipe.reward import Card, Pmp, Reward
from rlhf.recipe.schema import STARTS, Distributed, Ppo, Recipe, Section, Sft
from rlhf.recipe.shared import OWNED


def section_of(annotation):
    options = [annotation, *typing.get_args(annotation)]
    return next((o for o in options if isinstance(o, type) and issubclass(o, Section)), None)


def fields(holder="recipe", section=Recipe):
    """(what the code calls the section, field's name, field) of every field, of sections in sections too."""
    found = []
    for name, field in section.model_fields.items():
        found.append((holder, name, field))
        inner = section_of(field.annotation)
        found += fields(name.removesuffix("s"), inner) if inner else []  # one of the `sources` is a `source`
    return found


def readings():
    """Every ``holder.name`` that the code reads as (holder, name), and every text in a file with getattr."""
    read, texts = set(), set()
    for file in [p for package in ("rlhf", "reward", "policy") for p in (ROOT / package).rglob("*.py")]:
        if file.parent.name == "recipe":
            continue
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
                holder = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
                read.add((holder, node.attr))
        if any(isinstance(node, ast.Name) and node.id == "getattr" for node in nodes):
            texts |= {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return read, texts


BY_PROPERTY = {  # read inside the schema, for these properties
    ("lora", "layers"): ("lora", "top_k"),
    ("ppo", "whiten_advantages"): ("ppo", "whitens_advantages"),
    ("reward", "function"): ("reward", "scored_by"),
}

STORED = {
    ("recipe", "trackers")
}  # read from the recipe.yaml of a stage's folder, by rlhf/training/metrics.py

CALLED = {
    "toxicity": "toxic",
    "round": "rounds",
    "inside": "options",
}  # sections that the code holds under another name


def test_every_field_is_read_by_the_code():
    read, texts = readings()
    unread = []
    for key, name, _ in fields():
        if (key, name) in STORED:
            continue
        holder, wanted = BY_PROPERTY.get((key, name), (key, name))
        holders = (holder, CALLED.get(holder, holder), "section")
        if wanted not in texts and not {(each, wanted) for each in holders} & read:
            unread.append(f"{key}.{name}")
    assert unread == []


def test_every_field_says_what_it_means():
    assert len(fields()) > 60
    for key, name, field in fields():
        if key == "recipe" and section_of(field.annotation):
            assert (section_of(field.annotation).__doc__ or "").strip().endswith("."), name
        else:
            assert (field.description or "").strip().endswith((".", ")")), f"{key}.{name}"


# --- the name of a stage for a folder --------------------------------------------------------------------


def test_a_start_may_be_a_stage_that_runs_before():
    order = ["sft", "distill", "pmp", "reward", "ppo", "dpo"]
    assert set(STARTS) == set(order[1:])
    for section, stages in STARTS.items():
        assert set(stages) <= set(order[: order.index(section)])
        assert "start" in section_of(Recipe.model_fields[section].annotation).model_fields


# --- combinations ----------------------------------------------------------------------------------------

CONTRADICTIONS = [
    *(
        (section, message, options)
        for section in (Reward, Pmp)
        for message, options in (
            ("margin belongs to objective=ranked", {"objective": "binary", "margin": 1.0}),
            (
                "label_smoothing belongs to objective=ranked",
                {"objective": "imitation", "label_smoothing": 0.1},
            ),
            ("label_noise belongs to objective=ranked", {"likelihood": "plackett_luce", "label_noise": 0.1}),
            ("two answers to one question", {"label_smoothing": 0.1, "label_noise": 0.1}),
            (
                "likelihood belongs to objective=ranked",
                {"objective": "binary", "likelihood": "plackett_luce"},
            ),
            ("center_rewards_coef needs a score", {"objective": "imitation", "center_rewards_coef": 0.1}),
            ("is the language-model loss already", {"objective": "imitation", "lm_coef": 1.0}),
        )
    ),
    (Reward, "needs the probe", {"head_init": "probe", "probe": False}),
    (Card, "add curve", {"curve_of": "reward"}),
    (Reward, "would overwrite the head of reward.start", {"head_init": "probe", "start": "a"}),
    (Reward, "fits the frozen base, which start=sft changes", {"head_init": "probe", "start": "sft"}),
    (Reward, "members are for scores", {"members": 2, "objective": "imitation"}),
    (Reward, "test_share makes a second score", {"test_share": 0.5, "objective": "imitation"}),
    (Sft, "data names nothing", {"data": []}),
    (Sft, "chosen stands alone", {"data": ["chosen", "a.jsonl"]}),
    (Sft, "start is a folder here", {"start": "sft"}),
    (Ppo, "k1 in the loss has no gradient", {"kl_in": "loss", "kl_estimator": "k1"}),
    (Ppo, "adaptive multiplies kl_coef", {"kl_controller": "adaptive", "kl_coef": 0.0}),
    (Ppo, "reinforce has no value: remove value", {"algorithm": "reinforce", "value": "shared"}),
    (Ppo, "reinforce has no lambda: remove", {"algorithm": "reinforce", "lam_value": 1.0}),
    (Ppo, "reinforce has no lambda: remove", {"algorithm": "reinforce", "lam_length": 0.1}),
    (Ppo, "value_warmup_until ends a value_warmup", {"value_warmup_until": 0.5}),
    (Ppo, "value_warmup_missed=stop needs a goal", {"value_warmup_missed": "stop"}),
    (Ppo, "both set the scores' scale", {"score_shape": "sigmoid", "score_normalization": "running"}),
    (Ppo, "only used with score_shape", {"reference_samples": 2}),
    (Ppo, "reinforce has no value: .* value_warmup", {"algorithm": "reinforce", "value_warmup": 2}),
    (Ppo, "value_warmup 5 leaves the policy none of 5 steps", {"value_warmup": 5, "steps": 5}),
    (Ppo, "warmup_steps 7 leaves nothing of 7 steps", {"warmup_steps": 7, "steps": 7}),
    (Ppo, "does not divide into 3 minibatches", {"minibatches": 3}),
    (Ppo, "does not divide into 5 samples_per_prompt", {"samples_per_prompt": 5}),
    (Distributed, "offload_param=cpu needs weights that are sharded", {"offload_param": "cpu"}),
    (
        Distributed,
        "offload_optimizer=cpu needs states that are",
        {"offload_optimizer": "cpu", "zero_stage": 0},
    ),
]


@pytest.mark.parametrize(("section", "message", "options"), CONTRADICTIONS)
def test_options_that_contradict_each_other_are_refused(section, message, options):
    more = {"sources": [{"files": "hub:x"}]} if section is Pmp else {}
    with pytest.raises(ValidationError, match=message) as caught:
        section(**options, **more)
    assert caught.value.error_count() == 1
    for left_out in options:  # without any one of them, or with its rightful companion, the others are fine
        mended = {"kl_estimator": "k2", "steps": 100}.get(left_out)
        others = {name: value for name, value in options.items() if name != left_out}
        section(**others | ({} if mended is None else {left_out: mended}), **more)


@pytest.mark.parametrize("path", OWNED)
def test_a_key_of_deepspeed_that_follows_from_the_recipe_is_refused_with_the_key_that_sets_it(path):
    *sections, key = path.split(".")
    nested = {key: "auto"}
    for name in reversed(sections):
        nested = {name: nested}
    with pytest.raises(ValidationError, match=f"{path} follows from the recipe: set") as caught:
        Distributed(deepspeed=nested)
    assert caught.value.error_count() == 1
    keys = {f"{holder}.{name}" for holder, name, _ in fields()} | {name for _, name, _ in fields()}
    assert any(word.strip(",") in keys for word in OWNED[path].split())


def test_other_keys_of_deepspeed_are_taken():
    kept = {"zero_optimization": {"reduce_bucket_size": 1000}, "wall_clock_breakdown": True}
    assert Distributed(deepspeed=kept).deepspeed == kept
    with pytest.raises(ValidationError, match=r"zero_optimization .* is a mapping"):
        Distributed(deepspeed={"zero_optimization": 3})


@pytest.mark.parametrize("algorithm", ["rloo", "grpo", "dr_grpo"])
def test_some_algorithms_compare_the_samples_of_a_prompt(algorithm):
    with pytest.raises(ValidationError, match=f"{algorithm} compares the samples of a prompt"):
        Ppo(algorithm=algorithm, samples_per_prompt=1)
    assert not Ppo(algorithm=algorithm, samples_per_prompt=2).whitens_advantages


def test_the_data_of_the_fine_tuning_are_the_chosen_responses_or_files():
    assert (Sft().data, Sft(data="a.jsonl").data) == (["chosen"], ["a.jsonl"])
    assert (Sft().chosen, Sft(data="a.jsonl").chosen) == (True, False)


def test_the_weight_of_plain_texts_and_the_texts_come_together():
    for options in ({"ptx_coef": 1.0}, {"ptx_texts": ["a.txt"]}):
        with pytest.raises(ValidationError, match="give both or neither"):
            Ppo(**options)
    assert Ppo(ptx_coef=1.0, ptx_texts="a.txt").ptx_texts == ["a.txt"]
    assert Ppo(reward_model="a").reward_model == ["a"]
    assert Ppo(reward_model=None).reward_model == []


@pytest.mark.parametrize(
    ("options", "whitens", "has_value"),
    [
        ({}, True, True),
        ({"algorithm": "reinforce"}, True, False),
        ({"algorithm": "rloo", "samples_per_prompt": 2}, False, False),
        ({"algorithm": "rloo", "samples_per_prompt": 2, "whiten_advantages": True}, True, False),
        ({"whiten_advantages": False}, False, True),
    ],
)
def test_what_is_left_open_follows_the_algorithm(options, whitens, has_value):
    section = Ppo(**options)
    assert (section.whitens_advantages, section.has_value) == (whitens, has_value)


OUT_OF_RANGE = {
    Reward: {
        "label_smoothing": (-0.1, 0.5, 0.9),
        "label_noise": (-0.1, 0.5),
        "margin": (-1.0, float("nan"), float("inf")),
        "center_rewards_coef": (-1.0, float("inf")),
        "lm_coef": (-0.5,),
        "learning_rate": (0.0, -1.0, float("nan")),
        "trunk_gigabytes": (-1.0,),
        "members": (0, 1.5),
        "limit": (0,),
    },
    Sft: {
        "loss_on": ("prompt",),
        "limit": (0,),
        "eval_samples": (0, 1.5),
        "learning_rate": (0.0, float("nan")),
        "schedule": ("step",),
        "warmup_ratio": (-0.1, 1.1),
        "weight_decay": (-0.1,),
        "max_grad_norm": (0.0,),
        "epochs": (0,),
        "batch_size": (0, 2.5),
        "tokens_per_micro_batch": (0, 2.5),
        "checkpoint_every": (0,),
    },
    Ppo: {
        "steps": (0, 1.5),
        "temperature": (0.0, -1.0, float("inf")),
        "trunk_gigabytes": (-1.0,),
        "score_clip": (0.0, -1.0),
        "missing_eos": ("drop",),
        "missing_eos_penalty": (-1.0, float("nan")),
        "length_penalty": (-0.1,),
        "length_target": (-1,),
        "score_timeout_minutes": (0.0, float("inf")),
        "kl_coef": (-0.1, float("nan")),
        "kl_controller_target": (0.0,),
        "kl_controller_horizon": (0,),
        "kl_estimator": ("k4",),
        "target_kl": (0.0,),
        "max_kl": (0.0,),
        "gamma": (-0.1, 1.1),
        "lam": (-0.1, 1.1),
        "clip_range": (0.0, -0.2),
        "dual_clip": (1.0, 0.5, float("inf")),
        "loss_level": ("response",),
        "entropy_coef": (-0.1,),
        "value_clip_range": (0.0,),
        "value_coef": (-0.1,),
        "value_warmup": (-1,),
        "ptx_batch_size": (0,),
        "ptx_max_tokens": (0,),
        "epochs": (0,),
        "learning_rate": (0.0, float("nan")),
        "warmup_steps": (-1,),
        "max_grad_norm": (0.0,),
        "ema_decay": (-0.1, 1.0, 1.5),
        "max_nonfinite_updates": (0,),
    },
}


@pytest.mark.parametrize(
    ("section", "field"), [(section, field) for section in OUT_OF_RANGE for field in OUT_OF_RANGE[section]]
)
def test_values_out_of_their_range_are_refused(section, field):
    assert field in section.model_fields
    for value in OUT_OF_RANGE[section][field]:
        with pytest.raises(ValidationError, match=field):
            section(**{field: value})
