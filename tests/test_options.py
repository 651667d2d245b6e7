"""Which options go together: the whole road on the tiny model under a pairwise table of recipe options.

Every value of every option meets every value of every other one in some row, but for :data:`REFUSED`, which
the product refuses before it starts. The table in ``docs/guide.md`` names what is refused.
"""

import itertools
import random
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT, stage

from rlhf.data.comparisons import Counts
from rlhf.data.readers.native import read_native
from rlhf.errors import UserError
from rlhf.recipe.load import load

RECIPE = ROOT / "recipes" / "tiny_assistant.yaml"
SMALL = (
    "data.prompts=[]",
    "data.held_out_prompts=[]",
    "data.limit=16",
    "dialogue.max_prompt_tokens=112",
    "dialogue.max_response_tokens=8",
    "distill.max_tokens=128",
    "sft.epochs=1",
    "sft.batch_size=4",
    "distill.sequences=8",
    "distill.start=null",
    "distill.full_kl_sequences=1",
    "reward.batch_size=4",
    "reward.start=null",
    "ppo.start=null",
    "ppo.epochs=2",
    "ppo.samples_per_prompt=2",
    "ppo.micro_batch_size=2",
    "ppo.rollout_batch_size=4",
    "evaluate.prompts=3",
    "tax.tasks={hhh: recipes/tiny/hhh_helpful.json, lm_loss: {files: recipes/tiny/texts.jsonl, limit: 2}}",
)
PMP = (
    "pmp={sources: [{files: recipes/tiny/comparisons.jsonl}], limit: 16, batch_size: 4,"
    " learning_rate: 1e-3%s}"
)
OPTIONS = {
    "model.dtype": {kind: [f"model.dtype={kind}"] for kind in ("float32", "bfloat16", "float16")},
    "model.quantization": {kind: [f"model.quantization={kind}"] for kind in ("none", "nf4", "int8")},
    "lora.layers": {value: [f"lora.layers={value}"] for value in ("all", "top_1")},
    "lora.targets": {"all-linear": [], "q_proj, v_proj": ["lora.targets=[q_proj, v_proj]"]},
    "dialogue.template": {value: [f"dialogue.template={value}"] for value in ("chat", "plain")},
    "dialogue.end_of_context": {"null": [], "a token": ["dialogue.end_of_context=<|start|>"]},
    "data.comparisons": {
        "files": [],
        "sampled": [
            "data.comparisons=sampled",
            "data.prompts=recipes/prompts/sentiment_train.jsonl",
            "data.held_out_prompts=recipes/prompts/sentiment_held_out.jsonl",
            "collect={prompts: 12, responses: 3}",
        ],
    },
    "start": {
        "null": [],
        "sft": [f"{name}.start=sft" for name in ("distill", "reward", "ppo")],
        "distill": ["distill.start=sft", "reward.start=distill", "ppo.start=distill"],
    },
    "pmp": {"none": [], "binarized": [PMP % ""], "imitation": [PMP % ", form: ranked, objective: imitation"]},
    "distill.method": {value: [f"distill.method={value}"] for value in ("lora", "full")},
    "sft.packing": {value: [f"sft.packing={value}"] for value in ("true", "false")},
    "sft.loss_on": {value: [f"sft.loss_on={value}"] for value in ("response", "all")},
    "reward.share_prompts": {value: [f"reward.share_prompts={value}"] for value in ("true", "false")},
    "reward.objective": {
        "ranked": [],
        "plackett_luce, lm_coef": ["reward.likelihood=plackett_luce", "reward.lm_coef=1"],
        "binary": ["reward.objective=binary"],
    },
    "reward.head_init": {"normal": [], "probe": ["reward.probe=true", "reward.head_init=probe"]},
    "reward.members": {
        "1": [],
        "2": ["reward.members=2", "ppo.ensemble=pessimistic"],
        "2, averaged": ["reward.members=2", "ppo.ensemble=average"],
    },
    "trunk_gigabytes": {"4": [], "0": [f"{name}.trunk_gigabytes=0" for name in ("distill", "reward", "ppo")]},
    "ppo.algorithm": {"ppo": [], "ppo, value shared": ["ppo.value=shared"], "rloo": ["ppo.algorithm=rloo"]},
    "ppo.kl_in": {
        "reward": [],
        "loss, k2": ["ppo.kl_in=loss", "ppo.kl_estimator=k2"],
        "loss, k3": ["ppo.kl_in=loss", "ppo.kl_estimator=k3"],
    },
    "ppo.minibatches": {value: [f"ppo.minibatches={value}"] for value in ("1", "2")},
    "ppo.ptx_coef": {"0": [], "1": ["ppo.ptx_coef=1", "ppo.ptx_texts=recipes/tiny/texts.jsonl"]},
    "ppo.entropy_coef": {"0": [], "0.01": ["ppo.entropy_coef=0.01"]},
    "ppo.value_warmup": {value: [f"ppo.value_warmup={value}"] for value in ("0", "1")},
    "ppo.ema_decay": {"null": [], "0.9": ["ppo.ema_decay=0.9"]},
    "ppo.loss_level": {value: [f"ppo.loss_level={value}"] for value in ("token", "sequence")},
    "ppo.score_normalization": {v: [f"ppo.score_normalization={v}"] for v in ("none", "running")},
    "ppo.retokenize": {value: [f"ppo.retokenize={value}"] for value in ("false", "true")},
    "ppo.rewards": {
        "none": [],
        "a mix": [
            "ppo.rewards=[{model: reward}, {judge: vader, weight: 0.5},"
            " {function: recipes/reward_functions.py:brevity, normalize: true}]"
        ],
    },
    "evaluate": {
        "gold": [],
        "reward, best of 2": ["evaluate={judge: reward, best_of: 2, best_of_prompts: 2, prompts: 3}"],
    },
}


