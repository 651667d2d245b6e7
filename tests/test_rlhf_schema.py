"""The fields of a recipe: each explained, each read, and none that contradicts another."""

import ast
import typing

import pytest
from conftest import ROOT
from pydantic import ValidationError

from rlhf.schema import Recipe, Section
from rlhf.schema.preferences import Pmp, Reward


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
        if file.name == "recipe.py" or file.parent.name == "schema":
            continue
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
                holder = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
                read.add((holder, node.attr))
        if any(isinstance(node, ast.Name) and node.id == "getattr" for node in nodes):
            texts |= {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return read, texts


BY_PROPERTY = {("lora", "layers"): ("lora", "top_k")}  # read inside the schema, for this property


def test_every_field_is_read_by_the_code():
    read, texts = readings()
    unread = []
    for key, name, _ in fields():
        holder, wanted = BY_PROPERTY.get((key, name), (key, name))
        if wanted not in texts and not {(holder, wanted), ("section", wanted)} & read:
            unread.append(f"{key}.{name}")
    assert unread == []


def test_every_field_says_what_it_means():
    assert len(fields()) > 60
    for key, name, field in fields():
        if key == "recipe" and section_of(field.annotation):
            assert (section_of(field.annotation).__doc__ or "").strip().endswith("."), name
        else:
            assert (field.description or "").strip().endswith((".", ")")), f"{key}.{name}"


# --- combinations ----------------------------------------------------------------------------------------

CONTRADICTIONS = {
    "margin belongs to objective=ranked": {"objective": "binary", "margin": 1.0},
    "label_smoothing belongs to objective=ranked": {"objective": "imitation", "label_smoothing": 0.1},
    "label_noise belongs to objective=ranked": {"likelihood": "plackett_luce", "label_noise": 0.1},
    "two answers to one question": {"label_smoothing": 0.1, "label_noise": 0.1},
    "likelihood belongs to objective=ranked": {"objective": "binary", "likelihood": "plackett_luce"},
    "centring needs a score": {"objective": "imitation", "centring": 0.1},
    "is the language-model loss already": {"objective": "imitation", "lm_coef": 1.0},
}


@pytest.mark.parametrize("message", CONTRADICTIONS)
@pytest.mark.parametrize("section", [Reward, Pmp])
def test_options_of_a_loss_that_contradict_each_other_are_refused(section, message):
    options = CONTRADICTIONS[message]
    more = {"sources": [{"files": "hub:x"}]} if section is Pmp else {}
    with pytest.raises(ValidationError, match=message):
        section(**options, **more)
    for left_out in options:  # each alone, or with its rightful companion, is accepted
        section(**{name: value for name, value in options.items() if name != left_out}, **more)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("needs the probe", {"head_init": "probe", "probe": False}),
        ("would overwrite the head of reward.start", {"head_init": "probe", "start": "a"}),
        ("members are for scores", {"members": 2, "objective": "imitation"}),
    ],
)
def test_options_of_the_reward_stage_that_contradict_each_other_are_refused(message, options):
    with pytest.raises(ValidationError, match=message):
        Reward(**options)
    for left_out in options:
        Reward(**{name: value for name, value in options.items() if name != left_out})


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("label_smoothing", (-0.1, 0.5, 0.9)),
        ("label_noise", (-0.1, 0.5)),
        ("margin", (-1.0, float("nan"), float("inf"))),
        ("centring", (-1.0, float("inf"))),
        ("lm_coef", (-0.5,)),
        ("learning_rate", (0.0, -1.0, float("nan"))),
        ("warmup", (-0.1, 1.1)),
        ("tokens_per_micro_batch", (0, 2.5)),
        ("trunk_gigabytes", (-1.0,)),
        ("members", (0, 1.5)),
        ("comparisons", (0,)),
    ],
)
def test_numbers_out_of_their_range_are_refused(field, values):
    for value in values:
        with pytest.raises(ValidationError):
            Reward(**{field: value})
