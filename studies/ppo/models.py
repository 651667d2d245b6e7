"""The models of the study: a policy's rung, trained from nothing, and reward models on rungs of two sizes."""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_model
from torch import Tensor

from policy.evaluate.before_after import sample
from policy.ppo.rollout import Responses, RewardFn
from reward.loss import normalization
from reward.model.average import save_average
from reward.model.batch import encode
from reward.model.forward import score_examples
from reward.model.model import config_of, head_of, load_config, new_reward_model, save_reward_model
from reward.training.run import accuracy
from reward.training.trainer import plan_forward, train_preference_model
from rlhf.collect.judges import JUDGES, noisy_ranks
from rlhf.data.comparisons import Comparison, Message, Prompt
from rlhf.generation.sampling import uniforms
from rlhf.models.backbone import REFERENCE, Backbone
from rlhf.recipe.load import Recipe
from rlhf.recipe.reward import Pooling
from rlhf.recipe.schema import Lora
from rlhf.tokenization.dialogue import Dialogue
from studies.engine.units import Settings, Unit, keep, read_result, weights_path
from studies.scaling import rungs
from studies.scaling.adapters import quiet_folder
from studies.scaling.data import world
from studies.scaling.data.texts import Library

JUDGE = "vader"
CLOSED = (16, 40)  # words of a document that ends: a response ends by itself or is cut
OPEN = (60, 100)  # of one that does not
POOLING: Pooling = "mean"  # a rung of one layer does not learn from the closing token alone
AT_ONCE = 256  # responses


def dialogue_of(tokenizer: Any, s: Settings) -> Dialogue:
    """The token contract: a plain text, continued up to its end."""
    lengths = {"max_prompt_tokens": s["prompt_tokens"], "max_response_tokens": s["response_tokens"]}
    return Dialogue(tokenizer, template="plain", truncate_prompts=True, **lengths)


def prompts_of(seed: int, number: int, *, training: bool) -> list[Prompt]:
    """Beginnings of stories."""
    return [(Message("user", text),) for text in Library([], seed).openings(number, training=training)]


def gold(responses: Responses) -> Tensor:
    """The gold score: VADER's compound sentiment of the response, -1 to 1."""
    return torch.tensor(JUDGES[JUDGE](responses.prompts, responses.texts), dtype=torch.float64)


# ---------------------------------------------------------------- rungs