_FLOAT32, _WHOLE_MODEL = "distill.method: full needs float32", "distill.method=full makes a whole model"
_BASE_CHANGES, _NO_VALUE = "head_init=probe fits the frozen base", "algorithm rloo has no value"
_HEAD_OF_PMP = "head_init=probe: the reward model starts from the head of the pmp stage"
REFUSED = {
    ("distill.method", "full", "model.dtype", "bfloat16"): _FLOAT32,
    ("distill.method", "full", "model.dtype", "float16"): _FLOAT32,
    ("distill.method", "full", "model.quantization", "nf4"): _FLOAT32,
    ("distill.method", "full", "model.quantization", "int8"): _FLOAT32,
    ("distill.method", "full", "start", "distill"): _WHOLE_MODEL,
    ("reward.head_init", "probe", "start", "sft"): _BASE_CHANGES,
    ("reward.head_init", "probe", "start", "distill"): _BASE_CHANGES,
    ("reward.head_init", "probe", "pmp", "binarized"): _HEAD_OF_PMP,
    ("reward.head_init", "probe", "pmp", "imitation"): _HEAD_OF_PMP,
    ("ppo.algorithm", "rloo", "ppo.value_warmup", "1"): _NO_VALUE,
}
"""Two values that do not go together, and the line that says so."""


class Cell(NamedTuple):
    """One value of one option."""

    option: str
    value: str


NEVER = {frozenset((Cell(*pair[:2]), Cell(*pair[2:]))) for pair in REFUSED}


def pairwise(options, never, seed=1):
    """Rows in which every pair of values but ``never`` occurs, built greedily, the same for one seed."""
    draw = random.Random(seed)
    cells = {option: [Cell(option, value) for value in values] for option, values in options.items()}
    left = {
        frozenset(pair)
        for one, other in itertools.combinations(cells.values(), 2)
        for pair in itertools.product(one, other)
    } - never
    rows = []
    while left:
        tries = [_row(draw, cells, left, never) for _ in range(8)]
        rows.append(max((row for row in tries if row), key=lambda row: len(_pairs(row) & left)))
        left -= _pairs(rows[-1])
    return [
        {cell.option: cell.value for cell in sorted(row, key=lambda c: [*options].index(c.option))}
        for row in rows
    ]


def _row(draw, cells, left, never):
    """A row that begins with a pair that is left, the others bring most; None = a trap."""
    row = list(draw.choice(sorted(map(sorted, left))))
    for option in draw.sample(
        [option for option in cells if all(c.option != option for c in row)], k=len(cells) - 2
    ):
        possible = [c for c in cells[option] if not any(frozenset((c, other)) in never for other in row)]
        if not possible:
            return None
        draw.shuffle(possible)
        row.append(max(possible, key=lambda c: sum(frozenset((c, other)) in left for other in row)))
    return row


