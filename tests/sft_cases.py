"""A tiny policy and encoded demonstrations for the tests of fine-tuning."""

import random

import pytest
import torch
from conftest import ROOT, stage
from preference_cases import tiny as tiny_recipe_and_dialogue

from policy.sft.run import new_backbone
from policy.sft.trainer import new_trainer
from rlhf.models.packing import Row
from rlhf.training.hf_trainer import ADAPTER

VOCABULARY = 259
FAST = (
    f"data.comparisons={ROOT}/recipes/tiny/comparisons.jsonl",
    "sft.learning_rate=5e-3",
    "sft.batch_size=8",
    "sft.checkpoint_every=1",
)
"""Overrides of the tiny recipe with which the stage takes a moment."""


def begun(folder):
    """A folder with the tiny model and the comparisons that the stage reads."""
    from rlhf.collect import __main__ as collect
    from rlhf.models import prepare

    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for main in (prepare.main, collect.main):
            stage(main, *FAST)
    return folder


def tiny(*overrides):
    """Recipe with an ``sft`` section, and dialogue, of the tiny model."""
    return tiny_recipe_and_dialogue("sft.checkpoint_every=1000", *overrides)


def awake(*overrides, seed=0):
    """A backbone whose adapter says something: in a fresh one B is 0, so A gets no gradient."""
    backbone = new_backbone(tiny(*overrides)[0])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in backbone.parameters_of(ADAPTER).items():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return backbone


def cases(number, seed=0, *, prompt=(1, 12), said=(1, 9)):
    """Encoded demonstrations of random tokens; the last few tokens of each are learned."""
    rng = random.Random(seed)
    rows = []
    for _ in range(number):
        before, response = rng.randint(*prompt), rng.randint(*said)
        ids = [rng.randrange(3, VOCABULARY) for _ in range(before + response)]
        rows.append(Row(ids, [False] * before + [True] * response))
    return rows


def trainer_of(folder, backbone, rows, *overrides, packing=True):
    """A trainer that has not begun."""
    recipe, dialogue = tiny(*overrides)
    return new_trainer(recipe, recipe.sft, dialogue, backbone, rows, packing=packing, folder=folder)


def batch_of(rows):
    """What a data loader hands to the trainer."""
    return {"examples": [row._asdict() for row in rows]}


def taught(folder, rows, *overrides, packing=True, backbone=None):
    """A backbone trained on encoded demonstrations, its files below ``folder``."""
    backbone = backbone or new_backbone(tiny(*overrides)[0])
    trainer_of(folder, backbone, rows, *overrides, packing=packing).fit()
    return backbone


def weights(backbone):
    """All learned numbers in one row."""
    return torch.cat([p.detach().flatten() for p in backbone.parameters_of(ADAPTER).values()])


def plain_nll(backbone, row):
    """Summed negative log-probability of a row's learned tokens, by the model as anybody calls it."""
    logits = backbone.model(input_ids=torch.tensor([row.ids])).logits[0, :-1]
    logps = logits.log_softmax(-1)[torch.arange(len(row.ids) - 1), torch.tensor(row.ids[1:])]
    return -(logps * torch.tensor(row.counts[1:])).sum()