def rung(unit: Unit, folder: Path) -> dict[str, Any]:
    """Train a language model on short documents, each closed by EOS, or long ones that are not."""
    s = unit.settings
    model, tokenizer = rungs.load(s, None)
    place, chance = world.make_world(s["seed"]), world.random_of(s["seed"], "ppo documents")
    ids: list[int] = []
    while len(ids) < s["tokens"]:
        text = world.document(place, chance, chance.randint(*(CLOSED if s["closed"] else OPEN)))
        ids += [*tokenizer(text)["input_ids"], *([tokenizer.eos_token_id] if s["closed"] else [])]
    rows = np.asarray(ids[: len(ids) // s["window"] * s["window"]], dtype=np.int64).reshape(-1, s["window"])
    model.train()
    losses = rungs.language_model(model, rows, s)
    keep(weights_path(unit, folder), lambda file: save_model(model, str(file)))
    return {"first_loss": losses[0], "last_loss": float(np.mean(losses[-20:])), "steps": len(losses)}


def load_rung(unit: Unit, folder: Path) -> tuple[Any, Any]:
    """A trained rung, frozen, and its tokenizer."""
    return rungs.load(unit.settings, weights_path(unit, folder))


@contextlib.contextmanager
def as_folder(unit: Unit, folder: Path) -> Iterator[Path]:
    """A trained rung as Hugging Face's folder, for a while."""
    model, tokenizer = load_rung(unit, folder)
    with tempfile.TemporaryDirectory() as name:
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
        yield Path(name)


# ---------------------------------------------------------------- comparisons


def pairs(unit: Unit, folder: Path) -> dict[str, Any]:
    """Pairs of the rung's continuations, ordered by the gold score with an annotator's noise.

    The last ``held_out`` pairs are of other prompts. Returns them, and the mean gold score of the rung.
    """
    s = unit.settings
    model, tokenizer = load_rung(unit.needs[0], folder)
    dialogue = dialogue_of(tokenizer, s)
    backbone = Backbone(model, Lora(rank=1, alpha=1), adapters=["policy"], trainable=[])
    train, held_out = (
        prompts_of(s["seed"], number, training=kind)
        for number, kind in ((s["prompts"], True), (s["held_out"], False))
    )
    asked = [train[row % len(train)] for row in range(s["pairs"])] + held_out
    rng = np.random.default_rng([s["seed"], 2])
    made: list[list[Any]] = []
    scores: list[list[float]] = []
    for first in range(0, len(asked), AT_ONCE // 2):
        some = [prompt for prompt in asked[first : first + AT_ONCE // 2] for _ in range(2)]
        rows = range(2 * first, 2 * first + len(some))
        drawn = uniforms(s["seed"], "pairs", 0, rows, dialogue.max_response_tokens)
        said = sample(backbone, REFERENCE, dialogue, some, drawn, temperature=1.0).responses
        values = gold(said).view(-1, 2).tolist()
        scores += values
        for row, both in enumerate(values):
            ranks = noisy_ranks(both, noise=s["noise"], rng=rng)
            made.append([some[2 * row][0].content, *said.texts[2 * row : 2 * row + 2], *map(int, ranks)])
    right = [(a > b) == (row[3] < row[4]) for (a, b), row in zip(scores, made, strict=True) if a != b]
    return {
        "pairs": made[: s["pairs"]],
        "held_out": made[s["pairs"] :],
        "gold": float(np.mean(scores)),
        "gold_deviation": float(np.std(scores)),
        "labels_right": float(np.mean(right or [0.5])),  # chance where all are ties
    }


def comparisons(rows: Sequence[Sequence[Any]]) -> list[Comparison]:
    """Stored pairs as comparisons; a pair of equal texts tells nothing and is left out."""
    return [
        Comparison((Message("user", prompt),), (one, other), (first, second), source="study")
        for prompt, one, other, first, second in rows
        if one.strip() and other.strip() and one != other and first != second
    ]


# ---------------------------------------------------------------- reward models


def reward_folder(unit: Unit, folder: Path) -> Path:
    """Where a reward model stands."""
    return folder / f"{unit.kind}-{unit.key}"


def reward(unit: Unit, folder: Path) -> dict[str, Any]:
    """Train a reward model on the first pairs (the test model: on the last) by the project's trainer."""
    s, (base, source) = unit.settings, unit.needs
    found = read_result(source, folder)
    assert found is not None, "a unit is done after those it needs"
    rows, number = found["result"]["pairs"], s["comparisons"]
    learned = rows[-number:] if s["half"] == "test" else rows[:number]
    scratch = folder / f"scratch-{unit.key}"
    with as_folder(base, folder) as path, quiet_folder(scratch):
        learning = {"learning_rate": s["reward_rate"], "batch_size": 16, "epochs": s["reward_epochs"]}
        kind = {"checkpoint_every": 10**6, "probe": False, "pooling": POOLING}
        own = s | {"seed": s["seed"] + 1000 * s.get("member", 0)}
        recipe = recipe_of(path, own, rank=s["rank"], reward=learning | kind)
        dialogue = dialogue_of(load_rung(base, folder)[1], s)
        train, exam = (encode(comparisons(some), dialogue) for some in (learned, found["result"]["held_out"]))
        fresh = new_reward_model(recipe, dialogue, pooling=POOLING)
        plan = plan_forward(recipe, recipe.reward, fresh, train, dialogue)
        model: Any = train_preference_model(
            recipe, recipe.reward, dialogue, fresh, train, plan, folder=scratch
        )
        scores_of = partial(score_examples, model, pad_id=dialogue.pad_id, share=plan.share)
        reference = encode(comparisons(rows), dialogue)  # the same responses for all reward models
        gain, offset = normalization(scores_of(reference)[0])
        with torch.no_grad():
            head_of(model).weight.mul_(gain)
        config = config_of(recipe, dialogue, recipe.reward, gain=gain, offset=offset)
        config = config._replace(base=base.key)  # the folder is gone; members of an average have one base
        save_reward_model(model, reward_folder(unit, folder), config, dialogue)
        return {
            "accuracy": accuracy(scores_of(exam)[0], exam).as_dict(),
            "train_accuracy": accuracy(scores_of(train)[0], train).as_dict(),
        }


def average(unit: Unit, folder: Path) -> dict[str, Any]:
    """The mean of the weights of several reward models, as `ppo.ensemble: average` takes it."""
    _, *members = unit.needs
    save_average([reward_folder(member, folder) for member in members], reward_folder(unit, folder))
    return {"members": len(members)}


def recipe_of(path: Path, s: Settings, *, rank: int, **sections: Any) -> Recipe:
    """A recipe with a rung in a folder, the study's token contract, and these sections."""
    return Recipe.model_validate(
        {
            "name": "study",
            "seed": s["seed"],
            "model": {"path": str(path)},
            "lora": {"rank": rank, "alpha": 2 * rank},
            "dialogue": {
                "template": "plain",
                "max_prompt_tokens": s["prompt_tokens"],
                "max_response_tokens": s["response_tokens"],
            },
            "data": {"comparisons": ["the study's"]},
            **sections,
        }
    )


def load_reward(unit: Unit, folder: Path) -> RewardFn:
    """A trained reward model as a function of token ids: all rungs of a seed have one tokenizer."""
    s, place = unit.settings, reward_folder(unit, folder)
    lora = Lora(rank=s["rank"], alpha=2 * s["rank"])
    model, names = load_rung(unit.needs[0], folder)[0], ["reward"]
    backbone = Backbone(model, lora, adapters=names, heads=names, pooled=names)
    backbone.load_adapter("reward", place)
    backbone.set_offset("reward", load_config(place).offset)

    @torch.no_grad()
    def score(responses: Responses) -> Tensor:
        ids_BT, mask_BT = responses.ids_BT, responses.mask_BT
        own_BT = mask_BT.clone()
        own_BT[:, : responses.start] = False
        with backbone.folded("reward"):
            scores_B: Tensor = backbone("reward", ids_BT, mask_BT, None, own_BT=own_BT)
        return scores_B

    return score


def held_out_texts(seed: int, number: int) -> list[str]:
    """Lessons: what the policy is not trained on, and may forget."""
    place, chance = world.make_world(seed), random.Random(f"ppo lessons {seed}")
    made = [" ".join(world.exercise(place, chance)) for _ in range(number)]
    return [f" {text}" for text in made]