def _pairs(row):
    return {frozenset(pair) for pair in itertools.combinations(row, 2)}


ROWS = pairwise(OPTIONS, NEVER)


def overrides_of(row):
    """What stands on the command line for a row."""
    found = [text for option, value in row.items() for text in OPTIONS[option][value]]
    if row.get("pmp", "none") != "none":  # the reward model starts from it
        found = [text.replace("reward.start", "pmp.start") for text in found]
    return [*SMALL, *found]


def road(overrides):
    """Every stage, in this process."""
    from policy.alignment_tax import __main__ as tax
    from policy.distillation import __main__ as distill
    from policy.evaluate import __main__ as evaluate
    from policy.ppo import __main__ as ppo
    from policy.sft import __main__ as sft
    from reward.card import __main__ as card
    from reward.pretraining import __main__ as pmp
    from reward.training import __main__ as reward
    from rlhf.collect import __main__ as collect
    from rlhf.models import prepare

    for module in (prepare, collect, sft, distill, pmp, reward, card, ppo, evaluate, tax):
        stage(module.main, *overrides, recipe=RECIPE)


@torch.no_grad()
def scores(recipe, folder):
    """Scores of the held-out responses, one at a time: by the card's model, and by the adapter in PPO."""
    from policy.ppo.setup import load_scorer as load_adapter
    from reward.card.scorers import load_scorer
    from rlhf.models.backbone import Backbone
    from rlhf.models.base import load_base
    from rlhf.models.masks import right_pad
    from rlhf.tokenization.dialogue import load_dialogue

    dialogue = load_dialogue(recipe)
    backbone = Backbone(load_base(recipe.model), recipe.lora, adapters=["reward"], heads=["reward"])
    load_adapter(backbone, "reward", folder / "reward/model")
    card = load_scorer(str(folder / "reward/model"), recipe)
    some = read_native(folder / "comparisons/held_out.jsonl", "stop", Counts())
    found = []
    for prompt, response in [(c.prompt, response) for c in some for response in c.responses]:
        ids = dialogue.encode_prompt(prompt) + dialogue.close([], dialogue.encode_response(response))
        tensors = right_pad([ids], dialogue.pad_id)
        found.append((float(card.score([prompt], [response])[0]), float(backbone("reward", *tensors))))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(ROWS)))
def test_the_whole_road_works_under_options_in_pairs(number, inside, no_picture, monkeypatch):
    from policy.ppo import update

    errors = []
    check = update.check_first_ratio
    monkeypatch.setattr(update, "check_first_ratio", lambda e: (errors.append(float(e)), check(e)))
    (inside / "recipes").symlink_to(ROOT / "recipes")
    overrides = overrides_of(ROWS[number])
    road(overrides)
    recipe, folder = load(RECIPE, overrides), Path("runs/tiny-assistant")
    exact = (recipe.model.dtype, recipe.model.quantization) == ("float32", "none")
    assert len(errors) == recipe.ppo.steps - recipe.ppo.value_warmup
    assert max(errors) <= (1e-5 if exact else 0.0)  # rounding, or the very same passes
    for card, ppo in scores(recipe, folder):
        assert card == pytest.approx(ppo, abs=1e-5)


def test_the_guide_names_what_does_not_go_together():
    lines = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8").splitlines()
    for first, value, second, other in REFUSED:
        line = next(line for line in lines if line.startswith(f"| `{first}: {value}` |"))
        assert f"`{second}: {other}`" in line or f"`{second}`" in line, (first, second, other)


def test_the_table_has_every_pair_that_is_not_refused():
    cells = [[Cell(option, value) for value in values] for option, values in OPTIONS.items()]
    wanted = {
        frozenset(pair)
        for one, other in itertools.combinations(cells, 2)
        for pair in itertools.product(one, other)
    }
    found = [_pairs([Cell(*item) for item in row.items()]) for row in ROWS]
    assert set().union(*found) == wanted - NEVER
    assert len(ROWS) == 20


@pytest.mark.parametrize("pair", REFUSED, ids="-".join)
def test_what_does_not_go_together_is_refused_before_anything_starts(pair, monkeypatch):
    monkeypatch.chdir(ROOT)
    row = dict(zip(pair[::2], pair[1::2], strict=True))
    with pytest.raises(UserError, match=REFUSED[pair]) as caught:
        load(RECIPE, overrides_of(row))
    assert "\n" not in str(caught.value)
