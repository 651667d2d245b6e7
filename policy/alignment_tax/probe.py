"""Whether a base can do what a road asks of it: one short pass of every role, before the first stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from policy.ppo.setup import new_backbone
from reward.model.model import new_reward_model
from rlhf.errors import UserError, first_line, out_of_memory
from rlhf.generation.sampling import sample
from rlhf.models.base import best_device, load_base
from rlhf.models.masks import last_true_index, left_pad, positions_from_mask
from rlhf.recipe.load import Recipe
from rlhf.runs.cache import remember
from rlhf.tokenization.dialogue import load_dialogue
from rlhf.tokenization.prompt_prefix import Context, window_of

_FAULTS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


def probe_once(recipe: Recipe, folder: Path) -> str:
    """:func:`probe`, remembered in ``folder`` for this model and these sections of the recipe."""
    files = sorted(file for file in Path(recipe.model.path).expanduser().iterdir() if file.is_file())
    key = {
        "files": [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files],
        "layers": recipe.reward.layers,
        "recipe": recipe.model_dump(
            mode="json", include={"model", "lora", "dialogue", "ppo", "distill", "hhh_prompt"}
        ),
    }
    return str(remember(folder, "probe", key, lambda: probe(recipe)))


def probe(recipe: Recipe) -> str:
    """Run a few tokens through every role and through the reward stage's classifier.

    Returns:
        A line on what was found.

    Raises:
        UserError: the base cannot be used, or a prompt does not fit into its window; which role and why.
    """
    dialogue = load_dialogue(recipe)
    ids_BT, mask_BT = left_pad([list(range(3, 12)), list(range(5, 10))], dialogue.pad_id)
    where = "the base"
    try:
        base = load_base(recipe.model)
        _check_prompt(recipe, dialogue, base)
        model = new_backbone(base, recipe.lora, recipe.ppo, rewards=["reward"]).to(best_device())
        ids_BT, mask_BT = ids_BT.to(model.device) % _vocabulary(base), mask_BT.to(model.device)
        warning = model.check_architecture()
        with torch.no_grad():
            for where in ("reference", "policy", *model.heads):
                trunk = model.trunk(ids_BT, mask_BT)
                options: Any = {"own_BT": mask_BT} if where in model.heads else {"start": 7}
                found = model(where, ids_BT, mask_BT, trunk, **options)
                _check_finite(found if where in model.heads else found[0])
        where = "sampling"
        prompts, uniforms = ids_BT[:, 5:].tolist(), torch.full((2, 2), 0.5)
        eos, pad = dialogue.eos_id, dialogue.pad_id
        sample(model, "policy", prompts, uniforms, eos_id=eos, pad_id=pad, temperature=1.0)
        del model, base
        where = "the reward model"
        layers = None if recipe.reward.layers == "auto" else recipe.reward.layers
        classifier: Any = new_reward_model(recipe, dialogue, layers=layers).to(best_device())
        with torch.no_grad():
            columns_B = last_true_index(mask_BT)
            places = {"rows_B": torch.arange(2).to(columns_B), "columns_B": columns_B, "starts_B": columns_B}
            inputs = {"attention_mask": mask_BT.long(), "position_ids": positions_from_mask(mask_BT)}
            _, scores_B = classifier(ids_BT, part="all", **inputs, **places)
            _check_finite(scores_B)
    except _FAULTS as error:
        if out_of_memory(error):
            raise
        reason = first_line(error, 200)
        raise UserError(
            f"model.path: {recipe.model.path} cannot be trained here: {where} fails on a few tokens "
            f"({reason}); use another base"
        ) from None
    return f"every role runs on {recipe.model.path}" + (f"; {warning}" if warning else "")


def _check_prompt(recipe: Recipe, dialogue: Any, base: Any) -> None:
    """Whether what is distilled fits behind the prompt into the window."""
    if recipe.distill is not None:
        window = window_of(base.config)
        Context.read(recipe.hhh_prompt, dialogue).check_window(window, recipe.distill.max_tokens)


def _vocabulary(base: Any) -> int:
    return int(base.config.get_text_config().vocab_size)


def _check_finite(values: torch.Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise ValueError("its outputs are not finite")
