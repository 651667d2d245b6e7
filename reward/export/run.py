"""The reward model's export: adapter and head merged in float32, written, and compared with the trained one.

Hugging Face's head has no bias, and neither has vLLM's, so the offset goes into ``config.json`` as
``reward_offset``; the model card has the line that makes it the head's bias. It changes no comparison.
"""

from __future__ import annotations

from pathlib import Path

import torch

from reward.model.ensemble import MODEL, member_folders
from reward.model.model import RewardModelConfig, TextRewardModel, check_has_score, load_config
from rlhf.errors import UserError
from rlhf.export.card import write_card
from rlhf.export.folder import check_reload, gap_of, place_of, probes, save
from rlhf.export.hub import push
from rlhf.recipe.load import Recipe
from rlhf.runs.artifacts import staged_folder
from rlhf.runs.stage import RUNS


def export(recipe: Recipe) -> None:
    """Write every member of the run's reward model to a folder that is not there yet.

    Raises:
        UserError: no classifier of transformers is what one of them is, or a folder is there.
    """
    members = [(folder, load_config(folder)) for folder in member_folders(RUNS / recipe.name / "reward")]
    for folder, config in members:
        _check_plain(folder, config)
    names = [f"reward{folder.name.removeprefix(MODEL)}" for folder, _ in members]
    places = [place_of(recipe, name) for name in names]
    for (folder, _), name, place in zip(members, names, places, strict=True):
        _member(recipe, folder, name, place)
        push(recipe, place, name)


def _check_plain(folder: Path, config: RewardModelConfig) -> None:
    check_has_score(config, folder)
    if config.pooling == "mean":
        raise UserError(
            f"{folder}: its head reads the mean state (reward.pooling=mean), and every classifier of "
            "transformers and vLLM reads the last token, so a plain export would give other scores: train "
            "with reward.pooling=last, or export the policy alone (export.models=[policy])"
        )


@torch.no_grad()
def _member(recipe: Recipe, folder: Path, name: str, place: Path) -> None:
    reward = TextRewardModel(folder, trust_remote_code=recipe.model.trust_remote_code, unpacked=True)
    config, dialogue = reward.config, reward.dialogue
    rows = [dialogue.close(*pair) for pair in probes(recipe, dialogue)]
    ids = [torch.tensor([row]) for row in rows]
    trained = [reward.model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0] for row in ids]
    model = reward.model.merge_and_unload()
    model.config.reward_offset = config.offset
    with staged_folder(place) as made:
        model = save(model, dialogue, made, recipe.export.dtype)
        found = check_reload(model, made, "reward", rows)
        gap = gap_of([(found[str(n)], there) for n, there in enumerate(trained)], recipe)
        about = {"gap": gap, "rows": len(rows), **config._asdict()}
        write_card(recipe, "reward", made, name, dialogue, about)
    print(f"export: the reward model: {place}", flush=True)
